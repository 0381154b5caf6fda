"""Divide a state into what trains and what no step changes, and put it together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from runner.types import Params, State, Tree

# By the path of each parameter that does not train: which of its stacked layers do not, or None for all of it.
FrozenLayers: TypeAlias = Mapping[str, tuple[int, ...] | None]


# The parts of a state that no step changes: parameters that do not train, and the model as it was when training began,
# where an objective compares with that.
UNCHANGED = ("frozen", "reference")


def find_unchanged(state: State) -> State:
    """Return the parts of a state that no step changes; none where there are none."""
    return {name: state[name] for name in UNCHANGED if name in state}


def leave_unchanged_out(state: State) -> State:
    """Return a state without what no step changes."""
    return {name: leaf for name, leaf in state.items() if name not in UNCHANGED}


def keep_unchanged(state: State, updated: State) -> State:
    """Return an updated state with what no step changes, in the same memory."""
    return {**updated, **find_unchanged(state)}


def split_frozen(params: Params, frozen: FrozenLayers) -> tuple[Params, Params]:
    """Return what trains of the parameters, and what does not, each as a tree with the same names.

    Of stacked layers of which only some train, both trees have an array, with their own layers.
    """
    train: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for path, leaf in iter_paths(params):
        layers = frozen.get(path, ())
        if layers is None:
            rest[path] = leaf
        elif not layers:
            train[path] = leaf
        else:
            train[path], rest[path] = leaf[_find_others(layers, len(leaf))], leaf[np.array(layers)]
    return nest_paths(train), nest_paths(rest)


def join_frozen(params: Params, rest: Params, frozen: FrozenLayers) -> Params:
    """Return the parameters that were split with `split_frozen`; without a rest they are whole already."""
    if not rest:
        return params
    joined = {**dict(iter_paths(rest)), **dict(iter_paths(params))}
    for path, still in iter_paths(rest):
        if (layers := frozen[path]) is not None:
            train = joined[path]
            # Those that train come first; this puts all in the order of their numbers.
            order = np.argsort(np.concatenate([_find_others(layers, len(train) + len(still)), np.array(layers)]))
            joined[path] = jnp.concatenate([train, still])[order]
    return nest_paths(joined)


def _find_others(layers: tuple[int, ...], count: int) -> np.ndarray:
    return np.setdiff1d(np.arange(count), layers)


def iter_paths(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every leaf of nested dicts, as `encoder.kl`."""
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            yield from iter_paths(value, path)
        else:
            yield path, value


def nest_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts with these values at their paths."""
    nested: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        tree = nested
        for parent in parents:
            tree = tree.setdefault(parent, {})
        tree[name] = leaf
    return nested
