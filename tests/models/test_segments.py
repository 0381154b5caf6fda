"""Conversations that share a row: each is as if it were alone, and nothing but answers is learnt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Gpt, InvalidModelOrObjective
from models.attention import find_offsets
from models.objectives import count_answers, make_objective
from models.remat_plan import RematPlan
from models.scopes import use_plan
from tests.fresh import fresh

SEQ, VOCAB = 16, 32
SMALL = Gpt(num_layers=3, num_heads=4, width=16, hidden=24)
VARIANTS = {
    "rotary": SMALL,
    "grouped": replace(SMALL, num_kv_heads=2, activation="swiglu", tied=False),
    "learned": replace(SMALL, activation="gelu", norm="layernorm", positions="learned", biases=True, context=SEQ),
    "chunks": replace(SMALL, loss_chunks=4),
}
LENGTHS = (7, 5, 3)  # and two tokens of padding
variants = pytest.mark.parametrize("option", VARIANTS.values(), ids=VARIANTS)


def built(option: Gpt) -> Any:
    """What makes a model of its parameters, and these."""
    graphdef, params, rest = fresh(option, (SEQ,), VOCAB, 0.2)
    return lambda params: nnx.merge(graphdef, params, rest, copy=True), params


def rows(lengths: tuple[int, ...], tokens: np.ndarray, answers: np.ndarray) -> dict[str, np.ndarray]:
    """One row that holds documents of these lengths, one after the other."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    pad = SEQ + 1 - len(segments)
    return {
        "tokens": np.pad(tokens, (0, pad))[None].astype(np.int32),
        "answers": np.pad(answers, (0, pad))[None].astype(np.uint8),
        "segments": np.pad(segments, (0, pad))[None].astype(np.int32),
    }


@pytest.fixture
def documents() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A packed row, and a row for each of its documents."""
    draw = np.random.default_rng(0)
    tokens, answers = draw.integers(0, VOCAB, sum(LENGTHS)), draw.integers(0, 2, sum(LENGTHS))
    answers[np.cumsum([0, *LENGTHS[:-1]])] = 1  # of a first token, which nothing foretells
    ends = np.cumsum(LENGTHS)
    alone = [
        rows((size,), tokens[end - size : end], answers[end - size : end])
        for size, end in zip(LENGTHS, ends, strict=True)
    ]
    return rows(LENGTHS, tokens, answers), alone


def stack(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in batch.items()}


def loss_of(make: Any, batch: dict[str, np.ndarray]) -> Any:
    """The loss of a batch as the train step has it: each row weighs as much as it has answers."""
    objective = make_objective("sft", VOCAB)

    def loss(state: Any, tokens: Any) -> jax.Array:
        whole = {**on_device(batch), "tokens": jnp.asarray(tokens)}
        weights = objective.weigh(whole) if objective.weigh else None
        found = objective(make(state), whole, jnp.ones(len(tokens)))["loss"]
        return (found * weights).sum() / weights.sum()

    return loss


@variants
def test_logits_are_those_of_each_alone(option: Gpt, documents: Any) -> None:
    packed, alone = documents
    make, state = built(option)
    call = jax.jit(lambda batch: make(state)(batch["tokens"][:, :-1], batch["segments"][:, :-1]))
    together, start = np.asarray(call(packed)), 0
    for size, one in zip(LENGTHS, alone, strict=True):
        each = np.asarray(call(one))[0, :size]
        np.testing.assert_allclose(together[0, start : start + size], each, rtol=0, atol=2e-6)
        # As a model that is told of no documents has it: positions begin anew.
        plain = make(state)(jnp.asarray(one["tokens"][:, :size]))
        np.testing.assert_allclose(each, plain[0], rtol=0, atol=2e-6)
        start += size
    assert np.abs(together).max() > 0.1


@variants
@pytest.mark.parametrize("scopes", [(), ("block",), ("attention_core",)], ids=str)
def test_loss_and_gradients_are_those_of_each_alone(option: Gpt, scopes: tuple[str, ...], documents: Any) -> None:
    packed, alone = documents
    make, state = built(option)
    with use_plan(RematPlan(scopes=frozenset(scopes))):
        found, grads = jax.jit(jax.value_and_grad(loss_of(make, packed)))(state, packed["tokens"])
        expected, wanted = jax.jit(jax.value_and_grad(loss_of(make, stack(alone))))(state, stack(alone)["tokens"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for mine, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * largest)


def test_every_second_block_recomputed_is_the_same(documents: Any) -> None:
    packed, _ = documents
    make, state = built(SMALL)
    plain = jax.jit(loss_of(make, packed))(state, packed["tokens"])
    with use_plan(RematPlan(scopes=frozenset({"block"}), every=2)):
        np.testing.assert_allclose(jax.jit(loss_of(make, packed))(state, packed["tokens"]), plain, rtol=1e-6)


def test_what_is_no_answer_has_no_gradient(documents: Any) -> None:
    """Not a small one: exactly zero, for the logits of every token that is not learnt, infinite or not."""
    packed, _ = documents
    tokens, segments = packed["tokens"], packed["segments"]
    learnt = (packed["answers"][:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])

    class Given(nnx.Module):
        def __init__(self, logits: jax.Array):
            self.logits = nnx.Param(logits)

        def __call__(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
            return self.logits[...]

    logits = jax.random.normal(jax.random.key(0), (1, SEQ, VOCAB))
    graphdef, state = nnx.split(Given(logits))
    gradient = jax.grad(loss_of(lambda state: nnx.merge(graphdef, state), packed))(state, jnp.asarray(tokens))
    (gradient,) = jax.tree.leaves(gradient)
    moved = np.abs(np.asarray(gradient)).max(axis=-1) > 0
    np.testing.assert_array_equal(moved, learnt)
    assert 0 < learnt.sum() == count_answers(on_device(packed))[0] < SEQ
    assert np.all(np.asarray(gradient)[~learnt] == 0.0)


def test_positions_begin_anew() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    positions = np.arange(8) + np.asarray(find_offsets(jnp.asarray(segments)))
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 1, 0, 0, 1], range(8)])


def test_a_model_that_cannot_be_told_is_refused(documents: Any) -> None:
    class Blind(nnx.Module):
        def __call__(self, tokens: jax.Array) -> jax.Array:
            return jnp.zeros((*tokens.shape, VOCAB))

    packed, _ = documents
    objective, packed = make_objective("sft", VOCAB), on_device(packed)
    with pytest.raises(InvalidModelOrObjective, match="Blind: several conversations share a row.*data.packing=false"):
        objective(Blind(), packed, jnp.ones(1))
    unpacked = {name: value for name, value in packed.items() if name != "segments"}
    np.testing.assert_allclose(objective(Blind(), unpacked, jnp.ones(1))["loss"], np.log(VOCAB), rtol=1e-6)
