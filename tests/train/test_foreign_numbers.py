"""Numbers that are not real fractions alone: complex and whole parameters, labels in bf16, labels to leave out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

from data.sources import IGNORED_LABEL
from models import InvalidModelOrObjective
from models.objectives import BatchObjective, make_objective
from models.user_model import RESERVED_METRICS, wrap_user_objective
from runner.optim.optimizers import AdamW, Sgd
from runner.train.split_model import SplitModel, merge_model, split_model, split_variables
from runner.train.step import (
    UpdateOptions,
    init_state,
    is_finite,
    make_eval_step,
    make_key,
    make_train_step,
)
from runner.types import Batch, State

Option = Sgd | AdamW
PLAIN, ONCE = Sgd(lr=0.05, weight_decay=0.0, clip_norm=None), UpdateOptions()


def begin(make: Callable[[], nnx.Module], option: Option, *, ema: bool = False) -> tuple[SplitModel, State]:
    return split_model(make, lambda model: None), init_state(split_variables(make()), option.build(rate), ema=ema)


def rate(step: Any) -> float:
    return 0.05


def train(
    make: Callable[[], nnx.Module],
    objective: BatchObjective,
    batches: list[Batch],
    option: Option = PLAIN,
    update: UpdateOptions = ONCE,
) -> tuple[SplitModel, State, list[dict[str, float]]]:
    network, state = begin(make, option, ema=update.ema is not None)
    step = jax.jit(make_train_step(network, objective, lambda lr: (option.build(rate), rate), update))
    seen = []
    for batch in batches:
        state, metrics = step(state, batch, jnp.float32(0.05))
        seen.append({name: float(value) for name, value in metrics.items()})
    return network, state, seen


def measure(function: Callable[[Any, Batch], dict[str, Any]]) -> BatchObjective:
    return BatchObjective(lambda model, batch, weights: function(model, batch))


class Gives(nnx.Module):
    """A model that gives what it is made with."""

    def __init__(self, given: Any):
        self.given = nnx.data(given)

    def __call__(self, x: jax.Array) -> Any:
        return self.given


# --- complex parameters ---


class Complex(nnx.Module):
    def __init__(self, beside: bool = False):
        self.w = nnx.Param(jnp.full((3,), 0.3 + 0.3j, jnp.complex64))
        if beside:
            self.b = nnx.Param(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w.get_value() * x


WANTED = 1 - 0.5j


def distance(model: Any, batch: Batch) -> dict[str, jax.Array]:
    return {"loss": (jnp.abs(model(batch["inputs"]) - WANTED * batch["inputs"]) ** 2).mean(axis=1)}


def numbers(count: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [{"inputs": jnp.asarray(rng.standard_normal((16, 3)), jnp.float32)} for _ in range(count)]


@pytest.mark.parametrize("option", [Sgd(lr=0.05, weight_decay=0.0, clip_norm=None), AdamW(lr=0.05, weight_decay=0.0)])
@pytest.mark.parametrize("update", [UpdateOptions(), UpdateOptions(microbatches=4, ema=0.9)])
def test_complex_parameters_go_downhill(option: Option, update: UpdateOptions) -> None:
    """Without the conjugate the imaginary part runs away (it was 22,773 after 200 steps)."""
    _, state, seen = train(Complex, measure(distance), numbers(300), option, update)
    np.testing.assert_allclose(state["params"]["w"], np.full(3, WANTED), atol=0.02)
    assert seen[-1]["loss"] < 0.001
    assert state["params"]["w"].dtype == jnp.complex64


@pytest.mark.parametrize("wrong", [np.nan, np.inf, complex(0, np.nan), complex(0, np.inf)])
def test_what_is_not_finite_in_a_complex_parameter_is_seen(wrong: complex) -> None:
    _, state = begin(Complex, Sgd(lr=0.05))
    assert is_finite(state)
    params = {"w": state["params"]["w"].at[1].set(wrong)}
    assert not is_finite({**state, "params": params})


def test_a_state_without_fractions_is_finite() -> None:
    assert is_finite({"params": {}, "extra": {"order": jnp.arange(3)}})


# --- what bf16 rounds ---


class Line(nnx.Module):
    def __init__(self) -> None:
        self.map = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.map(x)


YEARS = np.arange(1990.0, 2021.0, dtype=np.float32)


def years() -> Batch:
    return {"inputs": jnp.zeros((31, 1)), "label": jnp.asarray(YEARS), "weights": jnp.asarray(YEARS)}


def shown(model: Any, batch: Batch) -> dict[str, jax.Array]:
    return {
        "loss": (model(batch["inputs"])[:, 0] - batch["label"]) ** 2,
        "label": batch["label"] + 0.0,
        "weights": batch["weights"] + 0.0,
        "dtype": jnp.full(31, float(batch["inputs"].dtype == jnp.bfloat16)),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_label_is_never_rounded(precision: Any) -> None:
    """2005 is 2008 in bf16: the score itself was measured against rounded labels."""
    network, state, seen = train(Line, measure(shown), [years()], update=UpdateOptions(precision))
    assert seen[0]["label"] == seen[0]["weights"] == np.float32(YEARS.mean())
    assert seen[0]["dtype"] == (precision == "bf16")
    sums = make_eval_step(network, measure(shown), precision)(state, years(), jnp.ones(31))
    assert float(sums["label"]) == YEARS.sum()


def test_regression_reaches_the_mean_whatever_the_precision() -> None:
    for precision in ("fp32", "bf16"):
        batch = {"inputs": jnp.ones((4, 1)), "label": jnp.asarray([[3.25], [3.75], [2.0], [5.0]])}
        update = UpdateOptions(precision)  # type: ignore[arg-type]
        _, _, seen = train(Line, make_objective("regress"), [batch] * 200, update=update)
        # The spread of the labels is what is left.
        assert seen[-1]["loss"] == pytest.approx(1.15625, abs=0.01)
        assert seen[-1]["absolute_error"] == pytest.approx(0.875, abs=0.02)


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_regression_takes_a_number_or_several(shape: tuple[int, ...]) -> None:
    label = jnp.arange(float(np.prod(shape))).reshape(shape)
    size = shape[1] if len(shape) > 1 else 1
    found = make_objective("regress")(Gives(jnp.ones((6, size))), {"inputs": label, "label": label}, jnp.ones(6))
    by_hand = (np.ones((6, size)) - np.asarray(label).reshape(6, size)) ** 2
    np.testing.assert_allclose(found["loss"], by_hand.mean(axis=1))
    with pytest.raises(InvalidModelOrObjective, match="no numbers|several"):
        make_objective("regress")(Gives((jnp.ones((6, 9)),)), {"inputs": label, "label": label}, jnp.ones(6))


@pytest.mark.parametrize(
    ("given", "label"),
    [((6, 1), (6, 3)), ((6, 10), (6,)), ((6,), (6, 2)), ((1, 6), (6,)), ((), (6,)), ((3, 6), (6, 3))],
)
def test_numbers_are_not_spread_over_a_label_of_another_shape(given: tuple[int, ...], label: tuple[int, ...]) -> None:
    numbers = jnp.zeros(label)
    with pytest.raises(InvalidModelOrObjective, match="expected as many numbers as a label has"):
        make_objective("regress")(Gives(jnp.ones(given)), {"inputs": numbers, "label": numbers}, jnp.ones(6))


# --- labels to leave out ---


class Table(nnx.Module):
    """A logit for each pair of what is seen and what is asked for."""

    def __init__(self) -> None:
        self.logits = nnx.Param(jax.random.normal(jax.random.key(0), (5, 5)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.logits.get_value()[x]


class OfImages(nnx.Module):
    def __init__(self) -> None:
        self.logits = nnx.Param(jax.random.normal(jax.random.key(0), (3, 5)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.logits.get_value()


def labelled(ignored: int = IGNORED_LABEL) -> tuple[Batch, Batch]:
    """Return a batch in which five of eight labels are left out, and the three that are measured alone."""
    rng = np.random.default_rng(1)
    inputs, label = rng.standard_normal((8, 3)).astype(np.float32), rng.integers(0, 5, 8).astype(np.int32)
    measured = np.array([1, 4, 6])
    masked = np.full(8, ignored, np.int32)
    masked[measured] = label[measured]
    whole = {"inputs": jnp.asarray(inputs), "label": jnp.asarray(masked)}
    return whole, {"inputs": jnp.asarray(inputs[measured]), "label": jnp.asarray(label[measured])}


@pytest.mark.parametrize(("parts", "ignored"), [*((n, IGNORED_LABEL) for n in (1, 2, 4, 8)), (2, 255), (4, -1), (8, 3)])
def test_a_label_that_is_left_out_counts_nowhere(parts: int, ignored: int) -> None:
    """Loss, metrics and gradients are those of the others, in however many microbatches, some of which have none."""
    whole, alone = labelled(ignored)
    # One of the five classes may be left out as well, if it is none of these.
    assert ignored not in alone["label"]
    masking, plain = make_objective("classify", 5, ignored=ignored), make_objective("classify", 5)
    _, expected, (wanted,) = train(OfImages, plain, [alone])
    network, state, (seen,) = train(OfImages, masking, [whole], update=UpdateOptions(microbatches=parts))
    for name in ("loss", "accuracy", "grad_norm"):
        assert seen[name] == pytest.approx(wanted[name], rel=1e-5)
    np.testing.assert_allclose(state["params"]["logits"], expected["params"]["logits"], rtol=1e-5)
    sums = make_eval_step(network, masking)(state, whole, jnp.ones(8))
    means = make_eval_step(network, plain)(state, alone, jnp.ones(3))
    for name in ("loss", "accuracy", "weight"):
        np.testing.assert_allclose(sums[name], means[name], rtol=1e-5)


@pytest.mark.parametrize("pad", [-100, -1])
def test_padding_counts_in_no_language_model(pad: int) -> None:
    """A mean over tokens, not over the means of texts: a short text counts for what it holds."""
    rows = [[1, 2, 3, 4, 0, 1], [2, 3, pad, pad, pad, pad], [pad] * 6, [4, 4, 1, pad, pad, pad]]
    tokens = jnp.asarray(rows, jnp.int32)
    masking = make_objective("next_token", 5, ignored=pad)
    network, state, (seen,) = train(Table, masking, [{"tokens": tokens}])
    logits = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (5, 5)))
    pairs = [(a, b) for row in rows for a, b in itertools.pairwise(row) if b != pad]
    nats = [-float(logits[a, b]) for a, b in pairs]
    assert len(pairs) == 8
    assert seen["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert seen["bits_per_token"] == pytest.approx(np.mean(nats) / np.log(2), rel=1e-5)
    sums = make_eval_step(network, masking)(state, {"tokens": tokens}, jnp.asarray([1.0, 1.0, 1.0, 0.0]))
    assert float(sums["weight"]) == 6
    assert np.isfinite(float(sums["loss"]))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.int32])
@pytest.mark.parametrize("pad", [0, 2, 4])
def test_padding_that_is_a_token_is_seen_as_it_is(pad: int, dtype: Any) -> None:
    """It is foretold by nothing, but what comes behind it is foretold by it."""
    rows = [[pad, 1, 3, 3, pad, 1], [1, 3, pad, pad, pad, pad]]
    batch = {"tokens": jnp.asarray(rows, dtype)}
    objective = make_objective("next_token", 5, ignored=pad)
    _, _, (seen,) = train(Table, objective, [batch])
    logits = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (5, 5)))
    pairs = [(a, b) for row in rows for a, b in itertools.pairwise(row) if b != pad]
    assert len(pairs) == 5
    assert pairs.count((pad, 1)) == 2
    assert seen["loss"] == pytest.approx(-np.mean([float(logits[a, b]) for a, b in pairs]), rel=1e-5)
    assert objective.weigh is not None
    assert objective.weigh(batch).tolist() == [4, 1]


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    batch = {"tokens": jnp.full((2, 4), -100)}
    _, state, (seen,) = train(Table, make_objective("next_token", 5, ignored=IGNORED_LABEL), [batch])
    assert seen["loss"] == seen["grad_norm"] == 0
    np.testing.assert_array_equal(state["params"]["logits"], jax.random.normal(jax.random.key(0), (5, 5)))


@pytest.mark.parametrize(("ignored", "dtype"), [(-100, jnp.int32), (255, jnp.uint8), (-1, jnp.int8), (4, jnp.uint8)])
def test_a_label_for_each_place_is_averaged_over_what_is_measured(ignored: int, dtype: Any) -> None:
    label = jnp.asarray([[0, 1, ignored], [ignored, ignored, 2]], dtype)
    objective = make_objective("classify", 5, ignored=ignored)
    assert objective.weigh is not None
    assert objective.weigh({"label": label}).tolist() == [2, 1]
    seen = objective(
        Gives(jnp.broadcast_to(jnp.log(jnp.arange(1.0, 6.0)), (2, 3, 5))),
        {"inputs": label, "label": label},
        jnp.ones(2),
    )
    log = np.log(np.arange(1.0, 6.0) / 15)
    np.testing.assert_allclose(seen["loss"], [-(log[0] + log[1]) / 2, -log[2]], rtol=1e-5)


# --- what an objective of one's own measures ---


@struct.dataclass
class F1:
    """Counts from which the F1 score of class 1 is made: no mean over examples."""

    hits: jax.Array
    named: jax.Array
    there: jax.Array

    def merge(self, other: F1) -> F1:
        return F1(self.hits + other.hits, self.named + other.named, self.there + other.there)

    def compute(self) -> jax.Array:
        return 2 * self.hits / (self.named + self.there)


def f1_loss(model: Any, batch: Batch, weights: jax.Array, training: bool) -> dict[str, Any]:
    logits = model(batch["inputs"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    named, there = (logits.argmax(axis=1) == 1) * weights, (batch["label"] == 1) * weights
    return {"loss": loss, "f1": F1((named * there).sum(), named.sum(), there.sum())}


def told(model: Any, batch: Batch, training: bool, rngs: nnx.Rngs) -> dict[str, Any]:
    noise = jax.random.normal(rngs.noise(), (len(batch["inputs"]),))
    return {"loss": model(batch["inputs"]).mean(axis=1), "training": jnp.full(len(noise), float(training)), "z": noise}


def test_a_metric_that_is_no_mean_comes_to_be_merged() -> None:
    objective = wrap_user_objective(f"{__name__}:f1_loss", {})
    rng = np.random.default_rng(0)
    inputs, label = rng.standard_normal((32, 3)).astype(np.float32), rng.integers(0, 2, 32)
    batch = {"inputs": jnp.asarray(inputs), "label": jnp.asarray(label)}
    network, state, (seen,) = train(OfImages, objective, [batch])
    model = merge_model(network.train, network, begin(OfImages, Sgd(lr=0.05))[1])
    named, there = np.asarray(model(inputs).argmax(axis=1)) == 1, label == 1
    assert seen["f1"] == pytest.approx(2 * (named & there).sum() / (named.sum() + there.sum()))
    step = jax.jit(make_eval_step(network, objective))
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 20), slice(12, 32))]
    # The second batch is filled up with eight examples of the first.
    first, second = step(state, halves[0], jnp.ones(20)), step(state, halves[1], jnp.asarray([0.0] * 8 + [1.0] * 12))
    after = np.asarray(merge_model(network.eval, network, state)(inputs).argmax(axis=1)) == 1
    by_hand = 2 * (after & there).sum() / (after.sum() + there.sum())
    assert float(first["f1"].merge(second["f1"]).compute()) == pytest.approx(by_hand)


def test_an_objective_is_told_whether_it_trains() -> None:
    from models.call_roles import follow_mode

    objective = wrap_user_objective(f"{__name__}:told", {})

    def make() -> nnx.Module:
        model = OfImages()
        follow_mode(model, jax.random.key(0), objective.roles)
        return model

    batch = {"inputs": jnp.ones((4, 3))}
    network, state, seen = train(make, objective, [batch, batch])
    assert [each["training"] for each in seen] == [1.0, 1.0]
    assert seen[0]["z"] != seen[1]["z"], "each step draws anew"
    sums = make_eval_step(network, objective)(state, batch, jnp.ones(4))
    assert float(sums["training"]) == 0


@pytest.mark.parametrize("name", [*RESERVED_METRICS, "eval/loss", 3, "", " "])
def test_a_name_of_the_log_is_no_metric(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They overwrote the log's own keys: no line had a step any more."""
    monkeypatch.setitem(globals(), "named", lambda model, batch: {"loss": jnp.ones(4), name: jnp.ones(4)})
    objective = wrap_user_objective(f"{__name__}:named", {})
    with pytest.raises(InvalidModelOrObjective, match="a metric may not be called") as raised:
        objective(Line(), {"inputs": jnp.ones((4, 1))}, jnp.ones(4))
    assert "taken: step, split, lr, grad_norm, weight" in str(raised.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (jnp.ones(4, bool), '"loss" is of bool; expected real fractions; no gradient comes from whole numbers'),
        (jnp.ones(4, jnp.int32), '"loss" is of int32; expected real fractions; no gradient comes from whole numbers'),
        (jnp.ones(4, jnp.complex64), '"loss" is of complex64; expected real fractions; take its real part'),
    ],
)
def test_a_loss_without_a_slope_is_refused(loss: jax.Array, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that counts what is right trained to the end, and nothing was learnt."""
    monkeypatch.setitem(globals(), "flat", lambda model, batch: {"loss": loss})
    objective = wrap_user_objective(f"{__name__}:flat", {})
    with pytest.raises(InvalidModelOrObjective) as raised:
        objective(Line(), {"inputs": jnp.ones((4, 1))}, jnp.ones(4))
    assert message in str(raised.value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_metric_may_be_of_numpy_and_a_loss_of_any_fraction(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"loss": jnp.ones(4, dtype), "share": np.full(4, 0.5)}
    monkeypatch.setitem(globals(), "numpy_metric", lambda model, batch: given)
    found = wrap_user_objective(f"{__name__}:numpy_metric", {})(Line(), {"inputs": jnp.ones((4, 1))}, jnp.ones(4))
    assert found["share"].tolist() == [0.5] * 4


def test_what_fills_up_a_batch_may_be_infinite() -> None:
    network, state = begin(Line, Sgd(lr=0.05))
    objective = measure(lambda model, batch: {"loss": jnp.asarray([1.0, 2.0, jnp.inf])})
    sums = make_eval_step(network, objective)(state, {"inputs": jnp.ones((3, 1))}, jnp.asarray([1.0, 1.0, 0.0]))
    assert float(sums["loss"]) == 3


# --- seeds ---


def test_no_two_seeds_are_alike() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 7 * 2**32, 2**40, 2**63 - 1]
    keys = {tuple(jax.random.key_data(make_key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    for seed in (0, 5, 2**32 - 1):
        assert (jax.random.key_data(make_key(seed)) == jax.random.key_data(jax.random.key(seed))).all()
