"""Learn from pairs of answers which one is preferred: direct preference optimization (Rafailov et al. 2023).

The loss of a pair is −log σ(margin), the reward of the chosen answer less that of the rejected one. A reward is β times
how much more likely an answer is than it was when training began, in nats over the whole answer (arXiv:2305.18290,
equation 7).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models import InvalidModelOrObjective
from models.objectives import Batch, BatchObjective, Examples, find_measured, measure_tokens


def make_dpo(beta: float, label_smoothing: float, num_outputs: int | None) -> BatchObjective:
    """Return the objective of pairs; the share `label_smoothing` of them is taken to be the wrong way round."""
    function = partial(prefer, beta=beta, label_smoothing=label_smoothing, num_outputs=num_outputs)
    return BatchObjective(function, compares=True)


def prefer(
    model: nnx.Module,
    batch: Batch,
    weights: Float[Array, "batch"],
    reference: nnx.Module,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    num_outputs: int | None = None,
) -> Examples:
    """Return the loss of each pair, which of its answers has more reward, and the rewards.

    The batch has `tokens` and `answers`, Int[batch 2 seq+1], of each pair the chosen answer first; `answers` is 1 where
    a token is to be foretold. `reference` is the model as training began. `margin` is the reward of the chosen answer
    less that of the rejected one; `accuracy` is 1 where it is positive.
    """
    if batch["tokens"].ndim != 3 or batch["tokens"].shape[1] != 2:
        raise InvalidModelOrObjective(
            f"objective=dpo learns from pairs, tokens Int[batch 2 seq+1]; the data gives {batch['tokens'].shape}"
        )
    now = sum_log_probabilities(model, batch, num_outputs)
    before = jax.lax.stop_gradient(sum_log_probabilities(reference, batch, num_outputs))
    reward = beta * (now - before)
    margin = reward[:, 0] - reward[:, 1]
    loss = -jax.nn.log_sigmoid(margin) * (1 - label_smoothing) - jax.nn.log_sigmoid(-margin) * label_smoothing
    return {
        "loss": loss,
        "accuracy": (margin > 0).astype(jnp.float32),
        "margin": margin,
        "chosen_reward": reward[:, 0],
        "rejected_reward": reward[:, 1],
    }


def sum_log_probabilities(model: nnx.Module, batch: Batch, num_outputs: int | None) -> Float[Array, "batch 2"]:
    """Return the log-probability (nats) of each answer of each pair, given what is before it."""
    # Both answers of a pair are rows of one batch: their model is computed once.
    rows = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "answers")}
    tokens = rows["tokens"].astype(jnp.int32)
    _, nats = measure_tokens(model, tokens[:, :-1], tokens[:, 1:], num_outputs)
    # Chosen and not multiplied: padding may be infinitely unlikely.
    return -jnp.where(find_measured(rows), nats, 0).sum(axis=1).reshape(-1, 2)
