"""A byte- or token-level GPT: pre-norm blocks stacked under one scan, so compile time does not grow with depth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models import Gpt
from models.blocks import Block
from models.scopes import scanned


class GPT(nnx.Module):
    """Decoder-only transformer (Radford et al. 2019) with rotary positions, RMS norms and tied embeddings."""

    def __init__(self, option: Gpt, *, vocab: int, rngs: nnx.Rngs):
        self.num_layers = option.num_layers
        self.embed = nnx.Embed(vocab, option.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.dropout = nnx.Dropout(option.dropout, rngs=rngs)

        @nnx.split_rngs(splits=option.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(option, option.num_layers, rngs)

        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(option.width, rngs=rngs)

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token at every position."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        with scanned(self.num_layers):
            x = through(self.dropout(self.embed(tokens)), self.blocks)
        return self.embed.attend(self.norm(x))

    def sample(
        self, prompt: Int[Array, "seq"], key: Key[Array, ""], temperature: Float[Array, ""], num_tokens: int
    ) -> Int[Array, "total"]:
        """`prompt` and `num_tokens` more tokens after it."""
        return sample(self, prompt, num_tokens, key, temperature)


def sample(
    model: GPT,
    prompt: Int[Array, "seq"],
    num_tokens: int,
    key: Key[Array, ""],
    temperature: float | Float[Array, ""] = 0.8,
) -> Int[Array, "total"]:
    """`prompt` and `num_tokens` more tokens after it. One forward pass over the whole length per token, no cache."""
    start, total = prompt.shape[0], prompt.shape[0] + num_tokens
    tokens = jnp.zeros((1, total), jnp.int32).at[0, :start].set(prompt)
    graphdef, state = nnx.split(model)

    def extend(position: Int[Array, ""], tokens: Int[Array, "1 total"]) -> Int[Array, "1 total"]:
        logits = nnx.merge(graphdef, state, copy=True)(tokens)[0, position - 1]
        token = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        return tokens.at[0, position].set(token)

    return jax.lax.fori_loop(start, total, extend, tokens)[0]
