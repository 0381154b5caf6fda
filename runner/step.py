"""The train state and its successor: pure functions, jitted once. NNX is split and merged here and nowhere else.

The state is a plain dict of arrays, donated to the step: flattening NNX variables in Python costs 8-15 times a small
step, a dict almost nothing (measured on flax 0.12.8).

    {"step": Int[], "params": …, "extra": …, "rng": …, "opt": …}

`params` are the trained variables; `extra` every other variable that lasts (batch statistics, a user's own);
`rng` the random streams of the model (dropout). Keys are strings, so that any reader of a checkpoint sees one tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Tree = dict[str, Any]
State = dict[str, Any]
Metrics = dict[str, jax.Array]
Objective = Callable[[nnx.Module, Mapping[str, jax.Array]], dict[str, jax.Array]]

STACKED = "blocks"  # models keep layers that are stacked for a scan under this name: one more leading dimension


def is_stacked(name: str) -> bool:
    """Whether a leaf of the state (`params.blocks.ffn.up.kernel`) holds the same weight of every stacked layer."""
    return name.split(".")[1:2] == [STACKED]


@dataclass(frozen=True)
class Network:
    """A model taken apart: its static structure for training and for evaluation, and the shape of its variables."""

    train: nnx.GraphDef
    eval: nnx.GraphDef
    variables: tuple[nnx.State, nnx.State, nnx.State]  # abstract: params, rng, extra


def take_apart(make_model: Callable[[], nnx.Module]) -> Network:
    """The structure of a model, without allocating anything."""
    model = nnx.eval_shape(make_model)
    model.train()
    graphdef, *variables = nnx.split(model, nnx.Param, nnx.RngState, ...)
    model.eval()
    return Network(graphdef, nnx.graphdef(model), (variables[0], variables[1], variables[2]))


def assemble(graphdef: nnx.GraphDef, network: Network, state: State) -> nnx.Module:
    """A live model from a state. Its variables are copies: changing them changes no state."""
    trees = (state["params"], state["rng"], state["extra"])
    filled = [_fill(variables, tree) for variables, tree in zip(network.variables, trees, strict=True)]
    return nnx.merge(graphdef, *filled, copy=True)


def init(make_model: Callable[[], nnx.Module], tx: optax.GradientTransformation) -> State:
    """The state of a fresh model at step 0."""
    _, *variables = nnx.split(make_model(), nnx.Param, nnx.RngState, ...)
    params, rng, extra = variables
    trees = {"params": _tree(params), "rng": _tree(rng), "extra": _tree(extra)}
    return {"step": jnp.zeros((), jnp.int32), **trees, "opt": tx.init(trees["params"])}


def train_step(
    network: Network, objective: Objective, tx: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, Metrics]]:
    """(state, batch) → (next state, metrics): one update. Metrics are means over the batch, and stay on the device."""

    def loss_of(params: Tree, state: State, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
        model = assemble(network.train, network, {**state, "params": params})
        means = {name: values.mean() for name, values in objective(model, batch).items()}
        _, *variables = nnx.split(model, nnx.Param, nnx.Intermediate, nnx.RngState, ...)
        _, _, rng, extra = variables
        return means["loss"], (means, {"rng": _tree(rng), "extra": _tree(extra)})

    def train_step(state: State, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        (_, (means, moved)), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"], state, batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {**means, "grad_norm": optax.global_norm(grads), "lr": jnp.asarray(schedule(state["step"]))}
        return {"step": state["step"] + 1, "params": params, "opt": opt, **moved}, metrics

    return train_step


def eval_step(network: Network, objective: Objective) -> Callable[[State, Mapping[str, jax.Array], jax.Array], Metrics]:
    """(state, batch, weights) → weighted sums of every metric over the batch, and the sum of the weights."""

    def eval_step(state: State, batch: Mapping[str, jax.Array], weights: jax.Array) -> Metrics:
        examples = objective(assemble(network.eval, network, state), batch)
        return {**{name: (values * weights).sum() for name, values in examples.items()}, "weight": weights.sum()}

    return eval_step


def is_finite(params: Tree) -> jax.Array:
    """Bool[]: whether every parameter is a finite number."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack(leaves).all()


def decays(params: Tree) -> Tree:
    """True for what weight decay applies to: matrices, not counting the dimension that stacks layers."""

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        stacked = getattr(path[0], "key", None) == STACKED
        return leaf.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _tree(variables: nnx.State) -> Tree:
    """NNX variables as nested dicts of arrays with string keys."""
    return _string_keys(nnx.to_pure_dict(variables))


def _fill(variables: nnx.State, tree: Tree) -> nnx.State:
    """Variables of the given shape, holding the arrays of a tree."""
    filled = jax.tree.map(lambda leaf: leaf, variables)
    nnx.replace_by_pure_dict(filled, _keys_like(nnx.to_pure_dict(variables), tree))
    return filled


def _string_keys(node: Any) -> Any:
    return {str(key): _string_keys(value) for key, value in node.items()} if isinstance(node, dict) else node


def _keys_like(template: Any, tree: Any) -> Any:
    if not isinstance(template, dict):
        return tree
    return {key: _keys_like(value, tree[str(key)]) for key, value in template.items()}


def place(make: Callable[[], State], sharding: jax.sharding.Sharding) -> tuple[Callable[[], State], State]:
    """A jitted `make` whose result lies on `sharding`, and the abstract state with that sharding.

    A restored state is placed the same way, so that the first step after a resume finds the compiled program.
    """
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(make)
    )
    return jax.jit(make, out_shardings=sharding), abstract
