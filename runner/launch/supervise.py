"""`supervise`: run a command again until it is done: after each stop with its state saved, and after some crashes.

What each ending asks for is decided in restart_policy.py. Where the command works is told by the run itself, in a file
that this process names to it: nothing has to be guessed from the command line, and a sweep names every run it takes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from runner.checkpoint.record import newest_durable_step
from runner.errors import CRASHED, STOPPED, ConfigError
from runner.launch.child_process import describe_signal, handle_signals, spawn_child
from runner.launch.restart_policy import (
    Exit,
    FailureStreak,
    ProcessEnding,
    Restart,
    decide_restart,
    has_lost_process,
    is_crash,
    shell_exit_code,
)
from runner.preempt.preempt_options import STOP_FILE
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import SUPERVISOR
from runner.screen import decouple_screen, print_fresh_line
from runner.values import Say, VerbResult

# The time between two looks, while waiting, whether somebody asked to stop.
POLL_SECONDS = 0.1


class SupervisedCommand:
    """A command, and the signals that are forwarded to it, also those that come while none is running.

    Attributes:
        asked: the last signal that came; None where none did.
    """

    def __init__(self, words: Sequence[str]):
        self.asked: int | None = None
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def run_once(self, report: Path) -> int:
        """Run it to its end and return its exit code; it writes into `report` which runs it works on.

        Raises:
            ConfigError: it cannot be run.
        """
        try:
            # The terminal belongs to our process group: the system would stop a child for ever that reads from it.
            stdin = subprocess.DEVNULL if sys.stdin and sys.stdin.isatty() else None
            process = spawn_child(self._words, {SUPERVISOR: str(report)}, stdin=stdin)
        except OSError as error:
            raise ConfigError(f"supervise: {error.filename}: {error.strerror}; the command follows the --") from None
        self._process = process
        for number in self._early:
            process.send_signal(number)
        # One that hangs would be seen here: by a wait that looks at the run's heartbeat.
        code = process.wait()
        self._process = None
        if is_crash(code):
            # What a crashed command left running (a sweep's runs, say) would hold the run.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGTERM)
        return code

    def wait(self, seconds: float) -> None:
        """Wait so long, or until somebody asks to stop."""
        end = time.monotonic() + seconds
        while self.asked is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal that came, at once or to the next process."""
        self.asked = number
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options, and the command after `--`."""
    parser.usage = "%(prog)s [--crashes N] [--wait SECONDS] [--json] -- python run.py …"
    parser.add_argument("--crashes", metavar="N", type=int, default=3, help="in a row without a newer checkpoint (3)")
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, default=5.0, help="after the first crash; doubled after each (5)"
    )
    parser.add_argument("command", nargs="+", help="what to run, as it would be typed")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Run the command until it is done. Raises ConfigError where it cannot be started."""
    if arguments.crashes < 0 or not 0 <= arguments.wait < float("inf"):
        raise ConfigError(f"supervise: got --crashes {arguments.crashes} --wait {arguments.wait}; expected 0 or more")
    # A terminal that goes, or is stopped, must not keep from being started again what is supervised.
    decouple_screen()
    command = SupervisedCommand(arguments.command)
    with TemporaryDirectory(prefix="holdfast-") as folder, handle_signals(command.on_signal):
        return _supervise(command, Path(folder), arguments.crashes, arguments.wait)


def _supervise(command: SupervisedCommand, folder: Path, max_crashes: int, wait: float) -> VerbResult:
    streak = FailureStreak()
    codes: list[int] = []
    # The step of the newest checkpoint that was ever seen of each run: older ones may be seen again after a rollback.
    newest: dict[Path, int] = {}
    while command.asked is None:
        report, start = folder / f"{len(codes)}.jsonl", time.monotonic()
        code = command.run_once(report)
        codes.append(shell_exit_code(code))
        run_dirs, in_use = _read_report(report)
        steps = {run_dir.path: newest_durable_step(run_dir.checkpoints) for run_dir in run_dirs}
        statuses = [run_dir.read_status() for run_dir in run_dirs]
        ending = ProcessEnding(
            code,
            seconds=time.monotonic() - start,
            saved_more=any(step > newest.get(path, 0) for path, step in steps.items()),
            in_use=in_use,
            gave_up=code == CRASHED and any(status.get("gave_up") is True for status in statuses),
            lost=any(has_lost_process(code, status) for status in statuses),
            stop_file=any(status.get("why") == STOP_FILE for status in statuses),
            asked=command.asked,
        )
        newest |= {path: max(step, newest.get(path, 0)) for path, step in steps.items()}
        streak = streak.after(ending)
        move = decide_restart(ending, streak, max_crashes, wait, random.random())
        _print_line(f"attempt {len(codes)} {move.why}{_describe_move(move)}")
        if isinstance(move, Exit):
            return VerbResult({"exit_code": move.code, "attempts": codes}, move.code)
        command.wait(move.wait)
    _print_line(f"{describe_signal(command.asked)}: leaving; the same command goes on from what is saved")
    return VerbResult({"exit_code": STOPPED, "attempts": codes}, STOPPED)


def _read_report(report: Path) -> tuple[list[RunDir], bool]:
    """Return the runs that an attempt worked on, and whether it found one in use; none where it came to no run."""
    try:
        lines = [json.loads(line) for line in report.read_text().splitlines()]
    except (OSError, ValueError):
        return [], False
    return [RunDir(Path(line["run"])) for line in lines if line["held"]], any(not line["held"] for line in lines)


def _describe_move(move: Restart | Exit) -> str:
    if isinstance(move, Exit):
        return "" if move.code == 0 else f"; leaving with exit code {move.code}"
    return f"; again in {move.wait:.1f} s" if move.wait else "; again at once"


def _print_line(line: str) -> None:
    """Print on stderr: stdout is the command's."""
    print_fresh_line(f"supervise: {line}")
