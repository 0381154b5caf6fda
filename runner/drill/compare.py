"""What differs between two runs of one configuration: every array, the position of the data, every line of the log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from runner.checkpoint import arrays
from runner.checkpoint.record import STATE, progress_of, records_in
from runner.checkpoint.seal import problem_of
from runner.errors import RefusedError
from runner.inspect.diff import Arrays, compared, differing_progress
from runner.inspect.lookup import Checkpoint
from runner.rundir.layout import Run

# What belongs to the outcome of a run in status.json; the rest says when and where.
RESULT = ("state", "step", "score", "best")


@dataclass(frozen=True)
class Line:
    """The first line of metrics.jsonl that is not the same: whose, and what is wrong with it."""

    step: int
    split: str
    wrong: str  # "differs", "is missing", "is there twice", "was not expected"
    keys: tuple[str, ...] = ()  # what differs in it


@dataclass(frozen=True)
class Evidence:
    """How a second run compares with the first, of which the metrics have `num_lines` lines."""

    step: int  # of the last checkpoint
    found: Arrays | None  # None where neither run saved anything
    num_bytes: int
    progress: dict[str, Any]
    line: Line | None
    num_lines: int
    result: dict[str, Any]
    kept: tuple[list[int], list[int]]

    @property
    def identical(self) -> bool:
        """Whether every bit is. Which older checkpoints are kept is not asked: rules may look at a clock."""
        return not (self.line or self.progress or self.result) and (self.found is None or self.found.equal)

    @property
    def differing(self) -> list[str]:
        """Arrays that are not the same, in the order of their names."""
        found = self.found
        return sorted([*found.only_in_a, *found.only_in_b, *found.changed, *found.differing]) if found else []


def evidence(first: Run, second: Run) -> Evidence:
    """Compare two runs that have ended. Raises RefusedError where a last checkpoint is not there, or not good."""
    kept = ([record.step for record in records_in(run.checkpoints) if not record.mark] for run in (first, second))
    here, there = kept
    before, after = first.read_status(), second.read_status()
    result = {key: {"a": before.get(key), "b": after.get(key)} for key in RESULT if before.get(key) != after.get(key)}
    step = max([*here, *there], default=0)
    found, progress, num_bytes = None, {}, 0
    if step:
        a, b = (_proven(Checkpoint(run, step)) for run in (first, second))
        found = compared(a, b)
        progress = differing_progress(progress_of(a.directory), progress_of(b.directory))
        num_bytes = sum(leaf.num_bytes for leaf in arrays.leaves(a.directory / STATE).values())
    lines = _lines(first.metrics)
    line = first_difference(lines, _lines(second.metrics))
    return Evidence(step, found, num_bytes, progress, line, len(lines), result, (here, there))


def first_difference(a: Sequence[bytes], b: Sequence[bytes]) -> Line | None:
    """The first line of `b` that is not the one of `a`; None where all are, byte by byte."""
    if list(a) == list(b):
        return None
    mine, theirs = [_key(line) for line in a], [_key(line) for line in b]
    if twice := [key for key, count in Counter(theirs).items() if count > 1]:
        return Line(*twice[0], "is there twice")
    if missing := [key for key in mine if key not in set(theirs)]:
        return Line(*missing[0], "is missing")
    for before, after in zip_longest(a, b):
        if before != after:
            if before is None or _key(before) != _key(after):
                return Line(*_key(after), "was not expected")
            old, new = json.loads(before), json.loads(after)
            keys = tuple(key for key in {**old, **new} if json.dumps(old.get(key)) != json.dumps(new.get(key)))
            return Line(*_key(after), "differs", keys)
    raise AssertionError("equal line by line, and not equal")


def curves(run: Run) -> dict[str, dict[int, float]]:
    """The loss at each logged step, by split."""
    found: dict[str, dict[int, float]] = {}
    for line in _lines(run.metrics):
        values = json.loads(line)
        if "loss" in values:
            found.setdefault(values["split"], {})[values["step"]] = values["loss"]
    return found


def _proven(checkpoint: Checkpoint) -> Checkpoint:
    if problem := problem_of(checkpoint.directory):
        raise RefusedError(f"{checkpoint}: {problem}")
    return checkpoint


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _key(line: bytes) -> tuple[int, str]:
    values = json.loads(line)
    return values["step"], values["split"]
