"""The loss of a student, against the same in NumPy; what the teacher's arrays are to it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.distillation import Distillation, make_distillation
from models.objectives import CONSTANTS, make_objective

CLASSES, SIZE = 5, 4
DRAW = np.random.default_rng(0)


class Given(nnx.Module):
    """A model that gives the logits that it holds, whatever it is asked."""

    def __init__(self, logits: Any):
        self.logits = nnx.Param(jnp.asarray(logits))

    def __call__(self, inputs: jax.Array, segments: Any = None) -> jax.Array:
        return self.logits[...]


def option(weight: float, ignored: int | None = None, temperature: float = 3.0) -> Distillation:
    return Distillation(lambda constants, inputs, beside: constants, temperature, weight, CLASSES, ignored)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def expected(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[Any, Any]:
    """The cross-entropy, and T² · KL(teacher ‖ student), at each place."""
    p, q = log_softmax(teacher.astype(np.float64) / temperature), log_softmax(student.astype(np.float64) / temperature)
    label = -np.take_along_axis(log_softmax(student.astype(np.float64)), labels[..., None], -1)[..., 0]
    return label, temperature**2 * (np.exp(p) * (p - q)).sum(axis=-1)


def test_classes_are_what_numpy_says() -> None:
    student, teacher = DRAW.normal(0, 2, (2, SIZE, CLASSES)).astype(np.float32)
    labels = np.array([0, 4, 2, 2])
    batch = {"inputs": jnp.zeros((SIZE, 1)), "label": jnp.asarray(labels), CONSTANTS: jnp.asarray(teacher)}
    found = make_distillation("classify", option(0.3))(Given(student), batch, jnp.ones(SIZE))
    label, learnt = expected(student, teacher, labels, 3.0)
    np.testing.assert_allclose(found["label_loss"], label, rtol=1e-5)
    np.testing.assert_allclose(found["teacher_loss"], learnt, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], 0.3 * learnt + 0.7 * label, rtol=1e-5)
    np.testing.assert_array_equal(found["accuracy"], student.argmax(-1) == labels)


@pytest.mark.parametrize("own", ["next_token", "sft"])
def test_tokens_are_what_numpy_says_where_they_count(own: str) -> None:
    student, teacher = DRAW.normal(0, 2, (2, SIZE, 6, CLASSES)).astype(np.float32)
    tokens, counts = DRAW.integers(0, CLASSES, (SIZE, 7)), DRAW.integers(0, 2, (SIZE, 7)) > 0
    counts[:, 1] = True
    batch = {CONSTANTS: jnp.asarray(teacher)}
    if own == "sft":
        batch |= {"tokens": jnp.asarray(tokens), "answers": jnp.asarray(counts, jnp.uint8)}
        batch["segments"] = jnp.ones((SIZE, 7), jnp.int32)
    else:
        batch["tokens"] = jnp.asarray(np.where(counts, tokens, -100))
    objective = make_distillation(own, option(0.5, None if own == "sft" else -100))
    found = objective(Given(student), batch, jnp.ones(SIZE))
    label, learnt = expected(student, teacher, tokens[:, 1:], 3.0)
    measured = counts[:, 1:]
    for name, each in (("label_loss", label), ("teacher_loss", learnt), ("loss", (label + learnt) / 2)):
        np.testing.assert_allclose(found[name], (each * measured).sum(1) / measured.sum(1), rtol=1e-5)
    assert objective.weigh is not None
    np.testing.assert_array_equal(objective.weigh(batch), measured.sum(1))
    assert found.keys() == {"loss", "label_loss", "teacher_loss"}


def test_without_a_share_it_is_the_labels_loss() -> None:
    student, teacher = DRAW.normal(0, 2, (2, SIZE, CLASSES)).astype(np.float32)
    batch = {"inputs": jnp.zeros((SIZE, 1)), "label": jnp.array([0, 4, 2, 2])}
    found = make_distillation("classify", option(0.0))(
        Given(student), {**batch, CONSTANTS: jnp.asarray(teacher)}, jnp.ones(SIZE)
    )
    plain = make_objective("classify", CLASSES)(Given(student), batch, jnp.ones(SIZE))
    np.testing.assert_allclose(found["loss"], plain["loss"], rtol=1e-6)


def test_a_teacher_gets_no_gradient_and_its_own_student_a_zero_one() -> None:
    logits = jnp.asarray(DRAW.normal(0, 2, (SIZE, CLASSES)).astype(np.float32))
    batch = {"inputs": jnp.zeros((SIZE, 1)), "label": jnp.zeros(SIZE, jnp.int32)}

    def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
        measured = make_distillation("classify", option(1.0))
        return measured(Given(student), {**batch, CONSTANTS: teacher}, jnp.ones(SIZE))["loss"].sum()

    for_student, for_teacher = jax.grad(loss, argnums=(0, 1))(logits, logits + 1.0)
    np.testing.assert_allclose(for_student, 0.0, atol=1e-6)
    assert not np.any(for_teacher)


def test_what_a_teacher_thinks_impossible_is_no_nan() -> None:
    teacher = jnp.where(jnp.arange(CLASSES) == 0, -jnp.inf, jnp.zeros((SIZE, CLASSES)))
    batch = {"inputs": jnp.zeros((SIZE, 1)), "label": jnp.ones(SIZE, jnp.int32), CONSTANTS: teacher}
    found = make_distillation("classify", option(0.5))(Given(jnp.zeros((SIZE, CLASSES))), batch, jnp.ones(SIZE))
    assert np.isfinite(found["loss"]).all()
