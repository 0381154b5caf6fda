"""Signals as requests to stop: the first sets the flag, a second one ends the process at once.

A thread hears them instead of a signal handler. Python runs handlers between two instructions of the main thread, which
may be inside a compiler or waiting for a device for minutes; through `signal.set_wakeup_fd` the operating system writes
the number of each signal to a socket, whatever the main thread does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from runner.preempt.stop import StopFlag
from runner.screen import print_past_locks

# A repeated signal within this time is the same request: faster than a person, and the two signals that `timeout`
# sends (to the process, then to its group) come within microseconds (measured).
ECHO_SECONDS = 0.25
# A process that dies is told to its children once for each of its threads that is gone after the one that started them
# (reparenting in linux/kernel/exit.c): microseconds apart as a rule, and longer on a busy machine.
PARENT_ECHO_SECONDS = 5.0


@contextmanager
def listen_to_signals(stop_flag: StopFlag, names: Sequence[str], notice_seconds: float) -> Iterator[None]:
    """Turn signals (`TERM`, `INT`, …) into stop requests while the context lasts.

    After SIGTERM the process has `notice_seconds` until it is killed; for other signals nobody knows. The handlers that
    were there before come back at the end and are then called once: a job launcher's own handler would requeue the job,
    which must not happen before the state is saved. SIGHUP stays ignored where it was: that is what nohup asks for.
    """
    numbers = [signal.Signals[f"SIG{name}"] for name in names]
    numbers = [number for number in numbers if not (number == signal.SIGHUP and _is_ignored(number))]
    if not numbers:
        yield
        return
    read_end, write_end = socket.socketpair()
    # Required by set_wakeup_fd: writing happens inside the C signal handler, which must never block.
    write_end.settimeout(0.0)
    listener = _SignalListener(read_end, stop_flag, frozenset(numbers), notice_seconds)
    handlers = {number: signal.signal(number, _do_nothing) for number in numbers}
    previous = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=listener.listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # The end of the stream ends the thread.
        write_end.close()
        thread.join()
        read_end.close()
    if listener.heard:
        first = listener.heard[0]
        _call_handler(first, handlers[signal.Signals(first)])


@dataclass
class _SignalListener:
    """Reads the numbers of signals from a socket until it is closed.

    Attributes:
        stream: the socket.
        stop_flag: what they ask to stop.
        numbers: those that count.
        notice_seconds: how long after SIGTERM the process is killed.
        heard: those that counted, in order.
        parent: the process that has started this one.
    """

    stream: socket.socket
    stop_flag: StopFlag
    numbers: frozenset[int]
    notice_seconds: float
    heard: list[int] = field(default_factory=list)
    parent: int = field(default_factory=os.getppid)

    def listen(self) -> None:
        heard_at = 0.0
        while received := self.stream.recv(1):
            number = received[0]
            # Every signal that has a Python handler is written here, those of other libraries too.
            if number not in self.numbers:
                continue
            name = signal.Signals(number).name
            # `timeout` and service managers signal a process and then its group: one request, heard twice.
            echo_seconds = ECHO_SECONDS if os.getppid() == self.parent else PARENT_ECHO_SECONDS
            if number in self.heard and time.monotonic() - heard_at < echo_seconds:
                continue
            # A hang-up is no person who cannot wait: a shell sends one more after that of its terminal, and a service
            # manager one right after SIGTERM.
            if self.heard and number == signal.SIGHUP:
                continue
            # Slurm repeats its signals while it waits, and kills by itself when it has waited enough. A person who
            # cannot wait presses Ctrl-C.
            if self.heard and "SLURM_JOB_ID" in os.environ and number != signal.SIGINT:
                continue
            if self.heard:
                print_past_locks(f"{name} again: leaving at once, without saving")
                os._exit(128 + number)
            self.heard.append(number)
            heard_at = time.monotonic()
            self.stop_flag.request_stop(name, self.notice_seconds if number == signal.SIGTERM else None)
            print_past_locks(f"{name}: saving at the next step boundary, then stopping; once more to leave at once")


def _call_handler(number: int, handler: Callable[[int, FrameType | None], object] | int | None) -> None:
    """Call a handler that was installed before, but not the one that Python itself installs for SIGINT."""
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, None)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Handle a signal by doing nothing: without a Python handler, nothing would be written to the socket."""
