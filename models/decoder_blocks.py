"""The parts that decoder-only transformers are made of: pre-norm block, causal self-attention, feed-forward.

Which norm and which feed-forward a model has are two mappings; nothing here asks for a choice twice.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import Gpt
from models.attention import tag_context
from models.scopes import scope, tag

Tokens = Float[Array, "batch seq width"]
Heads = Float[Array, "batch seq heads head_dim"]
SharedHeads = Float[Array, "batch seq kv_heads head_dim"]


class KeyValueCache(NamedTuple):
    """Keys and values of one layer (of all layers: one more dimension), at every position there will be."""

    keys: Float[Array, "*layers batch total kv_heads head_dim"]
    values: Float[Array, "*layers batch total kv_heads head_dim"]


def rotate_positions(x: Heads, base: float = 10_000.0, start: int | Int[Array, ""] = 0) -> Heads:
    """Rotary position embedding, halves convention (Su et al. 2021, arXiv:2104.09864); `start`: the first position."""
    seq, half = x.shape[1], x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (start + jnp.arange(seq, dtype=jnp.float32))[:, None, None] * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Embed(nnx.Embed):
    """An embedding that computes in the precision its weights have now; flax fixes that of their creation."""

    def __init__(self, num_embeddings: int, features: int, rngs: nnx.Rngs):
        super().__init__(num_embeddings, features, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.dtype = None


class CausalAttention(nnx.Module):
    """Causal self-attention; groups of heads may share keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, option: Gpt, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        self.head_dim = option.width // option.num_heads
        self.num_heads, self.num_kv_heads = option.num_heads, option.num_kv_heads or option.num_heads
        self.base = option.rotary_base if option.positions == "rotary" else None
        self.implementation = option.attention
        init, biases = nnx.initializers.normal(0.02), option.biases
        outputs = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = nnx.Linear(option.width, outputs, use_bias=biases, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(option.width, option.width, use_bias=biases, kernel_init=residual_init, rngs=rngs)

    @scope("attention")
    def __call__(self, x: Tokens) -> Tokens:
        mixed = tag_context(self._mixed(*self._heads(x, 0)), self.implementation)
        return tag(self.out(mixed.reshape(x.shape)), "attn_out")

    @scope("attention_core")
    def _mixed(self, q: Heads, k: SharedHeads, v: SharedHeads) -> Heads:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.implementation)

    def extend(self, x: Tokens, cache: KeyValueCache, start: int | Int[Array, ""]) -> tuple[Tokens, KeyValueCache]:
        """The same for tokens from position `start` on; what came before is in the cache, and they are put there."""
        q, k, v = self._heads(x, start)
        cache = KeyValueCache(
            *(jax.lax.dynamic_update_slice(old, new, (0, start, 0, 0)) for old, new in zip(cache, (k, v), strict=True))
        )
        seen = jnp.arange(cache.keys.shape[1]) <= start + jnp.arange(x.shape[1])[:, None]
        mixed = jax.nn.dot_product_attention(q, *cache, mask=seen[None, None])
        return self.out(mixed.reshape(x.shape)), cache

    def _heads(self, x: Tokens, start: int | Int[Array, ""]) -> tuple[Heads, SharedHeads, SharedHeads]:
        heads = tag(self.qkv(x), "qkv").reshape(*x.shape[:2], -1, self.head_dim)
        q, k, v = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        if self.base is None:
            return q, k, v
        return rotate_positions(q, self.base, start), rotate_positions(k, self.base, start), v


def squared_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Squared ReLU (So et al. 2021, arXiv:2109.08668).

    It stores one value per hidden unit for the backward pass; a GELU stores several, which made a whole step of the
    default model 1.5 times slower on a CPU (measured).
    """
    return jnp.square(jax.nn.relu(x))


class DecoderFeedForward(nnx.Module):
    """Two linear maps around an activation."""

    activation = staticmethod(squared_relu)

    def __init__(self, option: Gpt, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        init, biases = nnx.initializers.normal(0.02), option.biases
        self.up = nnx.Linear(option.width, option.hidden, use_bias=biases, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(option.hidden, option.width, use_bias=biases, kernel_init=residual_init, rngs=rngs)

    @scope("ffn")
    def __call__(self, x: Tokens) -> Tokens:
        return self.down(self.activation(tag(self.up(x), "ffn_pre")))


class GeluFeedForward(DecoderFeedForward):
    """Around a GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), in the approximation that GPT-2 was trained with."""

    activation = staticmethod(partial(jax.nn.gelu, approximate=True))


class SwiGluFeedForward(DecoderFeedForward):
    """One linear map gates another through a SiLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, option: Gpt, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        super().__init__(option, residual_init, rngs)
        init = nnx.initializers.normal(0.02)
        self.gate = nnx.Linear(option.width, option.hidden, use_bias=option.biases, kernel_init=init, rngs=rngs)

    @scope("ffn")
    def __call__(self, x: Tokens) -> Tokens:
        gate, up = tag(self.gate(x), "ffn_pre"), tag(self.up(x), "ffn_pre")
        return self.down(jax.nn.silu(gate) * up)


FEED_FORWARD = {"relu2": DecoderFeedForward, "gelu": GeluFeedForward, "swiglu": SwiGluFeedForward}
NORMS = {"rmsnorm": nnx.RMSNorm, "layernorm": nnx.LayerNorm}  # Zhang & Sennrich 2019, arXiv:1910.07467; Ba et al. 2016


def build_norm(option: Gpt, rngs: nnx.Rngs) -> nnx.Module:
    """The norm that is chosen; statistics in float32."""
    return NORMS[option.norm](option.width, epsilon=option.norm_epsilon, rngs=rngs)


class DecoderBlock(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, option: Gpt, rngs: nnx.Rngs):
        # Residual branches start 1/√(2·layers) smaller, so that the stream keeps its scale (GPT-2 report, §2.3).
        residual_init = nnx.initializers.normal(0.02 / (2 * option.num_layers) ** 0.5)
        self.norm_attention = build_norm(option, rngs)
        self.attention = CausalAttention(option, residual_init, rngs)
        self.norm_ffn = build_norm(option, rngs)
        self.ffn = FEED_FORWARD[option.activation](option, residual_init, rngs)
        self.dropout = nnx.Dropout(option.dropout, rngs=rngs)

    @scope("block")
    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))

    def extend(self, x: Tokens, cache: KeyValueCache, start: int | Int[Array, ""]) -> tuple[Tokens, KeyValueCache]:
        """The same with a cache, and without dropout: it is for sampling."""
        mixed, cache = self.attention.extend(self.norm_attention(x), cache, start)
        x = x + mixed
        return x + self.ffn(self.norm_ffn(x)), cache
