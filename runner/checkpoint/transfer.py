"""The weights of one run as the beginning of another: strict, or as much as fits, and said leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runner.checkpoint import arrays
from runner.checkpoint.arrays import LeafSpec
from runner.checkpoint.record import STATE
from runner.checkpoint.seal import find_problem
from runner.checkpoint.store import describe_leaf, name_leaves
from runner.errors import RefusedError
from runner.text import display_path

WEIGHTS = ("params", "extra")  # what a model knows: trained variables, and those that last beside them


@dataclass
class TransferReport:
    """What came from the other run and what did not, by name."""

    taken: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # in this model only: they keep their fresh values
    unexpected: dict[str, str] = field(default_factory=dict)  # in the other run only: they are left there
    reshaped: dict[str, str] = field(default_factory=dict)  # in both, but not alike

    @property
    def exact(self) -> bool:
        """Whether every weight of one is a weight of the other."""
        return not (self.missing or self.unexpected or self.reshaped)

    def lines(self) -> list[str]:
        """For a person: a line for each kind of difference."""
        kinds = {"missing there, fresh here": self.missing, "unexpected, left there": self.unexpected}
        kinds["reshaped"] = self.reshaped
        return [
            f"  {kind}: {', '.join(f'{name} {what}' for name, what in found.items())}"
            for kind, found in kinds.items()
            if found
        ]


def transfer_weights(
    state: dict[str, Any], checkpoint: Path, *, partial: bool, stacked: Callable[[str], bool]
) -> tuple[dict[str, Any], TransferReport]:
    """A fresh state with the weights of a checkpoint, and what differs. Optimizer, random streams and step stay fresh.

    Strict, every weight must have its equal: RefusedError names the first that has none. With `partial` a weight of
    another type is cast, layers that are stacked in one array (`stacked` says which) are taken as far as both have
    them, and whatever else does not fit keeps its fresh value. The bytes are proven first (RefusedError).
    """
    if problem := find_problem(checkpoint):
        raise RefusedError(
            f"init_from: {display_path(checkpoint)} is not good: {problem}; choose another step with @STEP"
        )
    there = {name: leaf for name, leaf in arrays.read_leaf_specs(checkpoint / STATE).items() if _is_weight(name)}
    fresh = {name: leaf for name, leaf in name_leaves(state).items() if _is_weight(name)}
    here = {name: describe_leaf(leaf) for name, leaf in fresh.items()}
    report = TransferReport(
        missing={name: str(leaf) for name, leaf in here.items() if name not in there},
        unexpected={name: str(leaf) for name, leaf in there.items() if name not in here},
    )
    plans = {name: _overlap(there[name], here[name], stacked=stacked(name)) for name in here.keys() & there.keys()}
    for name in sorted(plans):
        if there[name] == here[name]:
            report.taken.append(name)
        else:
            fate = _fate(plans[name], here[name]) if partial else ""
            report.reshaped[name] = f"{there[name]} there, {here[name]} here{fate}"
    if not partial and not report.exact:
        raise RefusedError(_refusal(checkpoint, report))
    values = arrays.read_leaves(checkpoint / STATE, [name for name, plan in plans.items() if plan is not None])
    return _replaced(state, fresh, values, plans), report


def _overlap(there: LeafSpec, here: LeafSpec, *, stacked: bool) -> int | None:
    """How many entries of the leading dimension are taken; -1 for the whole array, None for nothing."""
    if there.generator or here.generator:
        return None
    if there.shape == here.shape:
        return -1
    if stacked and there.shape[1:] == here.shape[1:]:
        return min(there.shape[0], here.shape[0])
    return None


def _fate(plan: int | None, here: LeafSpec) -> str:
    if plan is None:
        return " (fresh)"
    return " (cast)" if plan < 0 else f" (the first {plan} of {here.shape[0]} layers taken)"


def _replaced(
    state: dict[str, Any], fresh: Mapping[str, jax.Array], values: Mapping[str, Any], plans: Mapping[str, int | None]
) -> dict[str, Any]:
    names = list(name_leaves(state))
    leaves = dict(zip(names, jax.tree.leaves(state), strict=True))
    for name, value in values.items():
        old, count = fresh[name], plans[name]
        new = np.asarray(value).astype(old.dtype)
        if count is not None and count >= 0:
            new = np.concatenate([new[:count], np.asarray(old)[count:]])
        leaves[name] = jax.device_put(new, old.sharding)
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in names])


def _is_weight(name: str) -> bool:
    return name.partition(".")[0] in WEIGHTS


def _refusal(checkpoint: Path, report: TransferReport) -> str:
    differing = {**report.missing, **report.unexpected, **report.reshaped}
    name = sorted(differing)[0]
    kind = "missing there" if name in report.missing else "unexpected" if name in report.unexpected else "reshaped"
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return (
        f"init_from: the weights of {display_path(checkpoint)} do not fit this model: {name} is {kind}: "
        f"{differing[name]}{more}; choose the model they were trained with, or take those that fit: "
        "init_from.partial=true"
    )
