"""Learn from a teacher: the labels' loss, mixed with the distance to what another model says (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models.objectives import (
    CONSTANTS,
    Batch,
    BatchObjective,
    Examples,
    average_measured,
    check_takes_segments,
    count_answers,
    count_labels,
    count_targets,
    cross_entropy,
    find_measured,
    take_logits,
)


@dataclass(frozen=True)
class Distillation:
    """Say how a teacher is learnt from.

    Attributes:
        teach: (constants, inputs, what else the model is called with) → what the teacher gives.
        temperature: both distributions are softened by it.
        weight: share of the teacher's term in the loss; the labels have the rest.
        num_outputs: classes, or the size of the vocabulary.
        ignored: a label, or a token, that counts nowhere; None: there is none.
    """

    teach: Callable[..., Any]
    temperature: float
    weight: float
    num_outputs: int
    ignored: int | None


@dataclass(frozen=True)
class Lesson:
    """Hold what student and teacher are asked, and what would be right.

    Attributes:
        inputs: what both are called with.
        beside: what both are called with by name.
        labels: the right class at each place.
        measured: which places count.
    """

    inputs: jax.Array
    beside: dict[str, jax.Array]
    labels: Int[Array, "batch *places"]
    measured: Bool[Array, "batch *places"]


def make_distillation(own: str, option: Distillation) -> BatchObjective:
    """Return the objective of learning from a teacher what `own` (classify, next_token or sft) has labels for.

    The loss is `weight` × `teacher_loss` + (1 − `weight`) × `label_loss`; see `distill` for both.
    """
    read = {"classify": _read_classes, "next_token": _read_tokens, "sft": _read_answers}[own]
    weigh: Callable[[Batch], Float[Array, "batch"]] | None = count_answers if own == "sft" else None
    if option.ignored is not None and own != "sft":
        weigh = partial(count_labels if own == "classify" else count_targets, ignored=option.ignored)

    def measure(model: nnx.Module, batch: Batch, weights: Float[Array, "batch"]) -> Examples:
        found = distill(model, batch[CONSTANTS], read(batch, option.ignored), option)
        return found if own == "classify" else {name: value for name, value in found.items() if name != "accuracy"}

    return BatchObjective(measure, weigh)


def distill(model: nnx.Module, constants: Any, lesson: Lesson, option: Distillation) -> Examples:
    """Return the loss of a student and its two terms, in nats, and its accuracy.

    `teacher_loss` is T² · KL(softmax(teacher / T) ‖ softmax(student / T)): with T² its gradient keeps its size whatever
    the temperature (Hinton et al. 2015, arXiv:1503.02531). `label_loss` is the cross-entropy of the labels, at T = 1.
    Where one of both has logits of more tokens than there are, those are left out of their distance.
    """
    if lesson.beside:
        check_takes_segments(model)
    places, temperature = lesson.labels.shape, option.temperature
    student = take_logits(model(lesson.inputs, **lesson.beside), places, option.num_outputs).astype(jnp.float32)
    given = option.teach(constants, lesson.inputs, lesson.beside)
    teacher = jax.lax.stop_gradient(take_logits(given, places, option.num_outputs)).astype(jnp.float32)
    told, knows = _keep_shared(teacher, student), _keep_shared(student, teacher)
    wanted = jax.nn.log_softmax(told / temperature)
    apart = wanted - jax.nn.log_softmax(knows / temperature)
    # What the teacher thinks impossible adds nothing: not 0 × ∞.
    kl = jnp.where(jnp.exp(wanted) > 0, jnp.exp(wanted) * apart, 0).sum(axis=-1)
    label = average_measured(cross_entropy(student, lesson.labels), lesson.measured)
    learnt = average_measured(temperature**2 * kl, lesson.measured)
    right = average_measured((student.argmax(axis=-1) == lesson.labels).astype(jnp.float32), lesson.measured)
    loss = option.weight * learnt + (1.0 - option.weight) * label
    return {"loss": loss, "label_loss": label, "teacher_loss": learnt, "accuracy": right}


def _keep_shared(
    logits: Float[Array, "*places classes"], other: Float[Array, "*places others"]
) -> Float[Array, "*places shared"]:
    """Return the logits of what another model has a logit for as well."""
    return logits[..., : other.shape[-1]] if logits.shape[-1] > other.shape[-1] else logits


def _read_classes(batch: Batch, ignored: int | None) -> Lesson:
    label = batch["label"].astype(jnp.int32)
    measured = jnp.ones(label.shape, bool) if ignored is None else label != ignored
    return Lesson(batch["inputs"], {}, jnp.where(measured, label, 0), measured)


def _read_tokens(batch: Batch, ignored: int | None) -> Lesson:
    tokens = batch["tokens"].astype(jnp.int32)
    targets = tokens[:, 1:]
    measured = jnp.ones(targets.shape, bool) if ignored is None else targets != ignored
    return Lesson(jnp.maximum(tokens[:, :-1], 0), {}, jnp.maximum(targets, 0), measured)


def _read_answers(batch: Batch, ignored: int | None) -> Lesson:
    tokens = batch["tokens"].astype(jnp.int32)
    beside = {"segments": batch["segments"][:, :-1]} if "segments" in batch else {}
    return Lesson(tokens[:, :-1], beside, tokens[:, 1:], find_measured(batch))
