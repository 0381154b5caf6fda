"""Tell the program that started this process, by `run` or `sweep` from Python, which runs it works on and how they end.

An environment variable names that program's process and a file. The file is replaced as soon as the directories of the
runs are known and again at the end, so that it says where a run lives however this process dies. No jax.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from runner import files
from runner.errors import STOPPED, ConfigError, DivergedError, RefusedError
from runner.launch.child_process import PR_SET_PDEATHSIG
from runner.rundir.layout import RunDir
from runner.values import Ending, Outcome

# For annotations alone: the caller does not wait for what checks a configuration.
if TYPE_CHECKING:
    from runner.launch.sweep_members import MemberResult, SweepMember

REPORT = "HOLDFAST_REPORT"


@dataclass(frozen=True)
class ReportedRun:
    """One run of a call, as its process knows it.

    Attributes:
        directory: where it lives, an absolute path.
        name: what distinguishes it in its sweep: `seed=1`.
        ending: how it ended; empty while it goes, and where its process died.
        step: its last completed step; None: as status.json says.
        score: the best value, or what was measured by an evaluation; None where there is none.
        exit_code: that of its process.
        why: the reason, where it is not finished.
    """

    directory: str
    name: str = ""
    ending: Ending | None = None
    step: int | None = None
    score: float | None = None
    exit_code: int | None = None
    why: str = ""


class ParentReport:
    """Hold what the caller is told: the runs, in the order of the command, and an error where all of it failed."""

    def __init__(self, path: Path | None):
        self._path = path
        self._runs: dict[str, ReportedRun] = {}
        self._error = ""

    @property
    def is_wanted(self) -> bool:
        """True where a caller waits for it."""
        return self._path is not None

    def describe(self) -> dict[str, str]:
        """Return the variable by which a process that this one starts reports in its place; none where nobody waits."""
        return describe_report(self._path) if self._path is not None else {}

    def tell_run(self, run_dir: RunDir) -> None:
        """Tell where the one run of this process lives."""
        self._tell([ReportedRun(str(run_dir.path.absolute()))])

    def tell_outcome(self, outcome: Outcome) -> None:
        """Tell how the one run of this process ended."""
        self._tell(
            replace(run, ending=outcome.ending, step=outcome.step, score=outcome.score, exit_code=outcome.exit_code)
            for run in self._runs.values()
        )

    def tell_members(self, members: Sequence[SweepMember], results: Sequence[MemberResult] = ()) -> None:
        """Tell which runs a sweep has, or one more batch of a search, and how they stand at its end."""
        self._tell(map(_describe_member, members, results or repeat(None)))

    def tell_error(self, message: str) -> None:
        """Tell why the command ends with an error."""
        self._error = message
        self._tell(())

    def refuse_jobs(self, launcher: str) -> None:
        """Raise ConfigError where a caller waits for runs that would only be submitted."""
        if self.is_wanted:
            raise ConfigError(
                f"{launcher}: got a call from Python, which waits for its runs; expected a command, for a job is only "
                "submitted: type it in a shell, or leave the launcher out"
            )

    def _tell(self, runs: Iterable[ReportedRun]) -> None:
        self._runs |= {run.directory: run for run in runs}
        if self._path is None:
            return
        document = {"runs": [asdict(run) for run in self._runs.values()], "error": self._error}
        # The runs are worth more than what is said of them: a caller without a report says that it has none.
        with suppress(OSError):
            files.replace_file(self._path, files.format_json(document), durable=False)


def describe_report(path: Path) -> dict[str, str]:
    """Return the variable by which a process knows whom to report to: this process, through this file."""
    return {REPORT: f"{os.getpid()} {path}"}


def take_report() -> ParentReport:
    """Return the report that this process owes; where it owes one, it is asked to stop when its caller dies.

    The variable is taken away: what this process starts reports to it, and not to its caller.
    """
    caller, _, path = os.environ.pop(REPORT, "").partition(" ")
    if not path or not caller.isdigit():
        return ParentReport(None)
    _stop_with_caller(int(caller))
    return ParentReport(Path(path))


def _stop_with_caller(caller: int) -> None:
    """Have this process get SIGTERM when its caller dies, which is possible on Linux only.

    Asked for here and not between fork and exec, as other children have it: the caller may have imported jax, whose
    threads make a fork that runs Python dangerous.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # It died before it was asked for.
        if os.getppid() != caller:
            os._exit(128 + signal.SIGTERM)


def _describe_member(member: SweepMember, result: MemberResult | None) -> ReportedRun:
    """Return what a caller is told of one run of a sweep; None: it has not ended."""
    path = str(member.run_dir.path.absolute())
    if result is None or result.state not in ("finished", "stopped", "failed", "in use"):
        return ReportedRun(path, member.name)
    ending: Ending = "failed"
    code = result.code
    if result.state == "finished":
        is_evaluation = member.config.train.steps == 0
        ending, code = "evaluated" if is_evaluation else "finished", 0
    elif result.state == "stopped":
        ending, code = "preempted", STOPPED
    elif result.state == "in use":
        code = RefusedError.exit_code
    elif code == DivergedError.exit_code:
        ending = "diverged"
    status = member.read_status()
    score = None if ending == "evaluated" else status.get("score")
    return ReportedRun(path, member.name, ending, status.get("step", 0), score, code, result.why)
