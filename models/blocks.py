"""The parts transformers are made of: pre-norm block, causal self-attention with rotary positions, feed-forward."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.scopes import scope


@runtime_checkable
class BlockShape(Protocol):
    """What a block needs to know of its model's options."""

    @property
    def num_heads(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def dropout(self) -> float: ...


def rotate(
    x: Float[Array, "batch seq heads head_dim"], base: float = 10_000.0
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary position embedding, halves convention (Su et al. 2021, arXiv:2104.09864)."""
    seq, half = x.shape[1], x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(seq, dtype=jnp.float32)[:, None, None] * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Attention(nnx.Module):
    """Causal multi-head self-attention without biases."""

    def __init__(self, shape: BlockShape, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        self.num_heads = shape.num_heads
        init = nnx.initializers.normal(0.02)
        self.qkv = nnx.Linear(shape.width, 3 * shape.width, use_bias=False, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(shape.width, shape.width, use_bias=False, kernel_init=residual_init, rngs=rngs)

    @scope("attention")
    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        batch, seq, width = x.shape
        qkv = self.qkv(x).reshape(batch, seq, 3, self.num_heads, width // self.num_heads)
        q, k, v = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.reshape(batch, seq, width))


class FeedForward(nnx.Module):
    """Two linear maps around a squared ReLU (So et al. 2021, arXiv:2109.08668).

    It stores one value per hidden unit for the backward pass; a GELU stores several, which made a whole step of the
    default model 1.5 times slower on a CPU (measured).
    """

    def __init__(self, shape: BlockShape, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.up = nnx.Linear(shape.width, shape.hidden, use_bias=False, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(shape.hidden, shape.width, use_bias=False, kernel_init=residual_init, rngs=rngs)

    @scope("ffn")
    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


class Block(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, shape: BlockShape, num_layers: int, rngs: nnx.Rngs):
        # Residual branches start 1/√(2·layers) smaller, so that the stream keeps its scale (GPT-2 report, §2.3).
        residual_init = nnx.initializers.normal(0.02 / (2 * num_layers) ** 0.5)
        self.norm_attention = nnx.RMSNorm(shape.width, rngs=rngs)
        self.attention = Attention(shape, residual_init, rngs)
        self.norm_ffn = nnx.RMSNorm(shape.width, rngs=rngs)
        self.ffn = FeedForward(shape, residual_init, rngs)
        self.dropout = nnx.Dropout(shape.dropout, rngs=rngs)

    @scope("block")
    def __call__(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq width"]:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))
