"""Begin a run with the weights of another: strictly, or with as much as fits, and say which, leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

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


class WeightSource(Protocol):
    """Arrays by our names, of which any part can be read."""

    @property
    def name(self) -> str:
        """Return how it is called to a person."""
        ...

    @property
    def specs(self) -> Mapping[str, LeafSpec]:
        """Return shape and type of every weight."""
        ...

    def read(self, leaf: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return one part of an array."""
        ...


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of a checkpoint of another run, each read as a whole."""

    path: Path

    @property
    def name(self) -> str:
        """Return how it is called to a person."""
        return display_path(self.path)

    @functools.cached_property
    def specs(self) -> Mapping[str, LeafSpec]:
        """Return shape and type of every weight."""
        return {name: leaf for name, leaf in arrays.read_leaf_specs(self.path / STATE).items() if _is_weight(name)}

    def read(self, leaf: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return one part of an array."""
        return np.asarray(self._read_whole(leaf)[index])

    # Of one array at a time: each device asks for its part.
    @functools.lru_cache(maxsize=1)  # noqa: B019 - it goes with the source
    def _read_whole(self, leaf: str) -> np.ndarray:
        return arrays.read_leaves(self.path / STATE, [leaf])[leaf]


@dataclass(frozen=True)
class HeldWeights:
    """Weights that are in memory, whose parts may come from several places."""

    name: str
    values: Mapping[str, np.ndarray]

    @functools.cached_property
    def specs(self) -> Mapping[str, LeafSpec]:
        """Return shape and type of every weight."""
        return {name: leaf for name, leaf in arrays.describe_values(self.values).items() if _is_weight(name)}

    def read(self, leaf: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return one part of an array."""
        return np.asarray(self.values[leaf][index])


def transfer_weights(
    state: State, checkpoint: Path, *, partial: bool, stacked: Callable[[str], bool]
) -> tuple[State, TransferReport]:
    """Return a fresh state with the weights of a checkpoint, and what differs; as `take_weights`, proven first.

    Raises:
        RefusedError: the checkpoint is not what was written, or, strictly, weights differ; the first is named.
    """
    prove_weights(checkpoint)
    return take_weights(state, CheckpointWeights(checkpoint), partial=partial, stacked=stacked)


def prove_weights(checkpoint: Path) -> None:
    """Raise RefusedError where a checkpoint is not what was written."""
    # Damaged weights would train as well, only worse.
    if problem := find_problem(checkpoint):
        raise RefusedError(
            f"init_from: {display_path(checkpoint)} is not good: {problem}; choose another step with @STEP"
        )


def take_weights(
    state: State, source: WeightSource, *, partial: bool, stacked: Callable[[str], bool]
) -> tuple[State, TransferReport]:
    """Return a fresh state with the weights of a source, and what differs. Takes over the memory of what it replaces.

    Optimizer, random streams and step stay fresh. Strictly, every weight must have its equal. With `partial` a weight
    of another type is cast, layers that are stacked in one array are taken as far as both have them, and whatever else
    does not fit keeps its fresh value.

    Args:
        state: a fresh train state.
        source: what has the weights.
        partial: whether weights may differ.
        stacked: tells by name whether the leading dimension of an array counts layers.

    Raises:
        RefusedError: strictly, weights differ; the first is named.
    """
    there = source.specs
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
        raise RefusedError(_explain_refusal(source.name, report))
    # Only what is taken is read: the moments of an optimizer may be twice the size of the weights.
    taken = {name: plan for name, plan in plans.items() if plan is not None}
    return _replace_leaves(state, fresh, source, taken), report


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
    state: State, fresh: Mapping[str, jax.Array], source: WeightSource, plans: Mapping[str, int]
) -> State:
    """Return the state with the values that are read, each cast to the type and put in the place of the fresh one."""
    names = list(name_leaves(state))
    leaves = dict(zip(names, jax.tree.leaves(state), strict=True))
    for name, count in plans.items():
        old = fresh[name]
        if count == ALL:
            shape, dtype, sharding = old.shape, old.dtype, old.sharding
            # Before the new one is read: with both there, the peak of a start is a whole array higher.
            old.delete()
            leaves[name] = _read_array(shape, sharding, functools.partial(_read_part, source, name, dtype))
        else:
            # Layers that the other run does not have keep their fresh values.
            read = functools.partial(_read_layers, source, name, old, count)
            join = jax.jit(functools.partial(_join_layers, count), out_shardings=old.sharding)
            leaves[name] = join(_read_array(old.shape, old.sharding, read), old)
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in names])


def _read_array(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[Any], np.ndarray]
) -> jax.Array:
    """Return an array that lies like this, each device's part read by itself."""
    # Not `device_put`, which compares it with that of other processes, one array after the other, in any order.
    return jax.make_array_from_callback(shape, sharding, read)


def _read_part(source: WeightSource, name: str, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    return source.read(name, index).astype(dtype, copy=False)


def _read_layers(source: WeightSource, name: str, old: jax.Array, count: int, index: tuple[slice, ...]) -> np.ndarray:
    """Return a part of the first `count` layers of an array, with zeros where there are no more."""
    layers = range(*index[0].indices(old.shape[0]))
    ranges = [range(*part.indices(size)) for part, size in zip(index, old.shape, strict=True)]
    padded = np.zeros(tuple(map(len, ranges)), old.dtype)
    known = slice(layers.start, max(layers.start, min(layers.stop, count)))
    if known.start < known.stop:
        padded[: known.stop - known.start] = source.read(name, (known, *index[1:])).astype(old.dtype)
    return padded


def _join_layers(count: int, new: jax.Array, old: jax.Array) -> jax.Array:
    """Return the first layers of one array, and the others of another."""
    return jax.numpy.concatenate([new[:count], old[count:]])


def _is_weight(name: str) -> bool:
    return name.partition(".")[0] in WEIGHTS


def _explain_refusal(source: str, report: TransferReport) -> str:
    differing = {**report.missing, **report.unexpected, **report.reshaped}
    name = sorted(differing)[0]
    kind = "missing there" if name in report.missing else "unexpected" if name in report.unexpected else "reshaped"
    more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return (
        f"init_from: the weights of {source} do not fit this model: {name} is {kind}: "
        f"{differing[name]}{more}; choose the model they were trained with, or take those that fit: "
        "init_from.partial=true"
    )
