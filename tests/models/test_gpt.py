"""The variants of the decoder-only transformer, and sampling with a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Gpt
from models.gpt import draw_token, sample_tokens
from models.objectives import next_token
from tests.fresh import fresh

SEQ, VOCAB = 12, 32
SMALL = Gpt(num_layers=2, num_heads=4, width=16, hidden=24)
VARIANTS = {
    "default": SMALL,
    "grouped": replace(SMALL, num_kv_heads=2),
    "one_for_all": replace(SMALL, num_kv_heads=1, activation="swiglu", tied=False),
    "gpt2": replace(SMALL, activation="gelu", norm="layernorm", positions="learned", biases=True, context=SEQ),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, SEQ))
variants = pytest.mark.parametrize("option", VARIANTS.values(), ids=VARIANTS)


def built(option: Gpt) -> Any:
    """A model with random weights large enough that everything shows."""
    return nnx.merge(*fresh(option, (SEQ,), VOCAB, 0.2))


def called(model: Any, method: str = "__call__") -> Any:
    """A method as a jitted function."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda *arguments: getattr(nnx.merge(graphdef, state, copy=True), method)(*arguments))


@variants
def test_a_token_does_not_see_the_future(option: Gpt) -> None:
    logits = called(built(option))
    changed = np.concatenate([TOKENS[:, :7], (TOKENS[:, 7:] + 1) % VOCAB], axis=1)
    before, after = logits(TOKENS), logits(changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.abs(before[:, 7:] - after[:, 7:]).min(axis=(0, 2)).max() > 0


@variants
def test_a_cache_changes_nothing(option: Gpt) -> None:
    """Five tokens at once, then one by one: the logits of the whole."""
    model = built(option)
    whole, extend = called(model)(TOKENS), called(model, "extend")
    logits, cache = extend(TOKENS[:, :5], model.empty_cache(2, SEQ), 0)
    rows = [logits]
    for position in range(5, SEQ):
        logits, cache = extend(TOKENS[:, position : position + 1], cache, position)
        rows.append(logits)
    np.testing.assert_allclose(jnp.concatenate(rows, axis=1), whole, atol=1e-5)


@pytest.mark.parametrize("option", [VARIANTS["grouped"], VARIANTS["gpt2"]], ids=["grouped", "gpt2"])
def test_a_sample_is_drawn_from_the_logits_of_the_model(option: Gpt) -> None:
    """Again without a cache: each token, given those before it, by the same key."""
    model, key = built(option), jax.random.key(3)
    drawn = sample_tokens(model, jnp.asarray(TOKENS[0, :4]), SEQ - 4, key, 0.7)
    assert drawn.shape == (SEQ,)
    np.testing.assert_array_equal(drawn[:4], TOKENS[0, :4])
    logits = called(model)(drawn[None])[0]
    for position in range(4, SEQ):
        again = draw_token(logits[position - 1], jax.random.fold_in(key, position), 0.7, None)
        assert int(again) == int(drawn[position])


def test_top_k_draws_from_the_likeliest_only() -> None:
    logits = jnp.array([0.0, 3.0, 2.9, -1.0, 2.8])
    keys = jax.random.split(jax.random.key(0), 200)
    assert set(jax.vmap(lambda key: draw_token(logits, key, 5.0, 2))(keys).tolist()) == {1, 2}
    assert set(jax.vmap(lambda key: draw_token(logits, key, 5.0, None))(keys).tolist()) == {0, 1, 2, 3, 4}
    assert set(jax.vmap(lambda key: draw_token(logits, key, 1e-3, None))(keys).tolist()) == {1}  # cold: the likeliest


def test_learned_positions_end_somewhere() -> None:
    model = built(VARIANTS["gpt2"])
    with pytest.raises(ValueError, match=r"13 tokens are more than the 12 .* \(model.context\)"):
        sample_tokens(model, jnp.asarray(TOKENS[0, :4]), SEQ - 3, jax.random.key(0))
    with pytest.raises(ValueError, match="model.context=12"):
        VARIANTS["gpt2"].build((SEQ + 1,), VOCAB, nnx.Rngs(0))


def test_grouped_heads_share_keys_and_values() -> None:
    """Two heads with one pair of keys and values are two heads with the same pair twice."""
    grouped, full = built(VARIANTS["grouped"]), built(SMALL)
    parts = (full, grouped), (full.blocks, grouped.blocks), (full.blocks.attention, grouped.blocks.attention)
    for (to, source), names in zip(
        parts, [("embed", "norm"), ("ffn", "norm_attention", "norm_ffn"), ("out",)], strict=True
    ):
        for name in names:
            nnx.update(getattr(to, name), nnx.state(getattr(source, name)))
    layers, width, size = 2, SMALL.width, SMALL.width // SMALL.num_heads
    heads = grouped.blocks.attention.qkv.kernel[...].reshape(layers, width, 4 + 2 + 2, size)
    q, k, v = heads[:, :, :4], heads[:, :, 4:6], heads[:, :, 6:]
    repeated = jnp.concatenate([q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)], axis=2)
    full.blocks.attention.qkv.kernel[...] = repeated.reshape(layers, width, -1)
    np.testing.assert_allclose(called(grouped)(TOKENS), called(full)(TOKENS), atol=1e-5)


def test_bits_are_those_of_bytes_only_where_tokens_are_bytes() -> None:
    class Uniform(nnx.Module):
        def __init__(self, vocab: int):
            self.vocab = vocab

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return jnp.zeros((*tokens.shape, self.vocab))

    batch = {"tokens": jnp.asarray(TOKENS)}
    assert next_token(Uniform(256), batch).keys() == {"loss", "bits_per_byte"}
    np.testing.assert_allclose(next_token(Uniform(512), batch)["bits_per_token"], 9.0, rtol=1e-6)


def test_heads_that_do_not_go_into_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=3"):
        Gpt(num_heads=3, width=32, positions="learned")
    with pytest.raises(ValueError, match="num_kv_heads=3"):
        Gpt(num_heads=4, num_kv_heads=3)
