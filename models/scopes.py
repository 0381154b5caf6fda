"""The seam between models and rematerialization: a model declares scopes and tags, a plan decides what is recomputed.

The author of a model writes three things, and needs to know nothing else about rematerialization:

    class Block(nnx.Module):
        @scope("block")                                 # a region that a plan may recompute
        def __call__(self, x):
            return x + self.down(jax.nn.gelu(tag(self.up(x), "ffn_pre")))    # a value that a plan may store

    x = layers(self.blocks, x, num_layers)              # stacked blocks, under one scan

Without a plan `scope` and `tag` change nothing. Under `use_plan(plan)` a scope that the plan names becomes a
`jax.checkpoint`: its values are not stored for the backward pass, but computed again there. The runner makes the plan
from `remat=` (runner/config/remat_policies.py). This module lies with the models, since it is their vocabulary, and
they do not import the runner.

The plan travels in a jax user context. Such a context is part of the key of every trace cache, so an inner `jax.jit`
that was traced under one plan is never reused under another, as it would be if the plan were in a plain context
variable. Nothing records what was recomputed: every recomputed scope leaves its name in the trace, in the policy of its
equation (CheckpointPolicy), and runner/trace/remat_trace.py reads it there.
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

from models.layout import constrain_batch
from models.remat_plan import RematPlan, RematPlanError

Method = TypeVar("Method", bound=Callable[..., Any])

# The forward pass of cuDNN's flash attention is one operation, whose outputs have no tag. A policy treats all of them
# as if they had the tag of what attention mixed.
FLASH_FORWARD = "dot_product_attention_fwd_wrapper"
ATTENTION_CONTEXT = "attn_ctx"

# An attribute of blocks: True exempts one from the plan, as `every` does with all but the first of each n; False says
# that it was numbered, and chosen.
EXEMPT = "remat_not_chosen"

# The scope of what stands in a row, and hands on what the next one takes.
BLOCK = "block"

SLICE_OPERATIONS = ("slice", "squeeze", "dynamic_slice")

_current_plan = jax.make_user_context(default_value=RematPlan())
_is_inside_scan = jax.make_user_context(default_value=False)


def use_plan(plan: RematPlan) -> AbstractContextManager[None]:
    """Return a context in which models are traced under `plan`."""
    return _current_plan(plan)


def tag(x: Any, name: str) -> Any:
    """Return x unchanged, with a name by which `remat=names` can store it (jax's checkpoint_name).

    It is worth it for the results of products, which are expensive to compute again.
    """
    return checkpoint_name(x, name)


def scope(name: str) -> Callable[[Method], Method]:
    """Declare a method of a module to be a region that a plan may recompute.

    The method may take and return any tree: arrays and modules in it are traced, everything else is passed around the
    recomputation. Of scopes inside each other only the outermost one that the plan names is recomputed; to recompute
    an inner one as well would do its work again twice.
    """

    def declare(method: Method) -> Method:
        @functools.wraps(method)
        def call(module: nnx.Module, *args: Any, **named: Any) -> Any:
            plan: RematPlan = _current_plan.value
            if name == BLOCK:
                args = tuple(map(constrain_batch, args))
            if name not in plan.scopes or getattr(module, EXEMPT, False):
                return _constrain_results(name, method(module, *args, **named))
            # models/find_blocks.py numbers blocks where there are several. One without a number is alone, or stands for
            # a stack that the model scans itself: there all blocks are the same code, and none can be chosen.
            if plan.every > 1 and not hasattr(module, EXEMPT):
                raise RematPlanError(
                    "remat=every_n: the model has one block, or stacks its blocks itself; iterate over them with "
                    "models.scopes.layers, or choose remat=full"
                )
            recomputed = _call_recomputed(method, CheckpointPolicy(name, plan), (module, *args), named)
            return _constrain_results(name, recomputed)

        # Read by models/find_blocks.py: the scope is a fact about the class, known before anything is traced.
        call.remat_scope = name  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return declare


def _constrain_results(name: str, results: Any) -> Any:
    """Return what a scope gave; what a block gives to the next one is divided among devices as the batch is."""
    if name != BLOCK:
        return results
    return tuple(map(constrain_batch, results)) if type(results) is tuple else constrain_batch(results)


def _call_recomputed(
    method: Callable[..., Any], policy: CheckpointPolicy, args: tuple[Any, ...], named: dict[str, Any]
) -> Any:
    """Return method(*args, **named), to be recomputed in the backward pass except for what the policy stores."""
    # jax.checkpoint turns everything that crosses its border into tracers. A flag or a dtype must stay what it is, so
    # such values go around it, on the way in and on the way out.
    inputs, rebuild_inputs = _partition_traced((args, named))
    rebuild_results: list[Callable[..., Any]] = []

    def call(*values: Any) -> Any:
        args, named = rebuild_inputs(*values)
        with _current_plan(RematPlan()):  # switches off every scope inside
            results, rebuild = _partition_traced(method(*args, **named))
        rebuild_results.append(rebuild)
        return results

    results = nnx.remat(call, prevent_cse=not _is_inside_scan.value, policy=policy)(*inputs)
    # There is one function for each time that jax traced the call; the results are those of the last trace.
    return rebuild_results[-1](*results)


def _partition_traced(values: Any) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Split a tree into its arrays and modules, and a function that rebuilds the tree from such values."""
    leaves, tree = jax.tree.flatten(values, is_leaf=_is_module)
    is_traced = [_is_module(leaf) or isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    # `rebuild` outlives the trace of a recomputed call, so it must hold none of its tracers.
    statics = [None if traced else leaf for leaf, traced in zip(leaves, is_traced, strict=True)]

    def rebuild(*values: Any) -> Any:
        left = iter(values)
        filled = [next(left) if traced else leaf for leaf, traced in zip(statics, is_traced, strict=True)]
        return jax.tree.unflatten(tree, filled)

    return tuple(leaf for leaf, traced in zip(leaves, is_traced, strict=True) if traced), rebuild


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


@dataclass(frozen=True)
class CheckpointPolicy:
    """The policy that jax.checkpoint asks, for each operation of a recomputed scope, whether to store its result.

    It is a dataclass and not a closure, for two reasons: it carries the name of its scope into the trace, and equal
    policies have to be equal, since they are part of jax's cache keys.
    """

    scope: str
    plan: RematPlan

    def __call__(self, operation: Any, *avals: Any, **params: Any) -> Any:
        """Return whether the result of a jax primitive with these inputs and parameters is stored, or offloaded."""
        plan, policies = self.plan, jax.checkpoint_policies
        if operation.name == "name":
            if params["name"] in plan.offload:
                return _offload_policy(params["name"])(operation, *avals, **params)
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
def _offload_policy(name: str) -> Callable[..., Any]:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[name],
        offload_src="device",
        offload_dst="pinned_host",
    )


def inside_scan(length: int) -> AbstractContextManager[None]:
    """Return a context for tracing the body of a scan of `length` iterations.

    Inside it scopes go without the barriers (`prevent_cse`) that keep the compiler from merging the recomputation with
    the forward pass. Between two iterations nothing can be merged, and the barriers cost speed. XLA inlines a scan of
    length 1, which does need them. It is a jax context, as the plan is, so that inner traces are not reused wrongly.
    """
    return _is_inside_scan(length > 1)


def layers(blocks: nnx.Module, x: jax.Array, length: int, shared: Any = None) -> jax.Array:
    """Return x after `length` blocks, applied under one scan; `blocks` has their variables stacked on a first axis.

    Each block is called with `shared` as well, unless that is None.

    A plan with `every=n` makes it a scan over groups of n blocks, of which the first is recomputed; the blocks that are
    left over come last.
    """
    plan: RematPlan = _current_plan.value
    if "block" in plan.scopes and plan.every > 1:
        return _scan_groups(blocks, x, length, plan, shared)

    @nnx.scan(length=length, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def apply_block(x: jax.Array, block: nnx.Module) -> jax.Array:
        return _call_block(block, x, shared)

    with inside_scan(length):
        return apply_block(x, blocks)


def _call_block(block: Any, x: jax.Array, shared: Any) -> jax.Array:
    return block(x) if shared is None else block(x, shared)


def _scan_groups(blocks: nnx.Module, x: jax.Array, length: int, plan: RematPlan, shared: Any) -> jax.Array:
    """Return x after `length` blocks, of which the first of each `plan.every` is recomputed."""
    graphdef, *variables = nnx.split(blocks, nnx.Param, ...)

    # A block takes its slice of the stacked weights inside of what jax.checkpoint wraps. Outside, every slice would be
    # an input of a recomputed region, hence stored: the weights once more.
    def apply_nth(x: jax.Array, stacked: Any, place: int) -> tuple[jax.Array, nnx.State]:
        block: Any = nnx.merge(graphdef, *jax.tree.map(lambda leaf: leaf[place], stacked), copy=True)
        setattr(block, EXEMPT, True)  # its own scope is off: the wrapping is done below
        out = _call_block(block, x, shared)
        return out, nnx.split(block, nnx.Param, ...)[-1]

    def apply_group(x: jax.Array, stacked: Any, size: int = plan.every) -> tuple[jax.Array, nnx.State]:
        moved = []
        for place in range(size):
            # The others are wrapped too, but store everything except their slices of the weights.
            policy = _store_all_but_slices if place else CheckpointPolicy("block", plan)
            apply_block = jax.checkpoint(
                apply_nth, policy=policy, prevent_cse=not _is_inside_scan.value, static_argnums=2
            )
            x, after = apply_block(x, stacked, place)
            moved.append(after)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)

    groups, rest = divmod(length, plan.every)
    whole, parts = length - rest, []
    if groups:
        first = jax.tree.map(lambda leaf: leaf[:whole].reshape(groups, plan.every, *leaf.shape[1:]), variables)
        with inside_scan(groups):
            x, moved = jax.lax.scan(apply_group, x, first, length=groups)
        parts.append(jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), moved))
    if rest:
        with inside_scan(1):
            x, moved = apply_group(x, jax.tree.map(lambda leaf: leaf[whole:], variables), rest)
        parts.append(moved)
    # Variables beside the parameters (counts of random streams, batch statistics) have moved on in copies; the caller's
    # blocks get them back, as nnx.scan would do.
    nnx.update(blocks, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))
    return x


def _store_all_but_slices(operation: Any, *avals: Any, **params: Any) -> bool:
    return operation.name not in SLICE_OPERATIONS
