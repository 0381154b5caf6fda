"""Signals as a source of stop requests. The first only raises the flag; a second one ends the process at once.

A thread hears them, and not a handler: Python runs handlers between two instructions of the main thread, which may be
inside a compiler or waiting for a device for minutes. The system writes each signal's number to a socket, whatever the
main thread does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from runner.preempt.stop import StopFlag

ECHO_SECONDS = 0.25  # faster than a person; the two of `timeout` come within microseconds (measured)


@contextmanager
def listen_to_signals(stop_flag: StopFlag, names: Sequence[str], notice_seconds: float) -> Iterator[None]:
    """Turn these signals into a raised flag while the context lasts; after SIGTERM there are `notice_seconds`.

    Handlers that were there before come back, and hear of the signal then: a launcher's own would requeue the job.
    A hang-up that was ignored stays ignored: that is what nohup asks for.
    """
    numbers = [signal.Signals[f"SIG{name}"] for name in names]
    numbers = [number for number in numbers if not (number == signal.SIGHUP and _is_ignored(number))]
    if not numbers:
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.settimeout(0.0)
    heard: list[int] = []
    before = {number: signal.signal(number, _nothing) for number in numbers}
    previous = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(ours, stop_flag, set(numbers), notice_seconds, heard), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        theirs.close()
        listener.join()
        ours.close()
    if heard:
        _hand_on(heard[0], before[signal.Signals(heard[0])])


def _listen(ours: socket.socket, stop_flag: StopFlag, numbers: set[int], notice_seconds: float, heard: list[int]) -> None:
    since = 0.0
    while received := ours.recv(1):
        number = received[0]
        if number not in numbers:
            continue
        name = signal.Signals(number).name
        if number in heard and time.monotonic() - since < ECHO_SECONDS:
            continue  # `timeout` and service managers signal a process and then its group: one wish, told twice
        if heard and "SLURM_JOB_ID" in os.environ and number != signal.SIGINT:
            continue  # Slurm repeats itself; a person who cannot wait presses Ctrl-C, and Slurm itself kills
        if heard:
            _write(f"{name} again: leaving at once, without saving")
            os._exit(128 + number)
        heard.append(number)
        since = time.monotonic()
        stop_flag.request_stop(name, notice_seconds if number == signal.SIGTERM else None)
        _write(f"{name}: saving at the next step boundary, then stopping; once more to leave at once")


def _hand_on(number: int, handler: Callable[[int, FrameType | None], object] | int | None) -> None:
    """Tell a handler that was there before us, such as that of a job launcher; not the ones Python begins with."""
    if callable(handler) and handler is not signal.default_int_handler:
        handler(number, None)


def _is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the socket to hear of the signal."""


def _write(line: str) -> None:
    """Straight to the descriptor: the main thread may be inside a print."""
    os.write(2, f"\n{line}\n".encode())
