"""The seam between models and rematerialization: a model declares scopes and tags, a plan decides what is recomputed.

A model author writes `@scope("attention")` above a method and `tag(x, "attn_out")` around a value, and knows nothing
more: without an active plan both are the identity. They live with the models, because they are their vocabulary, and
the runner may import models, not the other way round. The plan travels in a jax user context, which is part of the key
of every trace cache: an inner `jax.jit` traced under one plan is never reused under another (a plain context variable
would go stale there). What was really recomputed is read from the trace (`recomputed`): every scope leaves its name in
the policy of its equation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.remat_plan import RematPlan

Method = TypeVar("Method", bound=Callable[..., Any])

FLASH_FORWARD = (
    "dot_product_attention_fwd_wrapper"  # the forward pass of cuDNN's flash attention, whose outputs have no tag
)
ATTENTION_CONTEXT = "attn_ctx"  # the tag of what attention mixed: for flash attention that operation stands for it
EXEMPT = "remat_not_chosen"  # an attribute of the blocks that `every` leaves alone
SLICES = ("slice", "squeeze", "dynamic_slice")

_plan = jax.make_user_context(default_value=RematPlan())
_scanned = jax.make_user_context(default_value=False)


class RematPlanError(ValueError):
    """The plan cannot be obeyed by this model."""


def use_plan(plan: RematPlan) -> AbstractContextManager[None]:
    """Trace under `plan`."""
    return _plan(plan)


def tag(x: Any, name: str) -> Any:
    """The same value, with a name by which `remat=names` can store it. Worth it where a product would be done again."""
    return checkpoint_name(x, name)


def scope(name: str) -> Callable[[Method], Method]:
    """Declare a method to be a region that a plan may recompute. Of its arguments only arrays and modules are traced.

    Only the outermost wrapped scope counts: nested recomputation would do the work twice.
    """

    def declare(method: Method) -> Method:
        @functools.wraps(method)
        def call(module: nnx.Module, *args: Any, **named: Any) -> Any:
            plan: RematPlan = _plan.value
            if name not in plan.scopes or getattr(module, EXEMPT, False):
                return method(module, *args, **named)
            if plan.every > 1 and not hasattr(module, EXEMPT):
                raise RematPlanError(
                    "remat=every_n: the model has one block, or stacks its blocks itself; iterate over them with "
                    "models.scopes.layers, or choose remat=full"
                )
            return _recomputed(method, CheckpointPolicy(name, plan), (module, *args), named)

        call.remat_scope = name  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return declare


def _recomputed(
    method: Callable[..., Any], kept: CheckpointPolicy, args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """The call, recomputed in the backward pass. Statics go around it, both ways: they must not become tracers."""
    inputs, rest_of_inputs = _apart((args, named))
    rest_of_results: list[Callable[..., Any]] = []

    def call(*values: Any) -> Any:
        args, named = rest_of_inputs(*values)
        with _plan(RematPlan()):  # every scope inside is switched off
            results, rest = _apart(method(*args, **named))
        rest_of_results.append(rest)
        return results

    results = nnx.remat(call, prevent_cse=not _scanned.value, policy=kept)(*inputs)
    return rest_of_results[-1](*results)


def _apart(values: Any) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """The arrays and modules in a tree, and what puts others in their places."""
    leaves, tree = jax.tree.flatten(values, is_leaf=_is_module)
    is_traced = [_is_module(leaf) or isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    statics = [None if traced else leaf for leaf, traced in zip(leaves, is_traced, strict=True)]

    def together(*values: Any) -> Any:
        left = iter(values)
        filled = [next(left) if traced else leaf for leaf, traced in zip(statics, is_traced, strict=True)]
        return jax.tree.unflatten(tree, filled)

    return tuple(leaf for leaf, traced in zip(leaves, is_traced, strict=True) if traced), together


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


@dataclass(frozen=True)
class CheckpointPolicy:
    """The policy of one recomputed scope: asked by jax for each operation inside, whether its result is stored."""

    scope: str
    plan: RematPlan

    def __call__(self, operation: Any, *avals: Any, **params: Any) -> Any:
        plan, policies = self.plan, jax.checkpoint_policies
        if operation.name == "name":
            if params["name"] in plan.offload:
                return _to_host(params["name"])(operation, *avals, **params)
            return params["name"] in plan.names or plan.keeps == "everything"
        if operation.name == FLASH_FORWARD:
            return plan.keeps != "nothing" or ATTENTION_CONTEXT in plan.names
        match plan.keeps:
            case "nothing":
                return False
            case "everything":
                return True
            case "dots":
                return policies.dots_saveable(operation, *avals, **params)
            case "dots_no_batch":
                return policies.dots_with_no_batch_dims_saveable(operation, *avals, **params)


@functools.cache
def _to_host(name: str) -> Callable[..., Any]:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[name],
        offload_src="device",
        offload_dst="pinned_host",
    )


def inside_scan(length: int) -> AbstractContextManager[None]:
    """Tell the seam that what is traced here is the body of a scan of `length` iterations.

    There the barriers against common-subexpression elimination are not needed and cost speed; a scan of length 1 is
    inlined by XLA and does need them. A jax context like the plan, for the same reason.
    """
    return _scanned(length > 1)


def layers(blocks: nnx.Module, x: jax.Array, length: int) -> jax.Array:
    """x through `length` blocks, whose variables are stacked along a first axis, under one scan.

    With `every=n` the scan goes over groups of n, of which the first is recomputed; what is left over comes last.
    """
    plan: RematPlan = _plan.value
    if "block" in plan.scopes and plan.every > 1:
        return _in_groups(blocks, x, length, plan)

    @nnx.scan(length=length, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x: jax.Array, block: nnx.Module) -> jax.Array:
        return block(x)

    with inside_scan(length):
        return through(x, blocks)


def _in_groups(blocks: nnx.Module, x: jax.Array, length: int, plan: RematPlan) -> jax.Array:
    """A block takes its slice of the stack inside of what is recomputed, so that no slice of weights is stored."""
    graphdef, *variables = nnx.split(blocks, nnx.Param, ...)

    def one(x: jax.Array, stacked: Any, place: int) -> tuple[jax.Array, nnx.State]:
        block: Any = nnx.merge(graphdef, *jax.tree.map(lambda leaf: leaf[place], stacked), copy=True)
        setattr(block, EXEMPT, True)  # it is wrapped here
        out = block(x)
        return out, nnx.split(block, nnx.Param, ...)[-1]

    def group(x: jax.Array, stacked: Any, size: int = plan.every) -> tuple[jax.Array, nnx.State]:
        moved = []
        for place in range(size):
            policy = _all_but_slices if place else CheckpointPolicy("block", plan)
            through = jax.checkpoint(one, policy=policy, prevent_cse=not _scanned.value, static_argnums=2)
            x, after = through(x, stacked, place)
            moved.append(after)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)

    groups, rest = divmod(length, plan.every)
    whole, parts = length - rest, []
    if groups:
        first = jax.tree.map(lambda leaf: leaf[:whole].reshape(groups, plan.every, *leaf.shape[1:]), variables)
        with inside_scan(groups):
            x, moved = jax.lax.scan(group, x, first, length=groups)
        parts.append(jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), moved))
    if rest:
        with inside_scan(1):
            x, moved = group(x, jax.tree.map(lambda leaf: leaf[whole:], variables), rest)
        parts.append(moved)
    nnx.update(blocks, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))
    return x


def _all_but_slices(operation: Any, *avals: Any, **params: Any) -> bool:
    return operation.name not in SLICES
