"""What one block costs under any plan, from its jaxpr alone: a model is traced once, then every set of tags is weighed.

Costs of blocks add up, those of tags do not (to store the result of an activation is worth nothing where its gradient
needs what goes in), so every set of tags is traced, and none is computed from its members.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from data.sources import Sources
from models.remat_plan import RematPlan
from models.scopes import CheckpointPolicy, RematPlanError, use_plan
from runner.config.remat_policies import RematPolicy
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.remat.candidates import Candidate, abstract_microbatch
from runner.trace.flops import count_flops, inner_jaxprs
from runner.trace.remat_trace import count_stored_bytes, find_scopes_and_tags
from runner.train.build import build

BLOCK = "block"


@dataclass(frozen=True)
class RematCost:
    """Bytes that are stored for the backward pass, and FLOPs of both passes."""

    num_bytes: int = 0
    flops: int = 0

    def __add__(self, other: RematCost) -> RematCost:
        return RematCost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def __sub__(self, other: RematCost) -> RematCost:
        return self + other * -1

    def __mul__(self, times: int) -> RematCost:
        return RematCost(self.num_bytes * times, self.flops * times)


@dataclass(frozen=True)
class BlockKinds:
    """The blocks of a model with their tags; equal ones are there once, each with how often it runs."""

    kinds: tuple[tuple[Any, int], ...]
    tags: tuple[str, ...]

    def cost(self, plan: RematPlan) -> RematCost:
        """Of all blocks together, on one batch: exact up to what every plan has in common (see `cost`)."""
        return sum((measure_block(block, plan) * times for block, times in self.kinds), RematCost())


def find_block_kinds(candidate: Candidate, config: Config) -> BlockKinds:
    """The blocks of what was traced under a plan for blocks, for one microbatch."""
    built = candidate.built
    with use_plan(built.plan):
        forward = jax.make_jaxpr(built.loss)(
            built.abstract["params"], built.abstract, abstract_microbatch(built, config)
        ).jaxpr
    times, jaxprs = Counter[str](), {}
    for block, often in _wrapped(forward, 1):
        jaxprs[text := str(block)] = block
        times[text] += often
    kinds = tuple((jaxprs[text], often) for text, often in times.items())
    return BlockKinds(kinds, tuple(sorted(set().union(*(find_scopes_and_tags(block).tags for block, _ in kinds)))))


def _wrapped(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    """What is inside every wrapped block, and how often it runs."""
    for equation in jaxpr.eqns:
        kept = equation.params.get("policy")
        if isinstance(kept, CheckpointPolicy) and kept.scope == BLOCK:
            yield equation.params["jaxpr"], times
            continue
        for inner, length in inner_jaxprs(equation):
            yield from _wrapped(inner, times * length)


@functools.cache
def measure_block(block: Any, plan: RematPlan) -> RematCost:
    """Of one block: what a plan stores beside what enters it, and both passes with what is computed again.

    Gradients are counted for every input that is no integer, also where the model needs none: differences of two plans
    are exact.
    """
    inside = jax.checkpoint(jaxpr_as_fun(ClosedJaxpr(block, ())), policy=CheckpointPolicy(BLOCK, plan))
    shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in block.invars]
    smooth = [place for place, shape in enumerate(shapes) if _is_smooth(shape)]

    def both(*values: Any) -> tuple[list[Any], list[Any]]:
        def of_smooth(*chosen: Any) -> list[Any]:
            filled = list(values)
            for place, value in zip(smooth, chosen, strict=True):
                filled[place] = value
            return [value for value in inside(*filled) if _is_smooth(value)]

        results, pull = jax.vjp(of_smooth, *(values[place] for place in smooth))
        return list(pull([jnp.ones_like(result) for result in results])), jax.tree.leaves(pull)

    traced, (_, kept) = jax.make_jaxpr(both, return_shape=True)(*shapes)
    return RematCost(count_stored_bytes(traced.jaxpr, len(kept)).total(), count_flops(traced.jaxpr))


def measure_loss(config: Config, option: RematPolicy, sources: Sources) -> RematCost | None:
    """Of the loss with its gradients on one microbatch, whole; None where the model does not offer that option."""
    config = replace(config, remat=option)
    try:
        built = build(config, sources)

        def both(state: Any, batch: Any) -> tuple[Any, list[Any]]:
            loss, pull, _ = jax.vjp(lambda params: built.loss(params, state, batch), state["params"], has_aux=True)
            return pull(jnp.ones_like(loss)), jax.tree.leaves(pull)

        with use_plan(built.plan):
            traced, (_, kept) = jax.make_jaxpr(both, return_shape=True)(
                built.abstract, abstract_microbatch(built, config)
            )
    except (ConfigError, RematPlanError):  # a model of the user's has no such scope, or iterates over its blocks itself
        return None
    if built.plan.scopes - find_scopes_and_tags(traced.jaxpr).scopes.keys():
        return None
    return RematCost(count_stored_bytes(traced.jaxpr, len(kept)).total(), count_flops(traced.jaxpr))


def _is_smooth(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)
