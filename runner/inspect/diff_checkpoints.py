"""`diff`: what differs between two checkpoints: configuration, arrays bit for bit, progress. One array is read at a
time: two checkpoints may be larger than memory."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runner.checkpoint import arrays
from runner.checkpoint.arrays import LeafSpec
from runner.checkpoint.record import STATE, read_progress
from runner.checkpoint.seal import find_problem
from runner.config.identity import Drift, find_drift
from runner.errors import RefusedError
from runner.inspect.lookup import Checkpoint, find_attempt, find_checkpoint, read_config_document
from runner.text import format_count
from runner.values import Answer, Say

SHOWN = 8  # names of each kind that are listed for a person; --json has all

Largest = tuple[str, float | int]  # the array where two differ most, and by how much


@dataclass
class ArrayComparison:
    """How the arrays of two checkpoints compare."""

    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    changed: dict[str, tuple[LeafSpec, LeafSpec]] = field(default_factory=dict)  # another shape or type
    differing: list[str] = field(default_factory=list)  # alike, with other bits in it
    largest: dict[str, Largest] = field(default_factory=dict)  # by kind of number
    num_equal: int = 0

    @property
    def equal(self) -> bool:
        """Whether every bit is."""
        return not (self.only_in_a or self.only_in_b or self.changed or self.differing)


def arguments(parser: ArgumentParser) -> None:
    """Two checkpoints."""
    parser.add_argument("a", metavar="RUN@A")
    parser.add_argument("b", metavar="RUN@B", help="of the same run or of another")


def run(arguments: Namespace, say: Say) -> Answer:
    """Compare. Exit code 0 where arrays and progress are equal bit for bit, 1 where not; the configuration is told."""
    a, b = find_checkpoint(arguments.a), find_checkpoint(arguments.b)
    problems = {str(each): problem for each in (a, b) if (problem := find_problem(each.directory))}
    for name, problem in problems.items():
        say(f"warning: {name} is not good: {problem}")
    same_run = a.run.path.resolve() == b.run.path.resolve()
    drifts = find_drift(*(read_config_document(each.run, find_attempt(each).get("drift", ())) for each in (a, b)))
    try:
        found = compare_arrays(a, b)
        progress = compare_progress(read_progress(a.directory), read_progress(b.directory))
    except (OSError, ValueError) as error:
        problem = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise RefusedError(f"cannot be compared: {problem or str(error).splitlines()[0]}") from None
    for line in [*_configuration(drifts, same_run=same_run), *_arrays(found), *_progress(progress)]:
        say(line)
    equal = found.equal and not progress
    document = {"a": str(a), "b": str(b), "equal": equal, "same_run": same_run, "problems": problems}
    document["configuration"] = [{"key": change.key, "a": change.old, "b": change.new} for change in drifts]
    return Answer({**document, "arrays": _plain(found), "progress": progress}, 0 if equal else 1)


def compare_arrays(a: Checkpoint, b: Checkpoint) -> ArrayComparison:
    """Every array of both, in the order of their names."""
    first, second = a.directory / STATE, b.directory / STATE
    here, there = arrays.read_leaf_specs(first), arrays.read_leaf_specs(second)
    found = ArrayComparison(sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys()))
    for name in sorted(here.keys() & there.keys()):
        if here[name] != there[name]:
            found.changed[name] = (here[name], there[name])
            continue
        mine, theirs = (np.asarray(arrays.read_leaves(state, [name])[name]) for state in (first, second))
        if mine.tobytes() == theirs.tobytes():
            found.num_equal += 1
            continue
        found.differing.append(name)
        if not here[name].generator:  # how far one random key is from another means nothing
            kind, most = _distance(mine, theirs)
            if kind not in found.largest or most > found.largest[kind][1]:
                found.largest[kind] = (name, most)
    return found


def _distance(a: np.ndarray, b: np.ndarray) -> tuple[str, float | int]:
    """The largest absolute difference: of integers exactly, of anything else in double precision.

    A NaN where the other has a number is infinitely far; bits that are equal are not, whatever they are.
    """
    if a.dtype.kind in "iub":
        apart = np.maximum(a, b).astype(np.uint64) - np.minimum(a, b).astype(np.uint64)  # modulo 2^64, so exact
        return "integer", int(apart.max())
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a.astype(wide) - b.astype(wide))
    words = np.dtype((np.void, a.dtype.itemsize))
    unequal = np.ascontiguousarray(a).reshape(-1).view(words) != np.ascontiguousarray(b).reshape(-1).view(words)
    return "float", float(np.nan_to_num(apart.reshape(-1)[unequal], nan=np.inf, posinf=np.inf).max())


def compare_progress(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Both values of each key of two checkpoints' progress that are not the same."""
    keys = sorted(a.keys() | b.keys())
    return {key: {"a": a.get(key), "b": b.get(key)} for key in keys if a.get(key) != b.get(key)}


def _configuration(drifts: Sequence[Drift], *, same_run: bool) -> list[str]:
    if not drifts:
        return ["configuration: same run" if same_run else "configuration: the same"]
    return [f"configuration: {format_count(len(drifts), 'key')} differ", *(f"  {change}" for change in drifts)]


def _arrays(found: ArrayComparison) -> list[str]:
    if found.equal:
        return [f"arrays: all {found.num_equal} are equal, bit for bit"]
    lines = [f"arrays: {len(found.differing)} differ, {found.num_equal} are equal"]
    lines += _listed("only in A", found.only_in_a) + _listed("only in B", found.only_in_b)
    lines += _listed("another shape or type", [f"{name} {a} → {b}" for name, (a, b) in found.changed.items()])
    if found.differing:
        lines.append(f"  the first: {found.differing[0]}")
    return lines + [
        f"  largest {kind} difference: {most:.6g} in {name}" for kind, (name, most) in found.largest.items()
    ]


def _listed(what: str, names: Sequence[str]) -> list[str]:
    more = [f"    … and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return [f"  {what}: {len(names)}", *(f"    {name}" for name in names[:SHOWN]), *more] if names else []


def _progress(progress: Mapping[str, Any]) -> list[str]:
    if not progress:
        return ["progress: equal"]
    return [
        "progress:",
        *(f"  {key}: {json.dumps(both['a'])} → {json.dumps(both['b'])}" for key, both in progress.items()),
    ]


def _plain(found: ArrayComparison) -> dict[str, Any]:
    return {
        "only_in_a": found.only_in_a,
        "only_in_b": found.only_in_b,
        "changed": {name: {"a": str(a), "b": str(b)} for name, (a, b) in found.changed.items()},
        "num_equal": found.num_equal,
        "num_differing": len(found.differing),
        "differing": found.differing,
        "first_differing": found.differing[0] if found.differing else None,
        "largest": {kind: {"name": name, "difference": most} for kind, (name, most) in found.largest.items()},
    }
