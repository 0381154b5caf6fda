"""A run that fails at the same step again and again: tried a few times, then from an older checkpoint, then no more.

Without this a supervisor that restarts what crashed would burn a machine for a week. What counts is on disk, in
attempts.jsonl; changed code starts a new count. No jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from runner.errors import GaveUpError
from runner.files import format_json, replace_file
from runner.rundir.layout import RunDir
from runner.types import JsonObject

NextMove = Literal["try", "step back", "give up"]


@dataclass(frozen=True)
class RepeatedFailure:
    """Describe a failure that the last attempts have in common.

    Attributes:
        step: the last step that each of them completed.
        count: how many there were in a row.
        why: what the newest of them said.
        stepped_back: whether one of them began at an older checkpoint than it had to.
        trained: whether each of them went on from a checkpoint, and failed after that.
    """

    step: int
    count: int
    why: str
    stepped_back: bool
    trained: bool = True

    def move(self, allowed: int) -> NextMove:
        """Return what to do about it where `allowed` failures in a row are nothing special."""
        if self.count > allowed:
            return "give up"
        # Once, and last: what makes it fail may lie in the newest checkpoint, and the one before it costs more steps.
        # Not where it was never restored: what failed before had nothing to do with its state.
        is_due = self.count == allowed and self.trained and not self.stepped_back
        return "step back" if is_due else "try"


def find_repeated_failure(lines: Sequence[JsonObject], code: str) -> RepeatedFailure | None:
    """Return the failure that the last attempts have in common; None where there is none.

    Args:
        lines: attempts.jsonl, oldest first.
        code: the hash of the code that is to be tried next; a failure of other code does not count.
    """
    failed: list[JsonObject] = []
    stepped_back = False
    for line in reversed(lines):
        # One that was stopped or killed says nothing about the step, nor does a machine that was in trouble.
        if line["ending"] in ("preempted", "killed") or "machine_trouble" in line:
            stepped_back |= "stepped_back" in line
            continue
        is_alike = line["ending"] == "failed" and line.get("code") == code
        if not is_alike or (failed and _find_place(line) != _find_place(failed[0])):
            break
        stepped_back |= "stepped_back" in line
        failed.append(line)
    if not failed:
        return None
    # A process that has gone says nothing about the state that it went on from.
    trained = all("from_step" in line and "lost_process" not in line for line in failed)
    return RepeatedFailure(_find_place(failed[0])[1], len(failed), failed[0]["why"], stepped_back, trained)


def _find_place(line: JsonObject) -> tuple[str, int]:
    """Return what failures have in common: the step after which they came.

    One of several processes dies, of its memory say, now a step earlier and now one later: there it is the checkpoint
    that was gone on from, for no attempt came to a newer one.
    """
    return ("lost", line.get("from_step", 0)) if "lost_process" in line else ("failed", line["to_step"])


def give_up(run_dir: RunDir, failure: RepeatedFailure) -> NoReturn:
    """Write into status.json that the run was given up, for supervisors, and raise GaveUpError."""
    replace_file(run_dir.status, format_json({**run_dir.read_status(), "gave_up": True}, indent=1) + "\n")
    back = ", the last time from an older checkpoint" if failure.stepped_back else ""
    raise GaveUpError(
        f"{run_dir}: training failed {failure.count} times in a row after step {failure.step}{back} ({failure.why}): "
        "not tried again. The traceback is in logs/run.log; changed code starts a new count; "
        f"train.max_crashes={failure.count + 1} tries once more"
    )
