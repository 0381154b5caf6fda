"""Apply a function to a long sequence one part after the other, so that memory is needed for one part at a time."""

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
    """Return `function(modules, *arrays)`, computed in `num_chunks` parts of the sequence.

    Each array, and each array in the result, has the shape [batch seq …]; the function looks at each position alone.
    The modules are only read. What a chunk computes is never stored: the backward pass computes it again.
    """
    graphdef, state = nnx.split(modules)
    # The gradients of the weights are sums over the chunks. In bfloat16 a small chunk would be lost in such a sum, so
    # the sum is over float32 weights, which each chunk casts back.
    float32_state = jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), state)

    def apply_to_chunk(chunk: tuple[Array, ...]) -> Any:
        weights = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), float32_state, state)
        return function(nnx.merge(graphdef, weights, copy=True), *chunk)

    # The batch stays whole, for it is what the devices share: only the sequence is divided.
    def split_sequence(array: Array) -> Array:
        return array.reshape(array.shape[0], num_chunks, -1, *array.shape[2:]).swapaxes(0, 1)

    # Each chunk is an iteration of a loop, so the compiler cannot merge it with its repetition, and the barriers that
    # prevent_cse adds would only cost time.
    recomputed = jax.checkpoint(apply_to_chunk, prevent_cse=False)
    chunks = jax.lax.map(recomputed, jax.tree.map(split_sequence, arrays))
    return jax.tree.map(_join_sequence, chunks)


def _join_sequence(chunks: Array) -> Array:
    """Turn [chunks batch seq/chunks …] into [batch seq …]."""
    return chunks.swapaxes(0, 1).reshape(chunks.shape[1], -1, *chunks.shape[3:])
