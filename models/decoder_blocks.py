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

from models import Gpt, RotaryScaling
from models.attention import Heads, Segments, find_offsets, find_visible, tag_context
from models.scopes import scope, tag

Tokens = Float[Array, "batch seq width"]
SharedHeads = Float[Array, "batch seq kv_heads head_dim"]
Position = int | Int[Array, ""]
# The position of the first token, or for each token what is added to its index in the row.
Offsets = Position | Int[Array, "batch seq"]


class KeyValueCache(NamedTuple):
    """Keys and values of one layer at every position there will be; of all layers, with one more dimension."""

    keys: Float[Array, "*layers batch total kv_heads head_dim"]
    values: Float[Array, "*layers batch total kv_heads head_dim"]


def rotate_positions(
    x: Heads, base: float = 10_000.0, start: Offsets = 0, scaling: RotaryScaling | None = None
) -> Heads:
    """Return x with rotary position embedding, halves convention (Su et al. 2021, arXiv:2104.09864).

    `start` is the position of the first token, or for each token what is added to its index in the row.
    """
    seq, half = x.shape[1], x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequency = scale_frequencies(frequency, scaling)
    # Angles need float32: in bfloat16 positions beyond 256 would be rounded together.
    angle = (start + jnp.arange(seq, dtype=jnp.float32))[..., None, None] * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def scale_frequencies(frequency: Float[Array, "half"], scaling: RotaryScaling) -> Float[Array, "half"]:
    """Return the angles per token with the slow ones slowed down further, those between interpolated (Llama 3.1)."""
    turns = scaling.original_context * frequency / (2 * jnp.pi)
    low, high = scaling.low_frequency, scaling.high_frequency
    share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - share) * frequency / scaling.factor + share * frequency


def choose_bias(own: bool | None, biases: bool) -> bool:  # noqa: FBT001 - both are fields of the option
    """Return whether a linear map has a bias: as its own field says, or else as all of them."""
    return biases if own is None else own


class Embed(nnx.Embed):
    """An embedding that computes in the precision that its weights have now; flax fixes that of their creation."""

    def __init__(self, num_embeddings: int, features: int, rngs: nnx.Rngs):
        super().__init__(num_embeddings, features, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.dtype = None


class CausalAttention(nnx.Module):
    """Causal self-attention; groups of heads may share keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, option: Gpt, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        self.head_dim = option.head_size
        self.num_heads, self.num_kv_heads = option.num_heads, option.num_kv_heads or option.num_heads
        self.base = option.rotary_base if option.positions == "rotary" else None
        self.scaling = option.rotary_scaling
        self.implementation = option.attention
        init = nnx.initializers.normal(0.02)
        qkv_biases = choose_bias(option.qkv_biases, option.biases)
        out_biases = choose_bias(option.attn_out_biases, option.biases)
        outputs, mixed = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim, self.num_heads * self.head_dim
        self.qkv = nnx.Linear(option.width, outputs, use_bias=qkv_biases, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(mixed, option.width, use_bias=out_biases, kernel_init=residual_init, rngs=rngs)
        epsilon = option.norm_epsilon
        self.q_norm = nnx.RMSNorm(self.head_dim, epsilon=epsilon, rngs=rngs) if option.qk_norm else None
        self.k_norm = nnx.RMSNorm(self.head_dim, epsilon=epsilon, rngs=rngs) if option.qk_norm else None

    @scope("attention")
    def __call__(self, x: Tokens, segments: Segments | None = None) -> Tokens:
        """Return what each token gathers from itself and those before it, of its own document where there are several.

        Positions begin anew with each document.
        """
        start = 0 if segments is None else find_offsets(segments)
        mixed = tag_context(self._mix_values(*self._project_heads(x, start), segments), self.implementation)
        return tag(self.out(mixed.reshape(*x.shape[:2], -1)), "attn_out")

    @scope("attention_core")
    def _mix_values(self, q: Heads, k: SharedHeads, v: SharedHeads, segments: Segments | None) -> Heads:
        mask = None if segments is None else find_visible(segments)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=self.implementation)

    def extend(self, x: Tokens, cache: KeyValueCache, start: Position) -> tuple[Tokens, KeyValueCache]:
        """Return the attention of tokens from position `start` on, and the cache with their keys and values.

        The cache has those of all tokens before `start`.
        """
        q, k, v = self._project_heads(x, start)
        cache = KeyValueCache(
            jax.lax.dynamic_update_slice(cache.keys, k, (0, start, 0, 0)),
            jax.lax.dynamic_update_slice(cache.values, v, (0, start, 0, 0)),
        )
        # One rule makes it causal and hides the positions that are not filled yet: those hold zeros, and softmax would
        # count them.
        visible = jnp.arange(cache.keys.shape[1]) <= start + jnp.arange(x.shape[1])[:, None]
        mixed = jax.nn.dot_product_attention(q, cache.keys, cache.values, mask=visible[None, None])
        return self.out(mixed.reshape(*x.shape[:2], -1)), cache

    def _project_heads(self, x: Tokens, start: Offsets) -> tuple[Heads, SharedHeads, SharedHeads]:
        """Return queries, keys and values, with their positions where those are rotary."""
        heads = tag(self.qkv(x), "qkv").reshape(*x.shape[:2], -1, self.head_dim)
        q, k, v = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.base is None:
            return q, k, v
        q, k = (rotate_positions(part, self.base, start, self.scaling) for part in (q, k))
        return q, k, v


def squared_relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the squared ReLU (So et al. 2021, arXiv:2109.08668).

    It stores one value per hidden unit for the backward pass. A GELU stores several, which made a whole step of the
    default model 1.5 times slower on a CPU (measured).
    """
    return jnp.square(jax.nn.relu(x))


class DecoderFeedForward(nnx.Module):
    """Two linear maps around an activation, here the squared ReLU."""

    activation = staticmethod(squared_relu)

    def __init__(self, option: Gpt, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        init, biases = nnx.initializers.normal(0.02), choose_bias(option.ffn_biases, option.biases)
        self.up = nnx.Linear(option.width, option.hidden, use_bias=biases, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(option.hidden, option.width, use_bias=biases, kernel_init=residual_init, rngs=rngs)

    @scope("ffn")
    def __call__(self, x: Tokens) -> Tokens:
        """Return what is added to each token."""
        return self.down(self.activation(tag(self.up(x), "ffn_pre")))


class GeluFeedForward(DecoderFeedForward):
    """Around a GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), in the approximation that GPT-2 was trained with."""

    activation = staticmethod(partial(jax.nn.gelu, approximate=True))


class ExactGeluFeedForward(DecoderFeedForward):
    """Around a GELU that is not approximated."""

    activation = staticmethod(partial(jax.nn.gelu, approximate=False))


class ReluFeedForward(DecoderFeedForward):
    """Around a ReLU."""

    activation = staticmethod(jax.nn.relu)


class SwiGluFeedForward(DecoderFeedForward):
    """One linear map gates another through a SiLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, option: Gpt, residual_init: nnx.Initializer, rngs: nnx.Rngs):
        super().__init__(option, residual_init, rngs)
        init, biases = nnx.initializers.normal(0.02), choose_bias(option.ffn_biases, option.biases)
        self.gate = nnx.Linear(option.width, option.hidden, use_bias=biases, kernel_init=init, rngs=rngs)

    @scope("ffn")
    def __call__(self, x: Tokens) -> Tokens:
        """Return what is added to each token."""
        gate, up = tag(self.gate(x), "ffn_pre"), tag(self.up(x), "ffn_pre")
        return self.down(jax.nn.silu(gate) * up)


FEED_FORWARDS = {
    "relu2": DecoderFeedForward,
    "relu": ReluFeedForward,
    "gelu": GeluFeedForward,
    "gelu_exact": ExactGeluFeedForward,
    "swiglu": SwiGluFeedForward,
}

# RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467; LayerNorm: Ba et al. 2016.
NORMS = {"rmsnorm": nnx.RMSNorm, "layernorm": nnx.LayerNorm}


def build_norm(option: Gpt, rngs: nnx.Rngs) -> nnx.Module:
    """Return the norm that the option chooses; it takes its statistics in float32."""
    return NORMS[option.norm](option.width, epsilon=option.norm_epsilon, rngs=rngs)


class DecoderBlock(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, option: Gpt, rngs: nnx.Rngs):
        # Residual branches start 1/√(2·layers) smaller, so that the stream keeps its scale (GPT-2 report, §2.3).
        residual_init = nnx.initializers.normal(0.02 / (2 * option.num_layers) ** 0.5)
        self.norm_attention = build_norm(option, rngs)
        self.attention = CausalAttention(option, residual_init, rngs)
        self.norm_ffn = build_norm(option, rngs)
        self.ffn = FEED_FORWARDS[option.activation](option, residual_init, rngs)
        self.dropout = nnx.Dropout(option.dropout, rngs=rngs)

    @scope("block")
    def __call__(self, x: Tokens, segments: Segments | None = None) -> Tokens:
        """Return the stream after this block; `segments` says which document each token belongs to."""
        x = x + self.dropout(self.attention(self.norm_attention(x), segments))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))

    def extend(self, x: Tokens, cache: KeyValueCache, start: Position) -> tuple[Tokens, KeyValueCache]:
        """Return the stream of tokens from position `start` on, and the cache with them; there is no dropout."""
        mixed, cache = self.attention.extend(self.norm_attention(x), cache, start)
        x = x + mixed
        return x + self.ffn(self.norm_ffn(x)), cache
