"""Measure what one block costs under any plan, from its jaxpr alone: the model is traced once, then its blocks.

The costs of blocks add up. Those of tags do not: to store the result of an activation is worth nothing where its
gradient needs what goes in. So every set of tags is traced, and none is computed from its members.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from data.sources import Sources
from models.remat_plan import RematPlan
from models.scopes import CheckpointPolicy, use_plan
from runner.config.remat_policies import RematPolicy
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.remat.candidates import Candidate, abstract_microbatch
from runner.trace.flops import count_flops, inner_jaxprs
from runner.trace.remat_trace import count_stored_bytes, find_scopes_and_tags
from runner.train.build import build
from runner.types import Batch, State

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
    """The blocks of a model and their tags.

    Attributes:
        kinds: The jaxpr of each kind of block, with how often such a block runs. Equal blocks are one kind.
        tags: The tags in the blocks, sorted.
    """

    kinds: tuple[tuple[Jaxpr, int], ...]
    tags: tuple[str, ...]

    def cost(self, plan: RematPlan) -> RematCost:
        """Return the cost of all blocks on one batch; see measure_block for what it is exact up to."""
        return sum((measure_block(block, plan) * times for block, times in self.kinds), RematCost())


def find_block_kinds(candidate: Candidate, config: Config) -> BlockKinds:
    """Return the blocks of a model that was traced under a plan for blocks, as they are for one microbatch."""
    built, batch = candidate.built, abstract_microbatch(candidate.built, config)
    with use_plan(built.plan):
        forward = jax.make_jaxpr(built.loss)(built.abstract["params"], built.abstract, batch).jaxpr
    # Blocks are the same where their programs are: a jaxpr has no equality, but its text names what it does.
    times, jaxprs = Counter[str](), dict[str, Jaxpr]()
    for block, count in _iterate_blocks(forward, 1):
        text = str(block)
        jaxprs[text] = block
        times[text] += count
    kinds = tuple((jaxprs[text], count) for text, count in times.items())
    tags = set[str]().union(*(find_scopes_and_tags(block).tags for block, _ in kinds))
    return BlockKinds(kinds, tuple(sorted(tags)))


def _iterate_blocks(jaxpr: Jaxpr, times: int) -> Iterator[tuple[Jaxpr, int]]:
    """Yield the inside of every wrapped block of a jaxpr that runs `times` times, and how often the block runs."""
    for equation in jaxpr.eqns:
        policy = equation.params.get("policy")
        if isinstance(policy, CheckpointPolicy) and policy.scope == BLOCK:
            yield equation.params["jaxpr"], times
            continue
        for body, length in inner_jaxprs(equation):
            yield from _iterate_blocks(body, times * length)


@functools.cache
def measure_block(block: Jaxpr, plan: RematPlan) -> RematCost:
    """Return what a plan stores of one block beside its inputs, and the FLOPs of both passes with what is done again.

    Gradients are counted for every input that is no integer, also where the model needs none. All plans have that in
    common, so differences of two plans are exact.
    """
    wrapped = jax.checkpoint(jaxpr_as_fun(ClosedJaxpr(block, ())), policy=CheckpointPolicy(BLOCK, plan))
    avals: list[Any] = [var.aval for var in block.invars]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    # jax differentiates with respect to these alone; keys of random streams and counts are passed by.
    smooth = [place for place, shape in enumerate(shapes) if _is_inexact(shape)]

    def run_both_passes(*values: Any) -> tuple[list[Any], list[Any]]:
        def run_forward(*chosen: Any) -> list[Any]:
            filled = list(values)
            for place, value in zip(smooth, chosen, strict=True):
                filled[place] = value
            return [value for value in wrapped(*filled) if _is_inexact(value)]

        results, pull_back = jax.vjp(run_forward, *(values[place] for place in smooth))
        return list(pull_back([jnp.ones_like(result) for result in results])), jax.tree.leaves(pull_back)

    traced, (_, stored) = jax.make_jaxpr(run_both_passes, return_shape=True)(*shapes)
    return _cost_of(traced.jaxpr, len(stored))


def measure_loss(config: Config, policy: RematPolicy, sources: Sources) -> RematCost | None:
    """Return the cost of the loss with its gradients on one microbatch; None where the policy does not fit the model.

    The optimizer costs the same under every policy, so the train step is not traced, which would take longer.
    """
    config = replace(config, remat=policy)
    try:
        built = build(config, sources)

        def run_both_passes(state: State, batch: Batch) -> tuple[Any, list[Any]]:
            loss, pull_back, _ = jax.vjp(lambda params: built.loss(params, state, batch), state["params"], has_aux=True)
            return pull_back(jnp.ones_like(loss)), jax.tree.leaves(pull_back)

        with use_plan(built.plan):
            trace = jax.make_jaxpr(run_both_passes, return_shape=True)
            traced, (_, stored) = trace(built.abstract, abstract_microbatch(built, config))
    # A model of the user's own may have no such scope, or iterate over its blocks itself.
    except ConfigError:
        return None
    # It may also declare a scope that it never enters on this batch: then nothing would be recomputed.
    if built.plan.scopes - find_scopes_and_tags(traced.jaxpr).scopes.keys():
        return None
    return _cost_of(traced.jaxpr, len(stored))


def _cost_of(both_passes: Jaxpr, num_stored: int) -> RematCost:
    """Return the cost of a jaxpr of both passes whose last outputs are the stored values."""
    return RematCost(count_stored_bytes(both_passes, num_stored).total(), count_flops(both_passes))


def _is_inexact(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)
