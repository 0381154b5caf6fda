"""Begin a run with the weights of another: strictly, or with as much as fits, and say which, leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from runner.checkpoint import arrays
from runner.checkpoint.arrays import LeafSpec
from runner.checkpoint.record import STATE
from runner.checkpoint.seal import find_problem
from runner.checkpoint.store import describe_leaf, name_leaves
from runner.errors import RefusedError
from runner.text import display_path
from runner.types import State

# What a model knows: trained variables, and those that last beside them; of a program of the user's own its weights.
WEIGHTS = ("params", "extra", "weights")

# How much of an array is taken: None for nothing, ALL for the whole, else so many entries of the leading dimension.
TakePlan = int | None
ALL = -1


@dataclass
class TransferReport:
    """Say what came from the other run and what did not.

    Attributes:
        taken: the names of weights that are alike in both.
        missing: by name, what is in this model only and keeps its fresh values.
        unexpected: by name, what is in the other run only and is left there.
        reshaped: by name, what is in both but not alike, and what became of it.
    """

    taken: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Tell whether every weight of one is a weight of the other."""
        return not (self.missing or self.unexpected or self.reshaped)

    def lines(self) -> list[str]:
        """Return a line for each kind of difference, for people."""
        kinds = {
            "missing there, fresh here": self.missing,
            "unexpected, left there": self.unexpected,
            "reshaped": self.reshaped,
        }
        return [
            f"  {kind}: {', '.join(f'{name} {what}' for name, what in found.items())}"
            for kind, found in kinds.items()
            if found
        ]


def transfer_weights(
    state: State,
    checkpoint: Path,
    *,
    partial: bool,
    stacked: Callable[[str], bool],
    whole: Mapping[str, np.ndarray] | None = None,
) -> tuple[State, TransferReport]:
    """Return a fresh state with the weights of a checkpoint, and what differs.

    Optimizer, random streams and step stay fresh. Strictly, every weight must have its equal. With `partial` a weight
    of another type is cast, layers that are stacked in one array are taken as far as both have them, and whatever else
    does not fit keeps its fresh value.

    Args:
        state: a fresh train state.
        checkpoint: the directory of a checkpoint of another run.
        partial: whether weights may differ.
        stacked: tells by name whether the leading dimension of an array counts layers.
        whole: the weights, where the checkpoint has them in parts; None: they are read from it.

    Raises:
        RefusedError: the checkpoint is not what was written, or, strictly, weights differ; the first is named.
    """
    # Proven first: damaged weights would train as well, only worse.
    if problem := find_problem(checkpoint):
        raise RefusedError(
            f"init_from: {display_path(checkpoint)} is not good: {problem}; choose another step with @STEP"
        )
    specs = arrays.read_leaf_specs(checkpoint / STATE) if whole is None else arrays.describe_values(whole)
    there = {name: leaf for name, leaf in specs.items() if _is_weight(name)}
    fresh = {name: leaf for name, leaf in name_leaves(state).items() if _is_weight(name)}
    here = {name: describe_leaf(leaf) for name, leaf in fresh.items()}
    report = TransferReport(
        missing={name: str(leaf) for name, leaf in here.items() if name not in there},
        unexpected={name: str(leaf) for name, leaf in there.items() if name not in here},
    )
    plans = {name: _plan_take(there[name], here[name], stacked=stacked(name)) for name in here.keys() & there.keys()}
    for name in sorted(plans):
        if there[name] == here[name]:
            report.taken.append(name)
        else:
            fate = _describe_fate(plans[name], here[name]) if partial else ""
            report.reshaped[name] = f"{there[name]} there, {here[name]} here{fate}"
    if not partial and not report.exact:
        raise RefusedError(_explain_refusal(checkpoint, report))
    # Only what is taken is read: the moments of an optimizer may be twice the size of the weights.
    taken = [name for name, plan in plans.items() if plan is not None]
    values = arrays.read_leaves(checkpoint / STATE, taken) if whole is None else {name: whole[name] for name in taken}
    return _replace_leaves(state, fresh, values, plans), report


def _plan_take(there: LeafSpec, here: LeafSpec, *, stacked: bool) -> TakePlan:
    """Return how much of an array is taken from the other run."""
    # The words of a random key are no weights, whatever their shape.
    if there.generator or here.generator:
        return None
    if there.shape == here.shape:
        return ALL
    if stacked and there.shape[1:] == here.shape[1:]:
        return min(there.shape[0], here.shape[0])
    return None


def _describe_fate(plan: TakePlan, here: LeafSpec) -> str:
    if plan is None:
        return " (fresh)"
    return " (cast)" if plan == ALL else f" (the first {plan} of {here.shape[0]} layers taken)"


def _replace_leaves(
    state: State, fresh: Mapping[str, jax.Array], values: Mapping[str, np.ndarray], plans: Mapping[str, TakePlan]
) -> State:
    """Return the state with the values that were read, each cast to the type and put in the place of the fresh one."""
    names = list(name_leaves(state))
    leaves = dict(zip(names, jax.tree.leaves(state), strict=True))
    for name, value in values.items():
        old, count = fresh[name], plans[name]
        new = np.asarray(value).astype(old.dtype)
        if count is None or count == ALL:
            leaves[name] = _put_whole(new, old)
        else:
            # Layers that the other run does not have keep their fresh values.
            padded = np.zeros(old.shape, new.dtype)
            padded[:count] = new[:count]
            join = jax.jit(functools.partial(_join_layers, count), out_shardings=old.sharding)
            leaves[name] = join(_put_whole(padded, old), old)
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in names])


def _put_whole(value: np.ndarray, old: jax.Array) -> jax.Array:
    """Return a value that lies where an array of its shape lies; each process has all of the value."""
    # Not `device_put`, which compares it with that of other processes, one array after the other, in any order.
    return jax.make_array_from_callback(value.shape, old.sharding, lambda index: value[index])


def _join_layers(count: int, new: jax.Array, old: jax.Array) -> jax.Array:
    """Return the first layers of one array, and the others of another."""
    return jax.numpy.concatenate([new[:count], old[count:]])


def _is_weight(name: str) -> bool:
    return name.partition(".")[0] in WEIGHTS


def _explain_refusal(checkpoint: Path, report: TransferReport) -> str:
    differing = {**report.missing, **report.unexpected, **report.reshaped}
    name = sorted(differing)[0]
    kind = "missing there" if name in report.missing else "unexpected" if name in report.unexpected else "reshaped"
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return (
        f"init_from: the weights of {display_path(checkpoint)} do not fit this model: {name} is {kind}: "
        f"{differing[name]}{more}; choose the model they were trained with, or take those that fit: "
        "init_from.partial=true"
    )
