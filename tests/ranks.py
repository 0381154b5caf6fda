"""Start the door as several processes of one run, signal any of them, and wait until all have ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from runner.rundir.heartbeat import read_heartbeat
from runner.rundir.layout import RunDir
from tests.conftest import HANG_SECONDS, REPO


def find_free_port() -> int:
    """Return a port of this machine that nobody has."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ranks:
    """The processes of one run, in a working directory.

    Attributes:
        count: how many.
        words: what is typed after `python run.py`.
        environment: variables of each rank.
    """

    cwd: Path
    count: int
    words: tuple[str, ...]
    environment: dict[int, dict[str, str]] = field(default_factory=dict)
    port: int = field(default_factory=find_free_port)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *only: int) -> Ranks:
        """Start all of them, or those that are named."""
        # What one that is killed has begun for itself is left where the test's own files are thrown away.
        scratch = self.cwd.with_name(f"{self.cwd.name}.scratch")
        scratch.mkdir(exist_ok=True)
        for index in only or range(self.count):
            place = f"127.0.0.1:{self.port},{self.count},{index}"
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(REPO / "run.py"), *self.words],
                    cwd=self.cwd,
                    env={
                        **os.environ,
                        "HOLDFAST_HOSTS": place,
                        "TMPDIR": str(scratch),
                        **self.environment.get(index, {}),
                    },
                    stdout=(self.cwd / f"out.{index}").open("a"),
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    text=True,
                )
            )
        return self

    def wait(self) -> list[int]:
        """Return the exit code of each, once all have ended; -9 for one that hangs."""
        until = time.monotonic() + HANG_SECONDS
        for process in self.processes:
            try:
                process.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes]

    def send(self, index: int, number: signal.Signals) -> None:
        """Send a signal to one of them, which must still be there."""
        assert self.processes[index].poll() is None, self.read(index)
        self.processes[index].send_signal(number)

    def read(self, index: int) -> str:
        """Return what one of them has printed."""
        return (self.cwd / f"out.{index}").read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so while all of them are at work."""
        until = time.monotonic() + HANG_SECONDS
        while not condition():
            ended = [process.returncode for process in self.processes if process.poll() is not None]
            assert not ended, (ended, [self.read(index) for index in range(self.count)])
            assert time.monotonic() < until, "it never came to that"
            time.sleep(0.01)

    def wait_for_step(self, run_dir: Callable[[], RunDir | None], step: int) -> None:
        """Wait until the run has done so many steps."""

        def is_there() -> bool:
            run = run_dir()
            heartbeat = None if run is None else read_heartbeat(run.heartbeat)
            return heartbeat is not None and heartbeat.step >= step

        self.wait_until(is_there)


def run_ranks(cwd: Path, count: int, *words: str, **environment: str) -> list[int]:
    """Run so many processes of one run to their end; return their exit codes."""
    variables = {index: environment for index in range(count)}
    return Ranks(cwd, count, words, variables).start().wait()


def find_only_run(root: Path) -> RunDir | None:
    """Return the run below a root; None where there is none yet."""
    found = [path.parent for path in root.glob("*/*/config.yaml")]
    return RunDir(found[0]) if found else None
