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
from models.attention import Segments, find_offsets
from models.decoder_blocks import DecoderBlock, Embed, KeyValueCache, Offsets, Position, build_norm
from models.scopes import layers
from models.sequence_chunks import map_sequence_chunks

# What makes logits of the stream: a norm, and an output layer, which may be the embedding.
OutputLayers = tuple[nnx.Module, Embed | nnx.Linear]


class GPT(nnx.Module):
    """Decoder-only transformer (Radford et al. 2019); its parts and its positions are chosen by the option."""

    def __init__(self, option: Gpt, *, vocab: int, rngs: nnx.Rngs):
        self.num_layers, self.loss_chunks, self.window = option.num_layers, option.loss_chunks, option.window
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
        build_head = partial(nnx.Linear, option.width, vocab, use_bias=False, kernel_init=init, rngs=rngs)
        self.head = None if option.tied else build_head()

    def __call__(
        self, tokens: Int[Array, "batch seq"], segments: Segments | None = None
    ) -> Float[Array, "batch seq vocab"]:
        """Return the logits of the next token at every position.

        Where `segments` numbers the documents of a row, each is as if it were alone.
        """
        return compute_logits(self._output_layers, self._run_blocks(tokens, segments))

    def map_logits(
        self,
        function: Callable[[Float[Array, "batch part vocab"], Int[Array, "batch part"]], Any],
        tokens: Int[Array, "batch seq"],
        targets: Int[Array, "batch seq"],
        segments: Segments | None = None,
    ) -> Any:
        """Return `function(logits, targets)`, computed in `loss_chunks` parts of the sequence.

        The function looks at each position alone.
        """

        def apply_to_part(output_layers: OutputLayers, x: jax.Array, targets: jax.Array) -> Any:
            return function(compute_logits(output_layers, x), targets)

        arrays = (self._run_blocks(tokens, segments), targets)
        return map_sequence_chunks(apply_to_part, self._output_layers, arrays, self.loss_chunks)

    def extend(
        self, tokens: Int[Array, "batch seq"], cache: KeyValueCache, start: Position
    ) -> tuple[Float[Array, "batch seq vocab"], KeyValueCache]:
        """Return the logits of tokens from position `start` on, and the cache with them; there is no dropout.

        All tokens before `start` are in the cache.
        """

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
        def extend_block(x: jax.Array, block: DecoderBlock, cache: KeyValueCache) -> tuple[jax.Array, KeyValueCache]:
            return block.extend(x, cache, start)

        x, cache = extend_block(self._embed_tokens(tokens, start), self.blocks, cache)
        return compute_logits(self._output_layers, x), cache

    @property
    def context(self) -> int | None:
        """The longest sequence there are positions for, and that attention was trained to see; None: any."""
        lengths = [None if self.positions is None else self.positions.num_embeddings, self.window]
        return min((length for length in lengths if length is not None), default=None)

    def empty_cache(self, batch: int, total: int) -> KeyValueCache:
        """Return room for `total` positions, in the precision of the weights.

        Raises ValueError where the model has fewer learned positions, or was trained to look less far back.
        """
        if self.context is not None and total > self.context:
            what, key = ("attention was trained to look back", "window")
            if self.context != self.window:
                what, key = ("positions are learned for", "context")
            raise ValueError(
                f"{total} tokens are more than the {self.context} that {what} (model.{key}); ask for fewer"
            )
        attention = self.blocks.attention
        shape = (self.num_layers, batch, total, attention.num_kv_heads, attention.head_dim)
        dtype = attention.qkv.kernel.dtype
        return KeyValueCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    def sample(
        self, prompt: Int[Array, "seq"], key: Key[Array, ""], temperature: Float[Array, ""], num_tokens: int
    ) -> Int[Array, "total"]:
        """Return `prompt` and `num_tokens` more tokens after it."""
        return sample_tokens(self, prompt, num_tokens, key, temperature)

    def _embed_tokens(self, tokens: Int[Array, "batch seq"], start: Offsets) -> Float[Array, "batch seq width"]:
        x = self.embed(tokens)
        return x if self.positions is None else x + self.positions(start + jnp.arange(tokens.shape[1]))

    def _run_blocks(
        self, tokens: Int[Array, "batch seq"], segments: Segments | None = None
    ) -> Float[Array, "batch seq width"]:
        start = 0 if segments is None else find_offsets(segments)
        return layers(self.blocks, self.dropout(self._embed_tokens(tokens, start)), self.num_layers, segments)

    @property
    def _output_layers(self) -> OutputLayers:
        return self.norm, self.head or self.embed


def compute_logits(output_layers: OutputLayers, x: Float[Array, "batch seq width"]) -> Float[Array, "batch seq vocab"]:
    """Return what the last norm and the output layer make of the stream."""
    norm, head = output_layers
    return head.attend(norm(x)) if isinstance(head, Embed) else head(norm(x))


def sample_tokens(
    model: GPT,
    prompt: Int[Array, "seq"],
    num_tokens: int,
    key: Key[Array, ""],
    temperature: float | Float[Array, ""] = 0.8,
    top_k: int | None = None,
) -> Int[Array, "total"]:
    """Return `prompt` and `num_tokens` more tokens, each drawn from the `top_k` likeliest (None: from all).

    Raises ValueError where the whole is longer than a model with learned positions can take.
    """
    start, total = prompt.shape[0], prompt.shape[0] + num_tokens
    graphdef, state = nnx.split(model)

    # jax.lax.scan knows nothing of flax's variables, so the model is split here and put together inside.
    def extend_model(tokens: jax.Array, cache: KeyValueCache, position: Position) -> tuple[jax.Array, KeyValueCache]:
        logits, cache = nnx.merge(graphdef, state, copy=True).extend(tokens, cache, position)
        return logits[0, -1], cache

    def add_token(
        carry: tuple[jax.Array, KeyValueCache], position: Int[Array, ""]
    ) -> tuple[tuple[jax.Array, KeyValueCache], Int[Array, ""]]:
        logits, cache = carry
        token = draw_token(logits, jax.random.fold_in(key, position), temperature, top_k)
        return extend_model(token[None, None], cache, position), token

    # The prompt goes through the model at once; then each token alone, with the keys and values of those before it.
    first = extend_model(prompt[None], model.empty_cache(1, total), 0)
    _, tokens = jax.lax.scan(add_token, first, jnp.arange(start, total))
    return jnp.concatenate([prompt, tokens.astype(prompt.dtype)])


def draw_token(
    logits: Float[Array, "vocab"], key: Key[Array, ""], temperature: float | Float[Array, ""], top_k: int | None
) -> Int[Array, ""]:
    """Return a token drawn from softmax(logits / temperature), in float32; of the `top_k` likeliest if not None."""
    logits = logits.astype(jnp.float32)
    if top_k is not None:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature)
