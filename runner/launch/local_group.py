"""Start the processes of `hosts=local`: this command once more, so many times, as the processes of one run.

Process 0 is the run to whoever looks: it has our stdin, stdout and stderr, reports to our caller, and its exit code is
ours. What the others print (they do so where they fail) comes on stderr, each line with the number of its process. They
find each other by a variable of the environment, and end each other; here they are started, and waited for, and process
0 is told of one that has ended before it came to the others.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from types import FrameType
from typing import BinaryIO

from runner.errors import STOPPED, HoldfastError
from runner.hosts.early_end import EarlyEnd, tell_early_end
from runner.hosts.options import THIS_MACHINE, LocalHosts
from runner.installation import find_typed_program
from runner.launch.child_process import handle_signals, spawn_child
from runner.launch.handover import CHECKED
from runner.launch.local_sweep import share_gpus
from runner.launch.parent_report import ParentReport
from runner.launch.restart_policy import describe_ending, is_crash, shell_exit_code
from runner.rundir.run_lock import SUPERVISOR
from runner.screen import print_error, print_fresh_line

# The time between two looks whether a process has ended, or a signal has come.
POLL_SECONDS = 0.05
# So long the others may go on when process 0 has ended. They end with it and it waits for them, unless they hang or
# have not found it yet.
LEFTOVER_SECONDS = 5.0
# So long is waited for what a process said last; something that it started may hold its output for ever.
LAST_WORDS_SECONDS = 1.0
# Below those that the kernel gives to connections (from 32768 on): who tries to reach process 0 before it listens might
# be given that very port, and reach himself.
PORTS = range(20000, 32000)
# A longer line is printed as several.
MAX_LINE_BYTES = 1 << 16


class LocalProcess:
    """One process of the group.

    Attributes:
        index: its number; process 0 leads.
        signals: how many of those that came were forwarded to it.
        is_killed: it was killed from here.
    """

    def __init__(self, index: int, handle: subprocess.Popen[bytes], printer: LinePrinter | None):
        self.index, self.handle, self._printer = index, handle, printer
        self.signals, self.is_killed, self._is_told, self._is_noted = 0, False, False, False

    @property
    def has_ended(self) -> bool:
        """True when its exit code is known."""
        return self.handle.poll() is not None

    def forward_signals(self, asked: Sequence[int]) -> None:
        """Send it those of the signals that it has not got yet, each once."""
        for number in asked[self.signals :]:
            self.signals += 1
            self.handle.send_signal(number)

    def kill(self) -> None:
        """Kill it, with what it has started."""
        self.is_killed = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.handle.pid, signal.SIGKILL)

    def note_end(self, asked: Sequence[int]) -> None:
        """Say how it died, once, where it could not say so itself; have what a crashed one left running end as well."""
        if self._is_noted:
            return
        self._is_noted = True
        code = self.handle.returncode
        if self._printer is not None:
            self._printer.thread.join(LAST_WORDS_SECONDS)
        if code < 0 and -code not in asked and not self.is_killed:
            print_fresh_line(f"[{self.index}] {describe_ending(code)}")
        if is_crash(code):
            # A worker that lives on would hold the run.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.handle.pid, signal.SIGTERM)

    def tell_end(self, port: int) -> None:
        """Tell process 0 that it has ended, and how, until that is known there."""
        said = "" if self._printer is None else self._printer.last_line
        end = EarlyEnd(self.index, self.handle.returncode, said)
        self._is_told = self._is_told or tell_early_end(THIS_MACHINE, port, end)


class LinePrinter:
    """Print what a process prints, with its number in front.

    Attributes:
        thread: it goes on until the process, and whatever it has started, can print no more.
        last_line: what came last.

    Raises OSError where there can be no more threads.
    """

    def __init__(self, source: BinaryIO, index: int):
        self._source, self._index, self.last_line = source, index, ""
        self.thread = threading.Thread(target=self._print_lines, name=f"lines of {index}", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None

    def _print_lines(self) -> None:
        for line in iter(partial(self._source.readline, MAX_LINE_BYTES), b""):
            # An empty one only separates what is said from a progress bar, of which there is none.
            if text := line.decode(errors="replace").rstrip():
                self.last_line = text
                print_error(f"[{self._index}] {text}")


def run_group(hosts: LocalHosts, words: Sequence[str], report: ParentReport) -> int:
    """Have so many processes work on a run, until all have ended. Return the exit code of process 0.

    Args:
        hosts: how many.
        words: what to type after `python run.py`.
        report: what a caller of this process waits for; process 0 gives it.

    Raises:
        ConfigError: this machine has fewer GPUs.
        HoldfastError: a process cannot be started; those that were are stopped.
    """
    shares, port = share_gpus(hosts.count, "hosts.count"), _find_port()
    command = [sys.executable, *find_typed_program(), *words]
    for_lead = {**_take_variables(CHECKED, SUPERVISOR), **report.describe()}
    asked: list[int] = []
    processes: list[LocalProcess] = []
    refused: HoldfastError | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Forwarded by the loop below, which also knows the processes that are started after it came.
        asked.append(number)

    with handle_signals(on_signal):
        for index in range(hosts.count):
            environment = {**shares[index], **hosts.describe_place(port, index), **({} if index else for_lead)}
            try:
                processes.append(_start_process(index, command, environment))
            except OSError as error:
                refused = HoldfastError(f"hosts=local: process {index} cannot be started: {error.strerror or error}")
                asked.append(signal.SIGTERM)
                break
        _wait_for_all(processes, asked, port)
    if refused is not None:
        raise refused
    return _judge_code(processes[0].handle.returncode, asked)


def _wait_for_all(processes: Sequence[LocalProcess], asked: Sequence[int], port: int) -> None:
    """Forward signals until every process has ended; kill those that stay when process 0 has gone.

    `port`: where process 0 hears that another one has ended.
    """
    until: float | None = None
    while left := [process for process in processes if not process.has_ended]:
        for process in left:
            process.forward_signals(asked)
        for process in processes:
            if process.has_ended:
                process.note_end(asked)
                if process.index and not processes[0].has_ended:
                    process.tell_end(port)
        if processes[0].has_ended:
            until = until or time.monotonic() + LEFTOVER_SECONDS
            if time.monotonic() > until:
                for process in left:
                    process.kill()
        time.sleep(POLL_SECONDS)
    for process in processes:
        process.note_end(asked)


def _start_process(index: int, command: Sequence[str], environment: Mapping[str, str]) -> LocalProcess:
    """Start one of them. Raises OSError."""
    if index == 0:
        # The terminal belongs to our process group: the system would stop a child for ever that reads from it.
        stdin = subprocess.DEVNULL if sys.stdin and sys.stdin.isatty() else None
        return LocalProcess(index, spawn_child(command, environment, stdin=stdin), None)
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as output:
        # Before the process: where there can be no thread, there is no process to be taken away.
        printer = LinePrinter(os.fdopen(reading, "rb"), index)
        # Unbuffered: lines come when they are printed.
        environment = {**environment, "PYTHONUNBUFFERED": "1"}
        return LocalProcess(index, spawn_child(command, environment, stdin=subprocess.DEVNULL, output=output), printer)


def _take_variables(*names: str) -> dict[str, str]:
    """Take variables away that are meant for one process, and return them."""
    return {name: os.environ.pop(name) for name in names if name in os.environ}


def _judge_code(code: int, asked: Sequence[int]) -> int:
    """Return the exit code of the group from that of process 0."""
    # Killed by a signal that was forwarded, it was not listening yet: nothing was done that could have been lost.
    return STOPPED if -code in asked else shell_exit_code(code)


def _find_port() -> int:
    """Return a port on which nobody listens. Raises HoldfastError where there is none."""
    for port in random.sample(PORTS, 100):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind((THIS_MACHINE, port))
            return port
    raise HoldfastError(f"hosts=local: found no free port from {PORTS.start} to {PORTS.stop - 1} on this machine")
