"""Start the processes of `hosts=local`: this command once more, so many times, as the processes of one run.

Process 0 is the run to whoever looks: it has our stdin, stdout and stderr, reports to our caller, and its exit code is
ours. What the others print (they do so where they fail) comes on stderr, each line with the number of its process. They
find each other by a variable of the environment, and end each other; here they are only started, and waited for.
"""

from __future__ import annotations

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
# So long the others may go on when process 0 has ended; they end with it, unless they hang.
LEFTOVER_SECONDS = 20.0
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

    def __init__(self, index: int, handle: subprocess.Popen[bytes], reader: threading.Thread | None):
        self.index, self.handle, self.reader = index, handle, reader
        self.signals, self.is_killed, self._is_noted = 0, False, False

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
        if self.reader is not None:
            self.reader.join(LAST_WORDS_SECONDS)
        if code < 0 and -code not in asked and not self.is_killed:
            print_fresh_line(f"[{self.index}] {describe_ending(code)}")
        if is_crash(code):
            # A worker that lives on would hold the run.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.handle.pid, signal.SIGTERM)


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
        _wait_for_all(processes, asked)
    if refused is not None:
        raise refused
    return _judge_code(processes[0].handle.returncode, asked)


def _wait_for_all(processes: Sequence[LocalProcess], asked: Sequence[int]) -> None:
    """Forward signals until every process has ended; kill those that stay when process 0 has gone."""
    until: float | None = None
    while left := [process for process in processes if not process.has_ended]:
        for process in left:
            process.forward_signals(asked)
        for process in processes:
            if process.has_ended:
                process.note_end(asked)
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
    source = os.fdopen(reading, "rb")
    with os.fdopen(writing, "wb") as output:
        # Unbuffered: lines come when they are printed.
        environment = {**environment, "PYTHONUNBUFFERED": "1"}
        handle = spawn_child(command, environment, stdin=subprocess.DEVNULL, output=output)
    reader = threading.Thread(target=_print_lines, args=(source, index), name=f"lines of {index}", daemon=True)
    reader.start()
    return LocalProcess(index, handle, reader)


def _print_lines(source: BinaryIO, index: int) -> None:
    for line in iter(partial(source.readline, MAX_LINE_BYTES), b""):
        # An empty one only separates what is said from a progress bar, of which there is none.
        if text := line.decode(errors="replace").rstrip():
            print_error(f"[{index}] {text}")


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
