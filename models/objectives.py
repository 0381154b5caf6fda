"""What a model is trained for. An objective maps (model, batch) to one value per example for each metric.

Per example, not averaged: the step averages for training, an evaluation can leave out the padding of its last batch.
Every objective has a "loss".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

Batch = Mapping[str, jax.Array]
Examples = dict[str, Float[Array, "batch"]]
Objective = Callable[[nnx.Module, Batch], Examples]


def next_token(model: nnx.Module, batch: Batch) -> Examples:
    """Mean cross-entropy (nats a token) of each next token; batch: tokens Int[batch seq+1]. Tokens here are bytes."""
    tokens = batch["tokens"].astype(jnp.int32)
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(axis=-1)
    return {"loss": loss, "bits_per_byte": loss / math.log(2.0)}


def classify(model: nnx.Module, batch: Batch) -> Examples:
    """Cross-entropy (nats) and accuracy; batch: inputs Float[batch *inputs], label Int[batch]."""
    logits = model(batch["inputs"]).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return {"loss": loss, "accuracy": (logits.argmax(axis=-1) == batch["label"]).astype(loss.dtype)}


OBJECTIVES: dict[str, Objective] = {"next_token": next_token, "classify": classify}
