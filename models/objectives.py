"""What a model is trained for. An objective maps (model, batch) to one value per example for each metric.

The values are not averaged: the train step averages them, and an evaluation can leave out the padding of its last
batch. Every objective has a "loss", in float32: logits are raised before the softmax, whatever the model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

Batch = Mapping[str, jax.Array]
Examples = dict[str, Float[Array, "batch"]]
ObjectiveFunction = Callable[[nnx.Module, Batch], Examples]

# A vocabulary of this size is that of bytes.
BYTE_VOCABULARY = 256


def next_token(model: nnx.Module, batch: Batch) -> Examples:
    """Return the mean cross-entropy (nats a token) of each next token; batch: tokens Int[batch seq+1].

    It is given in bits as well: `bits_per_byte` where the tokens are bytes, `bits_per_token` where they are longer.

    A model whose `loss_chunks` is above 1 must have `map_logits(function, tokens, targets)`. It returns what
    `function(model(tokens), targets)` does, without the logits of all positions at once; the function looks at each
    position alone.
    """
    tokens = batch["tokens"].astype(jnp.int32)
    if getattr(model, "loss_chunks", 1) > 1:
        nats = model.map_logits(cross_entropy_by_unit, tokens[:, :-1], tokens[:, 1:])  # type: ignore[attr-defined]
    else:
        nats = cross_entropy_by_unit(model(tokens[:, :-1]), tokens[:, 1:])
    ((unit, each),) = nats.items()
    loss = each.mean(axis=-1)
    return {"loss": loss, unit: loss / math.log(2.0)}


def cross_entropy_by_unit(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> dict[str, Float[Array, "*batch"]]:
    """Return the cross-entropy in nats, under the name that it will have once it is in bits."""
    # Where logits are computed in chunks, nobody but this function sees them, and only they know the vocabulary. So the
    # unit has to be found here and travels as the key.
    unit = "bits_per_byte" if logits.shape[-1] == BYTE_VOCABULARY else "bits_per_token"
    return {unit: cross_entropy(logits, labels)}


def classify(model: nnx.Module, batch: Batch) -> Examples:
    """Return cross-entropy (nats) and accuracy; batch: inputs Float[batch *inputs], label Int[batch]."""
    logits = model(batch["inputs"])
    loss = cross_entropy(logits, batch["label"])
    return {"loss": loss, "accuracy": (logits.argmax(axis=-1) == batch["label"]).astype(loss.dtype)}


def regress(model: nnx.Module, batch: Batch) -> Examples:
    """Return the mean squared and absolute error of the numbers of a label; batch: label Float[batch] or [batch k]."""
    label = batch["label"].astype(jnp.float32)
    error = model(batch["inputs"]).astype(jnp.float32).reshape(label.shape) - label
    error = error.reshape(len(label), -1)
    return {"loss": jnp.square(error).mean(axis=1), "absolute_error": jnp.abs(error).mean(axis=1)}


def elbo(model: nnx.Module, batch: Batch) -> Examples:
    """Return −ELBO (nats an example), estimated with one sample, and its terms; batch: inputs Float[batch *inputs].

    The model returns −log p(x|z) and KL(q(z|x) ‖ p(z)), each Float[batch]. It may have a `beta`, the weight of the KL
    divergence; 1 is the bound itself (Higgins et al. 2017).
    """
    reconstruction, kl = model(batch["inputs"])
    return {"loss": reconstruction + getattr(model, "beta", 1.0) * kl, "reconstruction": reconstruction, "kl": kl}


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return −log softmax(logits)[label] in nats, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "next_token": next_token,
    "classify": classify,
    "regress": regress,
    "elbo": elbo,
}
