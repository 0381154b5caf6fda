"""A function of a long sequence, computed for one part of it after the other: memory for one part at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


def map_sequence_chunks(
    function: Callable[..., Any],
    modules: Any,
    arrays: tuple[Array, ...],
    num_chunks: int,
) -> Any:
    """`function(modules, *arrays)`, where each array and each result is [batch seq …], in chunks of the sequence.

    What a chunk computes is computed again in the backward pass, and never stored. The batch stays whole, for it is
    what the devices share. Modules are only read. Gradients of their weights are summed over the chunks in float32: in
    bfloat16 small chunks would be lost in the sum.
    """
    graphdef, state = nnx.split(modules)
    raised = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), state)

    def one(chunk: tuple[Array, ...]) -> Any:
        weights = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), raised, state)
        return function(nnx.merge(graphdef, weights, copy=True), *chunk)

    def divided(array: Array) -> Array:
        return array.reshape(array.shape[0], num_chunks, -1, *array.shape[2:]).swapaxes(0, 1)

    # Each chunk is an iteration, so no barrier is needed that keeps the compiler from merging it with its repetition.
    return jax.tree.map(_joined, jax.lax.map(jax.checkpoint(one, prevent_cse=False), jax.tree.map(divided, arrays)))


def _joined(chunks: Array) -> Array:
    """[chunks batch seq/chunks …] → [batch seq …]."""
    return chunks.swapaxes(0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])
