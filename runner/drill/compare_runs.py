"""Compare two runs of one configuration: every array, the position of the data, every line of metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from runner.checkpoint import arrays
from runner.checkpoint.record import STATE, list_records, read_progress
from runner.checkpoint.seal import find_problem
from runner.errors import RefusedError
from runner.files import parse_nonfinite
from runner.inspect.diff_checkpoints import ArrayComparison, compare_arrays, compare_progress
from runner.inspect.lookup import Checkpoint
from runner.rundir.layout import RunDir

# The parts of a train state that are weights; `weights` are those of a program of the user's own.
WEIGHT_PARTS = ("params", "weights")
# What belongs to the outcome of a run in status.json; the rest says when and where.
RESULT_KEYS = ("state", "step", "score", "best", "stopped_early")


@dataclass(frozen=True)
class LineDifference:
    """The first line of metrics.jsonl that is not the same in both runs.

    Attributes:
        step: the step it is about.
        split: the data it was measured on, `train` or the name of an evaluation.
        wrong: `differs`, `is missing`, `is there twice` or `was not expected`, of the second run.
        keys: the values in it that differ.
    """

    step: int
    split: str
    wrong: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunComparison:
    """How a second run compares with the first.

    Attributes:
        step: the step of the last checkpoint.
        arrays: how the arrays of that checkpoint compare; None where neither run saved anything.
        num_bytes: the size of those arrays.
        progress: both values of each key that differs, of what a checkpoint holds beside the state.
        line: the first line of the log that differs.
        num_lines: how many lines the log of the first run has.
        result: both values of each key of status.json that differs and belongs to the outcome.
        kept: the steps of the checkpoints that each run still has.
    """

    step: int
    arrays: ArrayComparison | None
    num_bytes: int
    progress: dict[str, object]
    line: LineDifference | None
    num_lines: int
    result: dict[str, object]
    kept: tuple[list[int], list[int]]

    @property
    def identical(self) -> bool:
        """True if every bit is equal. Which older checkpoints are kept is not asked: rules may look at a clock."""
        return not (self.line or self.progress or self.result) and (self.arrays is None or self.arrays.equal)

    @property
    def differing(self) -> list[str]:
        """The arrays that are not the same, in the order of their names."""
        if self.arrays is None:
            return []
        found = self.arrays
        return sorted([*found.only_in_a, *found.only_in_b, *found.changed, *found.differing])

    @property
    def num_arrays(self) -> int:
        """The number of arrays that were compared."""
        return self.arrays.num_equal + len(self.differing) if self.arrays else 0


def compare_runs(first: RunDir, second: RunDir) -> RunComparison:
    """Return how two runs that have ended compare.

    Raises:
        RefusedError: a last checkpoint is not there, or not good.
    """
    kept_first, kept_second = _kept_steps(first), _kept_steps(second)
    status_first, status_second = first.read_status(), second.read_status()
    result: dict[str, object] = {}
    for key in RESULT_KEYS:
        if status_first.get(key) != status_second.get(key):
            result[key] = {"a": status_first.get(key), "b": status_second.get(key)}
    step = max(kept_first + kept_second, default=0)
    found, progress, num_bytes = None, {}, 0
    if step:
        a, b = _good_checkpoint(first, step), _good_checkpoint(second, step)
        found = compare_arrays(a, b)
        progress = compare_progress(read_progress(a.directory), read_progress(b.directory))
        num_bytes = sum(leaf.num_bytes for leaf in arrays.read_leaf_specs(a.directory / STATE).values())
    lines = _read_lines(first.metrics)
    return RunComparison(
        step=step,
        arrays=found,
        num_bytes=num_bytes,
        progress=progress,
        line=find_first_difference(lines, _read_lines(second.metrics)),
        num_lines=len(lines),
        result=result,
        kept=(kept_first, kept_second),
    )


def find_first_difference(a: Sequence[bytes], b: Sequence[bytes]) -> LineDifference | None:
    """Return the first line of `b` that is not the one of `a`, byte by byte; None where all are."""
    if list(a) == list(b):
        return None
    expected, found = [_step_and_split(line) for line in a], [_step_and_split(line) for line in b]
    # A line too many or too few shifts all that follow, so those are looked for first: they say more than a difference.
    if twice := [key for key, count in Counter(found).items() if count > 1]:
        return LineDifference(*twice[0], "is there twice")
    if missing := [key for key in expected if key not in set(found)]:
        return LineDifference(*missing[0], "is missing")
    for before, after in zip_longest(a, b):
        if before != after:
            if before is None or _step_and_split(before) != _step_and_split(after):
                return LineDifference(*_step_and_split(after), "was not expected")
            old, new = json.loads(before), json.loads(after)
            # Compared as JSON, since a NaN is not equal to itself.
            keys = tuple(key for key in {**old, **new} if json.dumps(old.get(key)) != json.dumps(new.get(key)))
            return LineDifference(*_step_and_split(after), "differs", keys)
    raise AssertionError("equal line by line, and not equal")


def measure_drift(first: RunDir, second: RunDir) -> float:
    """Return how far the weights of two runs are apart at their last common checkpoint: the relative norm."""
    steps = sorted(set(_kept_steps(first)) & set(_kept_steps(second)))
    states = [_good_checkpoint(run, steps[-1]).directory / STATE for run in (first, second)]
    names = [name for name in arrays.read_leaf_specs(states[0]) if name.split(".")[0] in WEIGHT_PARTS]
    one, other = (arrays.read_leaves(state, names) for state in states)
    apart = sum(float(np.square(np.abs(_widen(one[name]) - _widen(other[name]))).sum()) for name in names)
    size = sum(float(np.square(np.abs(_widen(one[name]))).sum()) for name in names)
    return math.sqrt(apart / size) if size else math.sqrt(apart)


def _widen(values: np.ndarray) -> np.ndarray:
    """Return values in a type in which differences of them can be squared."""
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def read_loss_curves(run_dir: RunDir) -> dict[str, dict[int, float]]:
    """Return the loss at each logged step, by split."""
    curves: dict[str, dict[int, float]] = {}
    for line in _read_lines(run_dir.metrics):
        values = json.loads(line)
        if "loss" in values:
            curves.setdefault(values["split"], {})[values["step"]] = parse_nonfinite(values["loss"])
    return curves


def _kept_steps(run_dir: RunDir) -> list[int]:
    return [record.step for record in list_records(run_dir.checkpoints) if not record.mark]


def _good_checkpoint(run_dir: RunDir, step: int) -> Checkpoint:
    checkpoint = Checkpoint(run_dir, step)
    if problem := find_problem(checkpoint.directory):
        raise RefusedError(f"{checkpoint}: {problem}")
    return checkpoint


def _read_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def _step_and_split(line: bytes) -> tuple[int, str]:
    values = json.loads(line)
    return values["step"], values["split"]
