"""A decoder-only transformer: blocks stacked under one scan, so compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from models import Gpt
from models.decoder_blocks import DecoderBlock, Embed, KeyValueCache, build_norm
from models.scopes import layers
from models.sequence_chunks import map_sequence_chunks


class GPT(nnx.Module):
    """Decoder-only transformer (Radford et al. 2019); its parts and its positions are chosen by the option."""

    def __init__(self, option: Gpt, *, vocab: int, rngs: nnx.Rngs):
        self.num_layers, self.loss_chunks = option.num_layers, option.loss_chunks
        self.embed = Embed(vocab, option.width, rngs)
        self.dropout = nnx.Dropout(option.dropout, rngs=rngs)

        @nnx.split_rngs(splits=option.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> DecoderBlock:
            return DecoderBlock(option, rngs)

        self.blocks = stack(rngs)
        self.norm = build_norm(option, rngs)
        learned = option.positions == "learned"
        self.positions = Embed(option.context, option.width, rngs) if learned else None
        init = nnx.initializers.normal(0.02)
        head = partial(nnx.Linear, option.width, vocab, use_bias=False, kernel_init=init, rngs=rngs)
        self.head = None if option.tied else head()

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        """Logits of the next token at every position."""

        return self._logits(self._through(tokens))

    def map_logits(
        self,
        function: Callable[[Float[Array, "batch part vocab"], Int[Array, "batch part"]], Any],
        tokens: Int[Array, "batch seq"],
        targets: Int[Array, "batch seq"],
    ) -> Any:
        """`function(logits, targets)`, which looks at each position alone, in `loss_chunks` parts of the sequence."""

        def part(last: Any, x: jax.Array, targets: jax.Array) -> Any:
            return function(compute_logits(last, x), targets)

        return map_sequence_chunks(part, self._last, (self._through(tokens), targets), self.loss_chunks)

    def extend(
        self, tokens: Int[Array, "batch seq"], cache: KeyValueCache, start: int | Int[Array, ""]
    ) -> tuple[Float[Array, "batch seq vocab"], KeyValueCache]:
        """The same logits for tokens from position `start` on, when all before them are in the cache; no dropout."""

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
        def through(x: jax.Array, block: DecoderBlock, cache: KeyValueCache) -> tuple[jax.Array, KeyValueCache]:
            return block.extend(x, cache, start)

        x, cache = through(self._embedded(tokens, start), self.blocks, cache)
        return self._logits(x), cache

    @property
    def context(self) -> int | None:
        """The longest sequence there are positions for; None: any."""
        return None if self.positions is None else self.positions.num_embeddings

    def empty_cache(self, batch: int, total: int) -> KeyValueCache:
        """Room for `total` positions, in the precision of the weights. Raises ValueError where there are fewer."""
        if self.context is not None and total > self.context:
            raise ValueError(
                f"{total} tokens are more than the {self.context} that positions are learned for "
                "(model.context); ask for fewer"
            )
        attention = self.blocks.attention
        shape = (self.num_layers, batch, total, attention.num_kv_heads, attention.head_dim)
        return KeyValueCache(*(jnp.zeros(shape, attention.qkv.kernel.dtype) for _ in range(2)))

    def sample(
        self, prompt: Int[Array, "seq"], key: Key[Array, ""], temperature: Float[Array, ""], num_tokens: int
    ) -> Int[Array, "total"]:
        """`prompt` and `num_tokens` more tokens after it."""
        return sample_tokens(self, prompt, num_tokens, key, temperature)

    def _embedded(
        self, tokens: Int[Array, "batch seq"], start: int | Int[Array, ""]
    ) -> Float[Array, "batch seq width"]:
        x = self.embed(tokens)
        return x if self.positions is None else x + self.positions(start + jnp.arange(tokens.shape[1]))

    def _through(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq width"]:
        return layers(self.blocks, self.dropout(self._embedded(tokens, 0)), self.num_layers)

    @property
    def _last(self) -> tuple[nnx.Module, Embed | nnx.Linear]:
        """What makes logits: the norm, and the output layer."""
        return self.norm, self.head or self.embed

    def _logits(self, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq vocab"]:
        return compute_logits(self._last, x)


def compute_logits(
    last: tuple[nnx.Module, Embed | nnx.Linear], x: Float[Array, "batch seq width"]
) -> Float[Array, "batch seq vocab"]:
    """What the last norm and the output layer make of the stream."""
    build_norm, head = last
    return head.attend(build_norm(x)) if isinstance(head, Embed) else head(build_norm(x))


def sample_tokens(
    model: GPT,
    prompt: Int[Array, "seq"],
    num_tokens: int,
    key: Key[Array, ""],
    temperature: float | Float[Array, ""] = 0.8,
    top_k: int | None = None,
) -> Int[Array, "total"]:
    """`prompt` and `num_tokens` more tokens after it, each drawn from the `top_k` likeliest (null: from all).

    The prompt goes through the model at once; then each token alone, with the keys and values of those before it.
    Raises ValueError where the whole is longer than a model with learned positions can take.
    """
    start, total = prompt.shape[0], prompt.shape[0] + num_tokens
    graphdef, state = nnx.split(model)

    def extended(
        tokens: jax.Array, cache: KeyValueCache, position: int | Int[Array, ""]
    ) -> tuple[jax.Array, KeyValueCache]:
        compute_logits, cache = nnx.merge(graphdef, state, copy=True).extend(tokens, cache, position)
        return compute_logits[0, -1], cache

    def one_more(
        carry: tuple[jax.Array, KeyValueCache], position: Int[Array, ""]
    ) -> tuple[tuple[jax.Array, KeyValueCache], Int[Array, ""]]:
        compute_logits, cache = carry
        token = draw_token(compute_logits, jax.random.fold_in(key, position), temperature, top_k)
        return extended(token[None, None], cache, position), token

    first = extended(prompt[None], model.empty_cache(1, total), 0)
    _, tokens = jax.lax.scan(one_more, first, jnp.arange(start, total))
    return jnp.concatenate([prompt, tokens.astype(prompt.dtype)])


def draw_token(
    logits: Float[Array, "vocab"], key: Key[Array, ""], temperature: float | Float[Array, ""], top_k: int | None
) -> Int[Array, ""]:
    """A token from softmax(logits / temperature), in float32; of the `top_k` likeliest where that is a number."""
    compute_logits = compute_logits.astype(jnp.float32)
    if top_k is not None:
        compute_logits = jnp.where(
            compute_logits < jax.lax.top_k(compute_logits, top_k)[0][-1], -jnp.inf, compute_logits
        )
    return jax.random.categorical(key, compute_logits / temperature)
