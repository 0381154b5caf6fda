"""`diff`: tell what differs between two checkpoints: configuration, arrays bit for bit, progress."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runner.checkpoint.arrays import LeafSpec, read_leaves
from runner.checkpoint.frozen_base import list_arrays_with_base
from runner.checkpoint.record import read_progress
from runner.checkpoint.seal import find_odd_file, find_problem
from runner.config.identity import Drift, find_drift
from runner.errors import RefusedError
from runner.inspect.lookup import Checkpoint, find_attempt, find_checkpoint, read_config_document
from runner.text import format_count, shorten
from runner.types import JsonObject
from runner.values import Say, VerbResult

# Names of each kind that are listed for a person; --json has all.
MOST_NAMES = 8


@dataclass
class ArrayComparison:
    """How the arrays of two checkpoints A and B compare.

    Attributes:
        only_in_a: names of arrays that B has not.
        only_in_b: names of arrays that A has not.
        changed: name → shape and type in A and in B, where these differ.
        differing: names of arrays of one shape and type, with other bits in them.
        largest: kind of number (`integer`, `float`) → the array where A and B differ most, and by how much.
        num_equal: how many arrays are equal bit for bit.
    """

    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    changed: dict[str, tuple[LeafSpec, LeafSpec]] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)
    largest: dict[str, tuple[str, float | int]] = field(default_factory=dict)
    num_equal: int = 0

    @property
    def equal(self) -> bool:
        """Return whether both have the same arrays with the same bits."""
        return not (self.only_in_a or self.only_in_b or self.changed or self.differing)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the two checkpoints."""
    parser.add_argument("a", metavar="RUN@A", help="a checkpoint")
    parser.add_argument("b", metavar="RUN@B", help="another one, of the same run or of another")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Say what differs. The exit code is 0 where arrays and progress are equal bit for bit, else 1.

    A configuration that differs is told, and does not count. Raises RefusedError where one cannot be read.
    """
    a, b = find_checkpoint(arguments.a), find_checkpoint(arguments.b)
    # A checkpoint that is not good is compared all the same: what is wrong with it may be what is asked.
    problems = {str(each): problem for each in (a, b) if (problem := find_problem(each.directory))}
    for name, problem in problems.items():
        say(f"warning: {name} is not good: {problem}")
    for each in (a, b):
        if odd := find_odd_file(each.directory):
            raise RefusedError(f"cannot be compared: {each} is not good: {odd}")
    is_same_run = str(a.run_dir) == str(b.run_dir)
    changes = find_drift(*(read_config_document(each.run_dir, find_attempt(each).get("drift", ())) for each in (a, b)))
    try:
        found = compare_arrays(a, b)
        progress = compare_progress(read_progress(a.directory), read_progress(b.directory))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, RefusedError) as error:
        problem = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedError(f"cannot be compared: {problem or shorten(said, 300)}") from None
    lines = _format_config_changes(changes, is_same_run=is_same_run)
    lines += _format_comparison(found) + _format_progress_changes(progress)
    for line in lines:
        say(line)
    is_equal = found.equal and not progress
    document = {
        "a": str(a),
        "b": str(b),
        "equal": is_equal,
        "same_run": is_same_run,
        "problems": problems,
        "configuration": [{"key": change.key, "a": change.old, "b": change.new} for change in changes],
        "arrays": _describe_comparison(found),
        "progress": progress,
    }
    return VerbResult(document, 0 if is_equal else 1)


def compare_arrays(a: Checkpoint, b: Checkpoint) -> ArrayComparison:
    """Compare every array of two checkpoints, in the order of their names."""
    trees_a, trees_b = (list_arrays_with_base(each.directory) for each in (a, b))
    specs_a, specs_b = ({name: spec for name, (_, spec) in trees.items()} for trees in (trees_a, trees_b))
    found = ArrayComparison(sorted(specs_a.keys() - specs_b.keys()), sorted(specs_b.keys() - specs_a.keys()))
    for name in sorted(specs_a.keys() & specs_b.keys()):
        if specs_a[name] != specs_b[name]:
            found.changed[name] = (specs_a[name], specs_b[name])
            continue
        # One array at a time: two checkpoints may be larger than memory.
        array_a, array_b = (np.asarray(read_leaves(trees[name][0], [name])[name]) for trees in (trees_a, trees_b))
        if array_a.tobytes() == array_b.tobytes():
            found.num_equal += 1
            continue
        found.differing.append(name)
        # The words of a random generator's key are no numbers: how far apart two keys are means nothing.
        if not specs_a[name].generator:
            kind, distance = _measure_distance(array_a, array_b)
            if kind not in found.largest or distance > found.largest[kind][1]:
                found.largest[kind] = (name, distance)
    return found


def _measure_distance(a: np.ndarray, b: np.ndarray) -> tuple[str, float | int]:
    """Return the kind of number and the largest absolute difference between two arrays that are not equal.

    Of integers it is exact, of anything else in double precision. A NaN where the other has a number is infinitely
    far from it.
    """
    if a.dtype.kind in "iub":
        # The difference of two int64 may not fit one. As uint64 it is exact, because both wrap around modulo 2^64.
        distances = np.maximum(a, b).astype(np.uint64) - np.minimum(a, b).astype(np.uint64)
        return "integer", int(distances.max())
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        distances = np.abs(a.astype(wide) - b.astype(wide))
    # Only where bits differ: NaN - NaN is NaN, and would be infinitely far where both hold the same one.
    words = np.dtype((np.void, a.dtype.itemsize))
    is_unequal = np.ascontiguousarray(a).reshape(-1).view(words) != np.ascontiguousarray(b).reshape(-1).view(words)
    return "float", float(np.nan_to_num(distances.reshape(-1)[is_unequal], nan=np.inf, posinf=np.inf).max())


def compare_progress(a: JsonObject, b: JsonObject) -> JsonObject:
    """Return both values, `{"a": …, "b": …}`, of each key of two checkpoints' progress that are not the same."""
    keys = sorted(a.keys() | b.keys())
    return {key: {"a": a.get(key), "b": b.get(key)} for key in keys if a.get(key) != b.get(key)}


def _format_config_changes(changes: Sequence[Drift], *, is_same_run: bool) -> list[str]:
    if not changes:
        return ["configuration: same run" if is_same_run else "configuration: the same"]
    return [
        f"configuration: {format_count(len(changes), 'key')} differ",
        *(f"  {shorten(str(change), 600)}" for change in changes),
    ]


def _format_comparison(found: ArrayComparison) -> list[str]:
    if found.equal:
        return [f"arrays: all {found.num_equal} are equal, bit for bit"]
    lines = [f"arrays: {len(found.differing)} differ, {found.num_equal} are equal"]
    lines += _format_names("only in A", found.only_in_a)
    lines += _format_names("only in B", found.only_in_b)
    lines += _format_names("another shape or type", [f"{name} {a} → {b}" for name, (a, b) in found.changed.items()])
    if found.differing:
        lines.append(f"  the first: {found.differing[0]}")
    for kind, (name, distance) in found.largest.items():
        lines.append(f"  largest {kind} difference: {distance:.6g} in {name}")
    return lines


def _format_names(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    lines = [f"  {what}: {len(names)}", *(f"    {name}" for name in names[:MOST_NAMES])]
    if len(names) > MOST_NAMES:
        lines.append(f"    … and {len(names) - MOST_NAMES} more")
    return lines


def _format_progress_changes(progress: JsonObject) -> list[str]:
    if not progress:
        return ["progress: equal"]
    # A value may be as long as somebody likes; --json has all of it.
    changes = (
        f"  {shorten(key, 100)}: {shorten(json.dumps(both['a']), 300)} → {shorten(json.dumps(both['b']), 300)}"
        for key, both in progress.items()
    )
    return ["progress:", *changes]


def _describe_comparison(found: ArrayComparison) -> JsonObject:
    return {
        "only_in_a": found.only_in_a,
        "only_in_b": found.only_in_b,
        "changed": {name: {"a": str(a), "b": str(b)} for name, (a, b) in found.changed.items()},
        "num_equal": found.num_equal,
        "num_differing": len(found.differing),
        "differing": found.differing,
        "first_differing": found.differing[0] if found.differing else None,
        "largest": {kind: {"name": name, "difference": distance} for kind, (name, distance) in found.largest.items()},
    }
