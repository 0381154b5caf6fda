"""What a model costs, part by part, before anything is allocated: parameters, FLOPs, what the backward pass keeps."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from models.scopes import use_plan
from runner.config.schema import Config
from runner.remat.candidates import trace_residuals
from runner.trace.flops import OUTSIDE, FromData, FromWeights, Origin, attribute_flops, count_flops
from runner.trace.remat_trace import count_bytes
from runner.train.compile import abstract_batch
from runner.types import Batch

if TYPE_CHECKING:
    from runner.train.built import Built


@dataclass(frozen=True)
class ModelPart:
    """One top-level part of a model; what is per example is an average over the batch.

    Attributes:
        name: as the model calls it; `""` stands for what depends on the batch alone.
        parameters: how many numbers are trained.
        flops: FLOPs of the forward pass, per example.
        stored_bytes: bytes of the values that reverse-mode differentiation keeps for the backward pass and that depend
            on the batch, under the remat plan, per example. The compiler may need less: it fuses, and may compute
            again what is cheap. None for a program of the user's own, which alone knows what it differentiates.
        frozen: how many numbers beside those do not train.
    """

    name: str
    parameters: int
    flops: float
    stored_bytes: float | None
    frozen: int = 0


@dataclass(frozen=True)
class ModelCost:
    """The parts of a model in the order of their use, the examples in a batch and the FLOPs of a whole update."""

    parts: tuple[ModelPart, ...]
    batch_size: int
    step_flops: int

    @property
    def total(self) -> ModelPart:
        """Return the sum of the parts."""
        stored = [part.stored_bytes for part in self.parts]
        return ModelPart(
            "total",
            sum(part.parameters for part in self.parts),
            sum(part.flops for part in self.parts),
            None if None in stored else sum(filter(None, stored)),
            sum(part.frozen for part in self.parts),
        )


def summarize_model(built: Built, config: Config) -> ModelCost:
    """Return what a model costs, from traces of its forward pass and of one update; nothing is computed."""
    batch, _ = abstract_batch(built, config)
    with use_plan(built.plan):
        step = built.train_step.trace(built.abstract, batch).jaxpr
    flops, stored = _trace_forward(built, batch)
    sizes = Counter[str]()
    frozen = Counter[str]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(built.abstract["params"]):
        sizes[_name_part(path)] += math.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(built.abstract.get("frozen", {})):
        frozen[_name_part(path)] += math.prod(leaf.shape)
    # The order of use comes from the trace; parts without a product, as a bias alone, follow.
    names = list(dict.fromkeys([*flops, *sizes, *frozen, *stored]))
    examples = config.data.batch_size
    parts = tuple(
        ModelPart(name, sizes[name], flops[name] / examples, stored[name] / examples, frozen[name]) for name in names
    )
    return ModelCost(parts, examples, count_flops(step.jaxpr))


def summarize_program(built: Built, config: Config) -> ModelCost:
    """Return what a program of the user's own costs, from traces of its evaluation and of one step."""
    batch, weights = abstract_batch(built, config)
    step = built.train_step.trace(built.abstract, batch).jaxpr
    sizes = Counter[str]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(built.abstract["weights"]):
        sizes[_name_program_part(path)] += math.prod(leaf.shape)
    flops = Counter[str]()
    if built.measures:
        traced = built.eval_step.trace(built.abstract, batch, weights).jaxpr
        leaves = jax.tree_util.tree_leaves_with_path((built.abstract, batch, weights))
        flops = attribute_flops(traced.jaxpr, [_find_program_origin(path) for path, _ in leaves]).flops
    # What depends on the batch alone is told where it costs something.
    names, examples = [name for name in dict.fromkeys([*flops, *sizes]) if name or flops[name]], config.data.batch_size
    parts = tuple(ModelPart(name, sizes[name], flops[name] / examples, None) for name in names)
    return ModelCost(parts, examples, count_flops(step.jaxpr))


def _find_program_origin(path: tuple[Any, ...]) -> Origin:
    keys = [getattr(step, "key", None) for step in path]
    return FromWeights(_name_program_part(path[2:])) if keys[1:2] == ["weights"] else FromData(OUTSIDE)


def _name_program_part(path: tuple[Any, ...]) -> str:
    """Return the name of a part of a program's weights: `params.Dense_0`, or with its place in a list of them."""
    keys = [str(step.key) for step in path]
    return ".".join(keys[: 3 if len(keys) > 3 and keys[2].isdecimal() else max(1, min(2, len(keys) - 1))])


def _trace_forward(built: Built, batch: Batch) -> tuple[Counter[str], Counter[str]]:
    """Return by part the FLOPs of the forward pass on a batch, and the bytes it keeps for the backward pass."""
    leaves = jax.tree_util.tree_leaves_with_path((built.abstract, batch))
    jaxpr = trace_residuals(built, batch)
    found = attribute_flops(jaxpr, [_find_origin(path) for path, _ in leaves])
    # As a dictionary: a value counts once, however often the backward pass uses it. What was made by no part (weights,
    # constants) is there anyway.
    made_by = {var: part for var, part in zip(jaxpr.outvars, found.made_by, strict=True) if part is not None}
    stored = Counter[str]()
    for var, part in made_by.items():
        stored[part] += count_bytes(var)
    return found.flops, stored


def _find_origin(path: tuple[Any, ...]) -> Origin:
    """Return whether an input of the traced function, `(state, batch)`, is a weight of some part, or data."""
    keys = [getattr(step, "key", None) for step in path]
    return FromWeights(_name_part(path[2:])) if keys[1] in ("params", "frozen") else FromData(OUTSIDE)


def _name_part(path: tuple[Any, ...]) -> str:
    """Return the name of the top-level part that a path of keys leads into; of a list of parts with its place in it."""
    keys = [str(step.key) for step in path]
    return ".".join(keys[:2]) if len(keys) > 1 and keys[1].isdecimal() else keys[0]
