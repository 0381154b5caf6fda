"""The same step failing again and again: tried a few times, once more from an older checkpoint, then not any more.

Without this a supervisor that restarts what crashed would burn a machine for a week. What counts is on disk, in
attempts.jsonl; changed code starts a new count. No jax.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runner.errors import GaveUpError
from runner.files import replace_file
from runner.rundir.layout import RunDir

Move = Literal["try", "step back", "give up"]


@dataclass(frozen=True)
class RepeatedFailure:
    """The step that attempts failed at, the last ones all alike; how often, why, and whether one began further back."""

    step: int
    count: int
    why: str
    stepped_back: bool

    def move(self, allowed: int) -> Move:
        """What to do about it where `allowed` failures in a row are nothing special."""
        if self.count > allowed:
            return "give up"
        return "step back" if self.count == allowed and not self.stepped_back else "try"


def find_repeated_failure(lines: Sequence[Mapping[str, Any]], code: str) -> RepeatedFailure | None:
    """What the last attempts of this code have in common; None where the last to fail was of another code.

    Attempts that were stopped or killed between say nothing about the step, and are passed over.
    """
    failed: list[Mapping[str, Any]] = []
    stepped_back = False
    for line in reversed(lines):
        if line["ending"] in ("preempted", "killed"):
            stepped_back |= "stepped_back" in line
            continue
        if (
            line["ending"] != "failed"
            or line.get("code") != code
            or (failed and line["to_step"] != failed[0]["to_step"])
        ):
            break
        stepped_back |= "stepped_back" in line
        failed.append(line)
    if not failed:
        return None
    return RepeatedFailure(failed[0]["to_step"], len(failed), failed[0]["why"], stepped_back)


def give_up(run: RunDir, again: RepeatedFailure) -> None:
    """Say so in status.json, for supervisors, and raise GaveUpError."""
    replace_file(run.status, json.dumps({**run.read_status(), "gave_up": True}, indent=1) + "\n")
    back = ", the last time from an older checkpoint" if again.stepped_back else ""
    raise GaveUpError(
        f"{run}: training failed {again.count} times in a row after step {again.step}{back} ({again.why}): not tried "
        "again. The traceback is in logs/run.log; changed code starts a new count; "
        f"train.max_crashes={again.count + 1} tries once more"
    )
