"""Take an NNX model apart into static structure and arrays, and put it together again. NNX is split here alone.

Flattening NNX variables in Python costs 8-15 times a small step, a dict almost nothing (measured on flax 0.12.8): so
a state holds plain dicts with string keys, which any reader of a checkpoint sees as one tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.errors import (
    ConcretizationTypeError,
    TracerArrayConversionError,
    TracerBoolConversionError,
    TracerIntegerConversionError,
    UnexpectedTracerError,
)

from runner.train.frozen_layers import FrozenLayers, join_frozen
from runner.types import Params, State, Tree

# What jax raises where a constructor reads a number that a trace does not have: `float(rate)` of a jnp.linspace.
READS_VALUES = (
    ConcretizationTypeError,
    TracerArrayConversionError,
    TracerBoolConversionError,
    TracerIntegerConversionError,
    UnexpectedTracerError,
)

# The arrays of a model: what is trained, its random streams, and every other variable that lasts.
Variables = tuple[Params, Params, Params]


@dataclass(frozen=True)
class SplitModel:
    """A model taken apart, nothing of it allocated.

    Attributes:
        train: its static structure in training mode.
        eval: its static structure in evaluation mode.
        variables: abstract `params`, `rng` and `extra`.
        frozen: which of the `params` do not train; a state has them under a name of their own.
        is_traceable: whether its constructor can be traced, and so be compiled; else it runs as it is written.
    """

    train: nnx.GraphDef
    eval: nnx.GraphDef
    variables: tuple[nnx.State, nnx.State, nnx.State]
    is_traceable: bool = True
    frozen: FrozenLayers = field(default_factory=dict)


def split_model(make_model: Callable[[], nnx.Module], prepare: Callable[[nnx.Module], None]) -> SplitModel:
    """Run a model's constructor and take the result apart; `prepare` may change its modules before.

    It is traced, so that nothing is allocated. Where it reads values it runs on the CPU.
    """

    def make() -> nnx.Module:
        made = make_model()
        keep_plain_arrays(made)
        return made

    is_traceable = True
    try:
        model = nnx.eval_shape(make)
    except READS_VALUES:
        is_traceable = False
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            model = _as_abstract(make())
    prepare(model)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Embed) and module.dtype == module.param_dtype:
            # flax pins the type of an embedding, and with it would raise all that follows to float32; every other
            # layer computes in the type of what comes in.
            module.dtype = None
    model.train()
    graphdef, *variables = nnx.split(model, is_trained, nnx.RngState, ...)
    model.eval()
    return SplitModel(graphdef, nnx.graphdef(model), (variables[0], variables[1], variables[2]), is_traceable)


def _as_abstract(model: nnx.Module) -> nnx.Module:
    graphdef, state = nnx.split(model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), state)
    return nnx.merge(graphdef, shapes)


def is_trained(path: Any, value: Any) -> bool:
    """Return whether a variable is trained: a Param of fractions. One of whole numbers (an index) only lasts."""
    if not isinstance(value, nnx.Param):
        return False
    # Mostly one array; it may be a number of Python's, or a tree.
    leaves = jax.tree.leaves(value.get_value())
    types = [leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf) for leaf in leaves]
    return all(jnp.issubdtype(each, jnp.inexact) for each in types)


def keep_plain_arrays(model: nnx.Module) -> None:
    """Declare arrays that are plain attributes of a module as data: they last like any other variable.

    While a constructor is traced, flax takes such an array for a constant, and its tracer outlives the trace.
    """
    for _, module in nnx.iter_modules(model):
        for name, value in list(vars(module).items()):
            if isinstance(value, jax.core.Tracer):
                setattr(module, name, nnx.data(value))


def split_variables(model: nnx.Module) -> Variables:
    """Return the arrays of a live model: what is trained, its random streams, and every other variable that lasts."""
    keep_plain_arrays(model)
    _, *variables = nnx.split(model, is_trained, nnx.Intermediate, nnx.RngState, ...)
    params, _, rng, extra = (_to_tree(part) for part in variables)
    return params, rng, extra


def abstract_variables(model: SplitModel) -> Variables:
    """Return the shapes of what `split_variables` returns of a live model of this kind."""
    params, rng, extra = (_to_tree(part) for part in model.variables)
    return params, rng, extra


def read_declared_axes(model: SplitModel) -> dict[str, tuple[Any, ...]]:
    """Return the axes of a mesh that a model states for its weights' dimensions, by the name of each weight.

    It does so with `nnx.with_partitioning` or `kernel_metadata={"out_sharding": …}`, as flax has it.
    """
    declared = {}
    for path, variable in nnx.to_flat_state(model.variables[0]):
        axes = variable.get_metadata().get("out_sharding") if isinstance(variable, nnx.Variable) else None
        if axes is not None:
            declared[".".join(map(str, path))] = tuple(axes)
    return declared


def merge_model(graphdef: nnx.GraphDef, model: SplitModel, state: State) -> nnx.Module:
    """Return a live model with the variables of a state. They are copies: changing them changes no state."""
    trees = (join_frozen(state["params"], state.get("frozen", {}), model.frozen), state["rng"], state["extra"])
    filled = [_fill_variables(variables, tree) for variables, tree in zip(model.variables, trees, strict=True)]
    return nnx.merge(graphdef, *filled, copy=True)


def keep_structure(changed: Tree, template: Tree) -> Tree:
    """Return the part of a tree that has a place in the template: a variable that a call makes lasts for the call."""
    if not isinstance(template, dict):
        return changed
    return {key: keep_structure(changed[key], value) for key, value in template.items()}


def list_paths(tree: Tree, prefix: str = "") -> list[str]:
    """Return the path of every leaf of nested dicts: `encoder.kl`."""
    if not isinstance(tree, dict):
        return [prefix]
    return [path for key, value in tree.items() for path in list_paths(value, f"{prefix}.{key}" if prefix else key)]


def _to_tree(variables: nnx.State) -> Params:
    """Return NNX variables as nested dicts of arrays with string keys."""
    return _with_string_keys(nnx.to_pure_dict(variables))


def _fill_variables(variables: nnx.State, tree: Params) -> nnx.State:
    """Return variables of the given structure that hold the arrays of a tree."""
    filled = []
    for path, variable in nnx.to_flat_state(variables):
        value = tree
        for key in path:
            value = value[str(key)]
        # An array that is a plain attribute has no variable around it.
        filled.append((path, variable.replace(value) if isinstance(variable, nnx.Variable) else value))
    return nnx.from_flat_state(filled)


def _with_string_keys(node: Tree) -> Tree:
    return {str(key): _with_string_keys(value) for key, value in node.items()} if isinstance(node, dict) else node
