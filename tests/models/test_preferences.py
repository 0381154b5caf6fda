"""Direct preference optimization: its numbers against their definition, and against a model of transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Dpo, Gpt, InvalidModelOrObjective, NamedObjective
from models.preferences import make_dpo
from tests.checkpoint.test_hf_weights import load_ours
from tests.fresh import fresh
from tests.hf_folders import SEQ as THEIR_SEQ
from tests.hf_folders import VOCAB as THEIR_VOCAB
from tests.hf_folders import make_theirs

SEQ, VOCAB, PAIRS, BETA = 12, 32, 3, 0.3
SMALL = Gpt(num_layers=2, num_heads=2, width=16, hidden=24)


def make_pairs(seq: int, vocab: int) -> dict[str, np.ndarray]:
    """Return pairs of a prompt of four tokens and answers of several lengths, filled up with zeros."""
    draw = np.random.default_rng(0)
    tokens, answers = np.zeros((PAIRS, 2, seq + 1), np.int32), np.zeros((PAIRS, 2, seq + 1), np.uint8)
    for pair in range(PAIRS):
        prompt = draw.integers(1, vocab, 4)
        for side in range(2):
            length = int(draw.integers(2, seq - 3))
            tokens[pair, side, : 4 + length] = [*prompt, *draw.integers(1, vocab, length)]
            answers[pair, side, 4 : 4 + length] = 1
    return {"tokens": tokens, "answers": answers}


@pytest.fixture
def models() -> tuple[Any, Any, Any]:
    """What makes a model of parameters, those now, and those as training began."""
    graphdef, params, rest = fresh(SMALL, (SEQ,), VOCAB, 0.2)
    before = jax.tree.map(lambda leaf: leaf * 0.9, params)
    return lambda params: nnx.merge(graphdef, params, rest, copy=True), params, before


def sum_by_hand(model: nnx.Module, tokens: np.ndarray, answers: np.ndarray) -> float:
    """Return the log-probability of the answer of one conversation, which is alone and without padding."""
    length = int(np.flatnonzero(answers)[-1]) + 1
    logits = model(jnp.asarray(tokens[None, : length - 1]))[0].astype(jnp.float32)
    each = jax.nn.log_softmax(logits)[jnp.arange(length - 1), tokens[1:length]]
    return float((each * answers[1:length]).sum())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_its_numbers_are_those_of_the_definition(smoothing: float, models: Any) -> None:
    make, params, before = models
    batch = make_pairs(SEQ, VOCAB)
    objective = make_dpo(BETA, smoothing, VOCAB)
    found = objective(make(params), jax.tree.map(jnp.asarray, batch), jnp.ones(PAIRS), make(before))
    for pair in range(PAIRS):
        chosen, rejected = (
            BETA
            * (
                sum_by_hand(make(params), batch["tokens"][pair, side], batch["answers"][pair, side])
                - sum_by_hand(make(before), batch["tokens"][pair, side], batch["answers"][pair, side])
            )
            for side in range(2)
        )
        margin = chosen - rejected
        loss = -(1 - smoothing) * np.log(1 / (1 + np.exp(-margin))) - smoothing * np.log(1 / (1 + np.exp(margin)))
        expected = {"loss": loss, "margin": margin, "chosen_reward": chosen, "rejected_reward": rejected}
        for name, value in expected.items():
            assert float(found[name][pair]) == pytest.approx(value, abs=2e-5), name
        assert float(found["accuracy"][pair]) == (margin > 0)


def test_a_model_that_has_not_moved_has_no_reward(models: Any) -> None:
    make, params, _ = models
    batch = jax.tree.map(jnp.asarray, make_pairs(SEQ, VOCAB))
    found = make_dpo(BETA, 0.0, VOCAB)(make(params), batch, jnp.ones(PAIRS), make(params))
    assert not found["margin"].any()
    np.testing.assert_allclose(found["loss"], np.log(2), rtol=1e-6)


def test_its_gradient_is_that_of_the_definition(models: Any) -> None:
    """It is −β σ(−margin) (∇ log π(chosen) − ∇ log π(rejected)), equation 5 of the paper: none goes to the reference."""
    make, params, before = models
    batch = jax.tree.map(jnp.asarray, make_pairs(SEQ, VOCAB))
    objective = make_dpo(BETA, 0.0, VOCAB)

    def loss(params: Any, before: Any) -> Any:
        return objective(make(params), batch, jnp.ones(PAIRS), make(before))["loss"].sum()

    def difference(params: Any, weights: Any) -> Any:
        from models.preferences import sum_log_probabilities

        both = sum_log_probabilities(make(params), batch, VOCAB)
        return (weights * (both[:, 0] - both[:, 1])).sum()

    ours, theirs = jax.jit(jax.grad(loss, (0, 1)))(params, before)
    margin = objective(make(params), batch, jnp.ones(PAIRS), make(before))["margin"]
    expected = jax.jit(jax.grad(difference))(params, -BETA * jax.nn.sigmoid(-margin))
    jax.tree.map(lambda mine, other: np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6), ours, expected)
    assert not any(leaf.any() for leaf in jax.tree.leaves(theirs))


def test_what_is_in_the_padding_changes_nothing(models: Any) -> None:
    make, params, before = models
    batch = make_pairs(SEQ, VOCAB)
    objective = make_dpo(BETA, 0.0, VOCAB)
    dirty = {**batch, "tokens": np.where(batch["tokens"] == 0, 7, batch["tokens"])}
    first, second = (
        objective(make(params), jax.tree.map(jnp.asarray, each), jnp.ones(PAIRS), make(before))["margin"]
        for each in (batch, dirty)
    )
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_in_chunks_it_is_the_same(models: Any) -> None:
    make, params, before = models
    graphdef, _, rest = fresh(replace(SMALL, loss_chunks=4), (SEQ,), VOCAB, 0.2)
    batch, objective = jax.tree.map(jnp.asarray, make_pairs(SEQ, VOCAB)), make_dpo(BETA, 0.0, VOCAB)
    chunked = [nnx.merge(graphdef, each, rest, copy=True) for each in (params, before)]
    whole = objective(make(params), batch, jnp.ones(PAIRS), make(before))["margin"]
    np.testing.assert_allclose(objective(chunked[0], batch, jnp.ones(PAIRS), chunked[1])["margin"], whole, atol=1e-5)


def test_data_that_is_no_pairs_is_told(models: Any) -> None:
    make, params, _ = models
    batch = {name: jnp.asarray(value[:, 0]) for name, value in make_pairs(SEQ, VOCAB).items()}
    with pytest.raises(InvalidModelOrObjective, match=r"learns from pairs, tokens Int\[batch 2 seq\+1\]"):
        make_dpo(BETA, 0.0, VOCAB)(make(params), batch, jnp.ones(PAIRS), make(params))


def test_the_usual_objective_of_pairs_is_this_one() -> None:
    assert NamedObjective().build("dpo", VOCAB, ignored=None).compares
    assert Dpo(beta=0.5).build("dpo", VOCAB, ignored=None).compares
    assert not NamedObjective().build("sft", VOCAB, ignored=None).compares


def test_a_model_of_transformers_gives_the_same_loss(tmp_path: Path) -> None:
    """Policy and reference in torch, each answer scored as trl does: the sum over the tokens of its completion."""
    torch = pytest.importorskip("torch")
    batch = make_pairs(THEIR_SEQ, THEIR_VOCAB)
    tokens = torch.tensor(batch["tokens"], dtype=torch.long).reshape(2 * PAIRS, -1)
    mask = torch.tensor(batch["answers"][..., 1:], dtype=torch.float32).reshape(2 * PAIRS, -1)

    def sum_theirs(model: Any) -> Any:
        with torch.no_grad():
            each = torch.log_softmax(model(tokens[:, :-1]).logits, -1).gather(2, tokens[:, 1:, None])[..., 0]
        return (each * mask).sum(1).reshape(PAIRS, 2)

    policy, reference = make_theirs("llama2"), make_theirs("llama2")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.95)
    reward = BETA * (sum_theirs(policy) - sum_theirs(reference))
    loss = -torch.nn.functional.logsigmoid(reward[:, 0] - reward[:, 1])
    ours = []
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(tmp_path / name)
        ours.append(load_ours(tmp_path / name))
    with jax.default_matmul_precision("highest"):
        found = make_dpo(BETA, 0.0, THEIR_VOCAB)(ours[0], jax.tree.map(jnp.asarray, batch), jnp.ones(PAIRS), ours[1])
    np.testing.assert_allclose(found["loss"], loss.numpy(), atol=1e-4)
    np.testing.assert_allclose(found["chosen_reward"], reward[:, 0].numpy(), atol=1e-4)
    assert float(np.abs(found["margin"]).max()) > 0.1
