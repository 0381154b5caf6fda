"""`supervise`: runs a command again until it is done: after each stop with its state saved, and after some crashes.

What each ending asks for is in rerun.py, how a process is ours in child.py. Where it works is told by the run itself,
in a file that this process names to it: nothing has to be guessed from the command line, and a sweep tells every run
it takes.
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

from runner.checkpoint.record import records_in
from runner.errors import CRASHED, STOPPED, ConfigError
from runner.launch.process import hearing, name_of, spawn
from runner.launch.restart_policy import Ending, Leave, Rerun, Streak, exit_code, is_crash, next_move
from runner.preempt.options import STOP_FILE
from runner.rundir.layout import SUPERVISOR, RunDir
from runner.values import Answer, Say


class Command:
    """The command, and the signals that are handed on to it, also those that come while none is running."""

    def __init__(self, words: Sequence[str]):
        self.asked: int | None = None
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def attempt(self, told: Path) -> int:
        """Run it once, to its end; it writes into `told` which runs it works on. Raises ConfigError if it cannot run.

        It may not read the terminal, which belongs to our process group: the system would stop it there for ever.
        """
        try:
            stdin = subprocess.DEVNULL if sys.stdin and sys.stdin.isatty() else None
            process = spawn(self._words, {SUPERVISOR: str(told)}, stdin=stdin)
        except OSError as error:
            raise ConfigError(f"supervise: {error.filename}: {error.strerror}; the command follows the --") from None
        self._process = process
        for number in self._early:
            process.send_signal(number)
        code = process.wait()  # one that hangs would be seen here: a wait that looks at the run's sign of life
        self._process = None
        if is_crash(code):
            with suppress(ProcessLookupError, PermissionError):  # what it left running would hold the run
                os.killpg(process.pid, signal.SIGTERM)
        return code

    def wait(self, seconds: float) -> None:
        """Until then, or until somebody asks to stop."""
        end = time.monotonic() + seconds
        while self.asked is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def hand_on(self, number: int, frame: FrameType | None) -> None:
        """A signal came."""
        self.asked = number
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)


def arguments(parser: ArgumentParser) -> None:
    """The command, after `--`."""
    parser.usage = "%(prog)s [--crashes N] [--wait SECONDS] [--json] -- python run.py …"
    parser.add_argument("--crashes", metavar="N", type=int, default=3, help="in a row without a newer checkpoint (3)")
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, default=5.0, help="after the first crash; doubled after each (5)"
    )
    parser.add_argument("command", nargs="+", help="what to run, as it would be typed")


def run(arguments: Namespace, say: Say) -> Answer:
    """Run the command until it is done. Raises ConfigError where it cannot be started."""
    if arguments.crashes < 0 or not 0 <= arguments.wait < float("inf"):
        raise ConfigError(f"supervise: got --crashes {arguments.crashes} --wait {arguments.wait}; expected 0 or more")
    command = Command(arguments.command)
    with TemporaryDirectory(prefix="holdfast-") as folder, hearing(command.hand_on):
        return _supervised(command, Path(folder), arguments.crashes, arguments.wait)


def _supervised(command: Command, folder: Path, budget: int, wait: float) -> Answer:
    streak = Streak()
    codes: list[int] = []
    newest: dict[Path, int] = {}  # the step of the newest checkpoint that was ever seen, of each run
    while command.asked is None:
        told, start = folder / f"{len(codes)}.jsonl", time.monotonic()
        code = command.attempt(told)
        codes.append(exit_code(code))
        held, in_use = _heard(told)
        steps = {run.path: _newest(run) for run in held}
        ending = Ending(
            code,
            seconds=time.monotonic() - start,
            saved_more=any(step > newest.get(path, 0) for path, step in steps.items()),
            in_use=in_use,
            gave_up=code == CRASHED and any(run.read_status().get("gave_up") is True for run in held),
            stop_file=any(run.read_status().get("why") == STOP_FILE for run in held),
            asked=command.asked,
        )
        newest |= {path: max(step, newest.get(path, 0)) for path, step in steps.items()}
        streak = streak.after(ending)
        move = next_move(ending, streak, budget, wait, random.random())
        _tell(f"attempt {len(codes)} {move.why}{_then(move)}")
        if isinstance(move, Leave):
            return Answer({"exit_code": move.code, "attempts": codes}, move.code)
        command.wait(move.wait)
    _tell(f"{name_of(command.asked)}: leaving; the same command goes on from what is saved")
    return Answer({"exit_code": STOPPED, "attempts": codes}, STOPPED)


def _heard(told: Path) -> tuple[list[RunDir], bool]:
    """The runs that an attempt worked on, and whether it found one in use."""
    try:
        lines = [json.loads(line) for line in told.read_text().splitlines()]
    except (OSError, ValueError):  # it came to no run
        return [], False
    return [RunDir(Path(line["run"])) for line in lines if line["held"]], any(not line["held"] for line in lines)


def _newest(run: RunDir) -> int:
    """The step of the newest checkpoint that the run would go on from by itself; 0 where there is none."""
    return max((record.step for record in records_in(run.checkpoints) if not record.mark), default=0)


def _then(move: Rerun | Leave) -> str:
    if isinstance(move, Leave):
        return "" if move.code == 0 else f"; leaving with exit code {move.code}"
    return f"; again in {move.wait:.1f} s" if move.wait else "; again at once"


def _tell(line: str) -> None:
    """On stderr: stdout is the command's. A terminal that has gone must not end what it supervises."""
    with suppress(OSError):
        # What was killed left half a progress bar behind, and hid the cursor.
        fresh = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else ""
        print(f"{fresh}supervise: {line}", file=sys.stderr, flush=True)
