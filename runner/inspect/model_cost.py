"""What a model costs, part by part, before anything is allocated: parameters, FLOPs, what the backward pass keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from models.scopes import use_plan
from runner.config.schema import Config
from runner.trace.flops import OUTSIDE, FromData, FromWeights, Origin, attribute_flops, count_flops
from runner.train.compile import abstract_batch

if TYPE_CHECKING:
    from runner.train.built import Built


@dataclass(frozen=True)
class ModelPart:
    """One top-level part of the model. FLOPs of the forward pass and bytes stored for the backward pass: per example.

    Bytes are those of the values that reverse-mode differentiation keeps and that depend on the batch, under the remat
    plan. What the compiler makes of it may be less: it fuses, and may compute again what is cheap.
    """

    name: str
    parameters: int
    flops: float
    stored_bytes: float


@dataclass(frozen=True)
class ModelCost:
    """The batch and the parts, in the order of their use, and the FLOPs of a whole update."""

    parts: tuple[ModelPart, ...]
    batch_size: int
    step_flops: int

    @property
    def total(self) -> ModelPart:
        """The sum."""
        numbers = zip(*[(part.parameters, part.flops, part.stored_bytes) for part in self.parts], strict=True)
        return ModelPart("total", *map(sum, numbers))


def summarize_model(built: Built, config: Config) -> ModelCost:
    """Trace the forward pass and one update; nothing is computed."""
    batch, _ = abstract_batch(built, config)
    with use_plan(built.plan):
        step = built.train_step.trace(built.abstract, batch).jaxpr
        flops, stored = _forward(built, batch)
    sizes = Counter[str]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(built.abstract["params"]):
        sizes[_part(path)] += math.prod(leaf.shape)
    names = list(dict.fromkeys([*flops, *sizes, *stored]))
    examples = config.data.batch_size
    parts = tuple(ModelPart(name, sizes[name], flops[name] / examples, stored[name] / examples) for name in names)
    return ModelCost(parts, examples, count_flops(step.jaxpr))


def _forward(built: Built, batch: Mapping[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """FLOPs and stored bytes of the forward pass on a batch, by part."""

    def kept(state: Any, batch: Any) -> list[Any]:
        _, pull, _ = jax.vjp(lambda params: built.loss(params, state, batch), state["params"], has_aux=True)
        return jax.tree.leaves(pull)

    leaves = jax.tree_util.tree_leaves_with_path((built.abstract, batch))
    jaxpr = jax.make_jaxpr(kept)(built.abstract, batch).jaxpr
    found = attribute_flops(jaxpr, [_origin(path) for path, _ in leaves])
    made = {var: part for var, part in zip(jaxpr.outvars, found.made_by, strict=True) if part is not None}
    stored = Counter[str]()
    for var, part in made.items():  # each once, however often the backward pass uses it
        stored[part] += math.prod(var.aval.shape) * var.aval.dtype.itemsize
    return found.flops, stored


def _origin(path: tuple[Any, ...]) -> Origin:
    """Whether an input of the traced function is a weight, and of which part."""
    keys = [getattr(step, "key", None) for step in path]
    return FromWeights(_part(path[2:])) if keys[1] == "params" else FromData(OUTSIDE)


def _part(path: tuple[Any, ...]) -> str:
    """The name of a top-level part; of a list of parts, with its place in it."""
    keys = [str(step.key) for step in path]
    return ".".join(keys[:2]) if len(keys) > 1 and keys[1].isdecimal() else keys[0]
