"""A model that gives probabilities where a loss takes logits is told of; one that gives logits is not."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from runner.train.find_probabilities import warn_of_probabilities
from runner.train.split_model import split_model


def warned(last: Callable[[jax.Array], jax.Array]) -> tuple[str, ...]:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.map = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return last(self.drop(self.norm(self.map(x))))

    network = split_model(Net, lambda model: None)
    batch = {"inputs": jax.ShapeDtypeStruct((5, 3), jnp.float32), "label": jax.ShapeDtypeStruct((5,), jnp.int32)}
    return warn_of_probabilities(network, batch, "nets:Net")


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (nnx.softmax, "softmax"),
        (jax.jit(nnx.softmax), "softmax"),
        (lambda x: jax.nn.softmax(x.astype(jnp.bfloat16)).astype(jnp.float32), "softmax"),
        (lambda x: jnp.exp(x) / jnp.exp(x).sum(axis=-1, keepdims=True), "softmax"),
        (nnx.sigmoid, "sigmoid"),
    ],
)
def test_probabilities_are_told_of(last: Callable[[jax.Array], jax.Array], kind: str) -> None:
    (said,) = warned(last)
    assert said.startswith(f"nets:Net: its call ends in a {kind}, but the loss expects logits")
    assert "\n" not in said


@pytest.mark.parametrize(
    "last",
    [
        lambda x: x,
        nnx.log_softmax,
        nnx.tanh,
        lambda x: x / 3,
        lambda x: 30 * jnp.tanh(x / 30),
        lambda x: x * nnx.sigmoid(x),
        lambda x: nnx.softmax(x) @ jnp.ones((4, 4)),
        lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    ],
)
def test_logits_are_not(last: Callable[[jax.Array], jax.Array]) -> None:
    assert warned(last) == ()


def test_a_language_model_is_looked_at_as_well() -> None:
    class Words(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(7, 7, rngs=nnx.Rngs(0))
            # As long as what the model sees, and no longer.
            self.place = nnx.Param(jnp.zeros((8, 7)))

        def __call__(self, tokens: jax.Array) -> jax.Array:
            return nnx.softmax(self.embed(tokens) + self.place)

    batch = {"tokens": jax.ShapeDtypeStruct((5, 9), jnp.uint8)}
    (said,) = warn_of_probabilities(split_model(Words, lambda model: None), batch, "nets:Words")
    assert "ends in a softmax" in said
