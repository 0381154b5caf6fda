"""What a model is trained for. An objective maps (model, batch) to one value per example for each metric.

The values are not averaged: the train step averages them, and an evaluation can leave out the padding of its last
batch. Every objective has a "loss", in float32: logits are raised before the softmax, whatever the model computes in.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models import InvalidModelOrObjective
from models.call_roles import CallRoles

Batch = Mapping[str, jax.Array]
# A user's own metric may be an object with `merge` and `compute` instead of one value per example.
Examples = dict[str, Any]
# (model, batch, weights Float[batch]: 0 for an example that only fills up a batch) → metrics. One that compares the
# model with what it was when training began is called with that as well.
ObjectiveFunction = Callable[..., Examples]


@runtime_checkable
class MergeableMetric(Protocol):
    """A metric that is no mean over examples, as those of google-metrax and clu: a pytree that counts what it needs."""

    def merge(self, other: Any) -> Any:
        """Return the metric over what both have seen."""

    def compute(self) -> Any:
        """Return the value over all that was seen."""


# The key of a batch under which it brings arrays that are the same in every step: no example, and never split.
CONSTANTS = "__constants__"
# A vocabulary of this size is that of bytes.
BYTE_VOCABULARY = 256


@dataclass(frozen=True)
class BatchObjective:
    """What is measured of a batch, and how much each example counts.

    Attributes:
        function: (model, batch, weights) → metrics.
        weigh: batch → Float[batch], how much each example counts in means; None: all alike.
        roles: arguments of a user's own function that are told whether the model is trained.
        calls_with_inputs: whether it calls a model with one argument; a user's own may call it as it likes.
        compares: whether the function has a fourth argument: the model as it was when training began.
    """

    function: ObjectiveFunction
    weigh: Callable[[Batch], Float[Array, "batch"]] | None = None
    roles: CallRoles = field(default_factory=CallRoles)
    calls_with_inputs: bool = True
    compares: bool = False

    def __call__(
        self, model: nnx.Module, batch: Batch, weights: Float[Array, "batch"], reference: nnx.Module | None = None
    ) -> Examples:
        """Return the metrics of a batch; `weights` is 0 for an example that only fills it up.

        `reference` is the model as it was when training began, in evaluation mode; it is looked at where the objective
        compares with it.
        """
        arguments = (model, batch, weights)
        return self.function(*arguments, reference) if self.compares else self.function(*arguments)


def make_objective(name: str, num_outputs: int | None = None, *, ignored: int | None = None) -> BatchObjective:
    """Return the objective of this name, for a model of so many outputs (None: not checked).

    A label, or a next token, that is `ignored` counts nowhere. None: every one counts, which keeps the program as small
    as it can be.
    """
    function: Callable[..., Examples] = OBJECTIVES[name]
    weigh: Callable[[Batch], Float[Array, "batch"]] | None = None
    if name in ("classify", "next_token"):
        function = partial(function, num_outputs=num_outputs, ignored=ignored)
        if ignored is not None:
            weigh = partial(count_labels if name == "classify" else count_targets, ignored=ignored)
    if name == "sft":
        function, weigh = partial(function, num_outputs=num_outputs), count_answers

    def measure(model: nnx.Module, batch: Batch, weights: Float[Array, "batch"]) -> Examples:
        return function(model, batch)

    return BatchObjective(measure, weigh)


def next_token(
    model: nnx.Module, batch: Batch, *, num_outputs: int | None = None, ignored: int | None = None
) -> Examples:
    """Return the mean cross-entropy (nats a token) of each next token; batch: tokens Int[batch seq+1].

    One that is `ignored` is not measured; the model sees it all the same, as 0 where it is below 0. The loss is given
    in bits as well: `bits_per_byte` where the tokens are bytes, `bits_per_token` where they are longer.

    A model whose `loss_chunks` is above 1 must have `map_logits(function, tokens, targets)`. It returns what
    `function(model(tokens), targets)` does, without the logits of all positions at once; the function looks at each
    position alone.
    """
    tokens = batch["tokens"].astype(jnp.int32)
    given, targets = tokens[:, :-1], tokens[:, 1:]
    if ignored is not None:
        # What is below 0 is no id of an embedding. A padding that is an id stays the one that its writer chose.
        given, measured = jnp.maximum(given, 0), targets != ignored
        targets = jnp.maximum(targets, 0)
    unit, each = measure_tokens(model, given, targets, num_outputs)
    loss = average_measured(each, measured) if ignored is not None else each.mean(axis=-1)
    return {"loss": loss, unit: loss / math.log(2.0)}


def sft(model: nnx.Module, batch: Batch, *, num_outputs: int | None = None) -> Examples:
    """Return the mean cross-entropy (nats a token) of the answers in conversations (supervised fine-tuning).

    The batch has `tokens` and `answers`, Int[batch seq+1]: 1 where a token is to be foretold. Where it has `segments`,
    a row holds several conversations, and the model is called with the number of that of each token as `segments`; no
    token may see another conversation, and positions begin anew with each.
    """
    tokens = batch["tokens"].astype(jnp.int32)
    given, targets, measured = tokens[:, :-1], tokens[:, 1:], find_measured(batch)
    beside = {"segments": batch["segments"][:, :-1]} if "segments" in batch else {}
    if beside:
        check_takes_segments(model)
    unit, each = measure_tokens(model, given, targets, num_outputs, **beside)
    loss = average_measured(each, measured)
    return {"loss": loss, unit: loss / math.log(2.0)}


def measure_tokens(
    model: nnx.Module,
    given: Int[Array, "batch seq"],
    targets: Int[Array, "batch seq"],
    num_outputs: int | None,
    **beside: jax.Array,
) -> tuple[str, Float[Array, "batch seq"]]:
    """Return the cross-entropy (nats) of each next token, and what its unit is once it is in bits.

    A model whose `loss_chunks` is above 1 computes it in chunks, without the logits of all positions at once. `beside`
    is what else it is called with.
    """
    if getattr(model, "loss_chunks", 1) > 1:
        nats = model.map_logits(cross_entropy_by_unit, given, targets, **beside)  # type: ignore[attr-defined]
    else:
        nats = cross_entropy_by_unit(take_logits(model(given, **beside), given.shape, num_outputs), targets)
    ((unit, each),) = nats.items()
    return unit, each


def find_measured(batch: Batch) -> Bool[Array, "batch seq"]:
    """Return which next tokens are answers. The first token of a conversation is none: nothing foretells it."""
    measured = batch["answers"][:, 1:] > 0
    if "segments" not in batch:
        return measured
    segments = batch["segments"]
    return measured & (segments[:, 1:] == segments[:, :-1])


def count_answers(batch: Batch) -> Float[Array, "batch"]:
    """Return how many next tokens of each row are answers."""
    return find_measured(batch).sum(axis=1).astype(jnp.float32)


def check_takes_segments(model: nnx.Module) -> None:
    """Raise InvalidModelOrObjective where a model cannot be told which conversation each token belongs to."""
    try:
        takes = inspect.signature(type(model).__call__).parameters
    except (TypeError, ValueError):
        return
    if "segments" not in takes and not any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        raise InvalidModelOrObjective(
            f"{type(model).__name__}: several conversations share a row, and its __call__ takes no `segments`, so each "
            "would see the others; give it that argument, or say data.packing=false"
        )


def cross_entropy_by_unit(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]
) -> dict[str, Float[Array, "*batch"]]:
    """Return the cross-entropy in nats, under the name that it will have once it is in bits."""
    # Where logits are computed in chunks, nobody but this function sees them, and only they know the vocabulary. So the
    # unit has to be found here and travels as the key.
    unit = "bits_per_byte" if logits.shape[-1] == BYTE_VOCABULARY else "bits_per_token"
    return {unit: cross_entropy(logits, labels)}


def classify(
    model: nnx.Module, batch: Batch, *, num_outputs: int | None = None, ignored: int | None = None
) -> Examples:
    """Return cross-entropy (nats) and accuracy; batch: inputs Float[batch *inputs], label Int[batch *places].

    A label for each place of an example (a pixel, a token) is measured at each place and averaged; one that is
    `ignored` is not measured.
    """
    label = batch["label"].astype(jnp.int32)  # true and false are classes as well
    logits = take_logits(model(batch["inputs"]), label.shape, num_outputs)
    # A label that is left out must still be the number of a class, or the loss of its place is NaN.
    loss = cross_entropy(logits, label if ignored is None else jnp.where(label == ignored, 0, label))
    accuracy = (logits.argmax(axis=-1) == label).astype(loss.dtype)
    if label.ndim == 1:
        return {"loss": loss, "accuracy": accuracy}
    measured = jnp.ones(label.shape, bool) if ignored is None else label != ignored
    return {"loss": average_measured(loss, measured), "accuracy": average_measured(accuracy, measured)}


def regress(model: nnx.Module, batch: Batch) -> Examples:
    """Return the mean squared and absolute error of the numbers of a label; batch: label Float[batch] or [batch k].

    Raises InvalidModelOrObjective where the model gives another number of numbers.
    """
    label = batch["label"].astype(jnp.float32)
    given = find_only_array(model(batch["inputs"]), "numbers", lambda array: array.size == label.size)
    # Another number of them would be spread over the label's, and train without a word.
    if given.size != label.size or given.shape[:1] != label.shape[:1]:
        raise InvalidModelOrObjective(
            f"the model gave {describe_value(given)}; expected as many numbers as a label has, of shape {label.shape}"
        )
    error = given.astype(jnp.float32).reshape(len(label), -1) - label.reshape(len(label), -1)
    return {"loss": jnp.square(error).mean(axis=1), "absolute_error": jnp.abs(error).mean(axis=1)}


def elbo(model: nnx.Module, batch: Batch) -> Examples:
    """Return −ELBO (nats an example), estimated with one sample, and its terms; batch: inputs Float[batch *inputs].

    The model returns −log p(x|z) and KL(q(z|x) ‖ p(z)), each Float[batch]. It may have a `beta`, the weight of the KL
    divergence; 1 is the bound itself (Higgins et al. 2017).
    """
    size, given = len(batch["inputs"]), model(batch["inputs"])
    if not (isinstance(given, tuple | list) and len(given) == 2 and all(_shape(each) == (size,) for each in given)):
        raise InvalidModelOrObjective(
            f"{type(model).__name__}: gave {describe_value(given)}; objective=elbo expects (-log p(x|z), KL), each of "
            f"shape ({size},)"
        )
    reconstruction, kl = given
    return {"loss": reconstruction + getattr(model, "beta", 1.0) * kl, "reconstruction": reconstruction, "kl": kl}


OBJECTIVES: dict[str, Callable[..., Examples]] = {
    "next_token": next_token,
    "sft": sft,
    "classify": classify,
    "regress": regress,
    "elbo": elbo,
}


def cross_entropy(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return −log softmax(logits)[label] in nats, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def count_labels(batch: Batch, ignored: int) -> Float[Array, "batch"]:
    """Return how many labels of each example are measured."""
    # A type of fewer bits may have no such number to compare with.
    label = batch["label"].astype(jnp.int32)
    return (label != ignored).reshape(len(label), -1).sum(axis=1).astype(jnp.float32)


def count_targets(batch: Batch, ignored: int) -> Float[Array, "batch"]:
    """Return how many next tokens of each example are measured."""
    return (batch["tokens"][:, 1:].astype(jnp.int32) != ignored).sum(axis=1).astype(jnp.float32)


def average_measured(
    values: Float[Array, "batch *places"], measured: Bool[Array, "batch *places"]
) -> Float[Array, "batch"]:
    """Return the mean of each example over the places that are measured; 0 where there is none."""
    places = tuple(range(1, values.ndim))
    # Chosen and not multiplied: what is infinite at a place that is left out would make the sum NaN.
    sums = jnp.where(measured, values, 0).sum(axis=places)
    return sums / jnp.maximum(measured.sum(axis=places), 1)


# --- what somebody else's model gives ---


def take_logits(given: Any, places: tuple[int, ...], num_outputs: int | None) -> Float[Array, "*places classes"]:
    """Return the logits in what a model gave: the array itself, or the one that is called so or alone has the shape.

    Raises InvalidModelOrObjective where there is none, or they are fewer than there are classes.
    """
    logits = find_only_array(given, "logits", lambda array: array.shape[:-1] == places)
    if logits.ndim != len(places) + 1 or logits.shape[:-1] != places:
        wanted = ", ".join(map(str, (*places, num_outputs or "classes")))
        raise InvalidModelOrObjective(f"the model gave {describe_value(logits)}; expected logits of shape ({wanted})")
    if num_outputs is not None and logits.shape[-1] < num_outputs:
        raise InvalidModelOrObjective(
            f"the model gave {logits.shape[-1]} logits, but there are {num_outputs} classes; give it as many outputs"
        )
    return logits


def find_only_array(given: Any, name: str, fits: Callable[[jax.Array], bool]) -> jax.Array:
    """Return the array that a model's result is, or that is named `name` in it, or that alone in it fits.

    Raises InvalidModelOrObjective where none or several do.
    """
    if isinstance(given, jax.Array):
        return given
    named = given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)
    if isinstance(named, jax.Array):
        return named
    found = [leaf for leaf in jax.tree.leaves(given) if isinstance(leaf, jax.Array) and leaf.ndim and fits(leaf)]
    if len(found) != 1:
        several = "several arrays that could be" if found else "no"
        raise InvalidModelOrObjective(
            f"the model gave {describe_value(given)}, with {several} {name}; return the {name} alone or under that "
            "name, or say what to do with it in an objective of your own (objective=my_file:my_loss)"
        )
    return found[0]


def describe_value(value: Any) -> str:
    """Return what a value is, for an error message."""
    if isinstance(value, jax.Array):
        return f"an array of shape {value.shape}"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(map(describe_value, value)) or 'nothing'}"
    return type(value).__name__


def _shape(value: Any) -> tuple[int, ...] | None:
    return value.shape if isinstance(value, jax.Array) else None
