"""What a run that was disturbed is compared with: what the undisturbed one has made in the end. No jax."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tests.laws.faults import LAST

COMPARED = ("logs/metrics.jsonl", "config.yaml", "data.json")


@dataclass(frozen=True)
class Ending:
    """What a finished run has made.

    Attributes:
        digest: of the state of its last step, names and values.
        best: the step that `checkpoints/best` leads to.
        files: the files that hold no clock, byte for byte.
    """

    digest: str
    best: str
    files: dict[str, bytes]

    def find_difference(self, other: Ending) -> str | None:
        """Return what is not the same, in a few words; None where everything is."""
        if self.digest != other.digest:
            return "the state at the end differs"
        if self.best != other.best:
            return f"best leads to {self.best} instead of {other.best}"
        return next((f"{name} differs" for name in COMPARED if self.files[name] != other.files[name]), None)


def find_run(cwd: Path) -> Path:
    """Return the only run below a working directory."""
    (config,) = cwd.glob("outputs/*/*/config.yaml")
    return config.parent


def read_ending(run: Path) -> Ending:
    """Return what a finished run has made. Raises OSError or ValueError where something is missing or damaged."""
    from runner.checkpoint.arrays import compute_logical_digest
    from runner.checkpoint.record import read_progress

    last = run / f"checkpoints/{LAST}"
    files = {name: (run / name).read_bytes() for name in COMPARED}
    return Ending(compute_logical_digest(last / "state", read_progress(last)), os.readlink(last.parent / "best"), files)


def find_wrong_end(run: Path, expected: Ending) -> str | None:
    """Return what is wrong with a run that should be finished, in a few words; None where nothing is."""
    try:
        difference = read_ending(run).find_difference(expected)
    except (OSError, ValueError) as error:
        return f"its end cannot be read: {error}"
    numbers = read_attempt_numbers(run)
    if difference is None and numbers != sorted(set(numbers)):
        return f"attempts are numbered {numbers}"
    return difference


def read_attempt_numbers(run: Path) -> list[int]:
    """Return the number of each attempt that has a line, in their order; a line that was torn has none."""
    numbers = []
    for line in (run / "attempts.jsonl").read_bytes().splitlines():
        try:
            numbers.append(int(json.loads(line)["attempt"]))
        except (ValueError, KeyError, TypeError):
            continue
    return numbers
