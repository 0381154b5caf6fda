"""What an evaluation looks at: sets that are held out, all of one or a sample; and metrics that are no mean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.sources import Sources, Table
from runner.config.evaluations import MetricsEvaluation, TextEvaluation, find_cadences, find_due_evaluations
from runner.errors import ConfigError
from runner.train.evaluator import EvaluationRun, Evaluator

SETS = {"train": 100, "eval": 50, "test": 23, "wild": 7}  # examples, each worth the number of its set


def evaluator(named: dict[str, Any], *, bytes_per_token: float | None = None) -> Evaluator:
    tables = {
        name: Table({"n": np.full(size, number, np.float32), "i": np.arange(size)})
        for number, (name, size) in enumerate(SETS.items())
    }
    sources = Sources(
        tables["train"],
        tables["eval"],
        (1,),
        2,
        "",
        "",
        held_out={name: tables[name] for name in ("test", "wild")},
        bytes_per_token=bytes_per_token,
    )
    return Evaluator(named, sources, None, lambda value: value, batch_size=4, batches=2)  # type: ignore[arg-type]


def sums(state: Any, batch: Any, weights: Any) -> dict[str, Any]:
    return {"n": (batch["n"] * weights).sum(), "size": weights.sum() * weights.sum(), "weight": weights.sum()}


def measure(named: dict[str, Any], step: Any = sums) -> dict[str, Any]:
    return evaluator(named)(list(named), {"params": 0}, EvaluationRun(step, Path(), ""))


@pytest.mark.parametrize(("split", "number"), [("train", 0.0), ("eval", 1.0), ("test", 2.0), ("wild", 3.0)])
def test_each_set_is_looked_at_by_its_name(split: str, number: float) -> None:
    assert measure({"a": MetricsEvaluation(split=split)})["a"]["n"] == number


@pytest.mark.parametrize(("split", "batches", "seen"), [("test", "all", 23), ("wild", "all", 7), ("test", None, 8)])
def test_all_of_a_set_or_as_many_batches_as_usual(split: str, batches: Any, seen: int) -> None:
    """Every example of it once, also in a last batch that is not full."""
    found: list[int] = []

    def step(state: Any, batch: Any, weights: Any) -> dict[str, Any]:
        found.extend(batch["i"][weights > 0].tolist())
        return sums(state, batch, weights)

    measure({"a": MetricsEvaluation(split=split, batches=batches)}, step)
    assert len(found) == seen == len(set(found))


def test_a_set_that_is_not_there_is_told_with_those_that_are() -> None:
    evaluator({"a": MetricsEvaluation(split="wild"), "text": TextEvaluation()}).check_splits()
    with pytest.raises(
        ConfigError,
        match=r"^eval.b.split=tset: the data has no such set; it has eval, train, test, wild; did you mean test\?$",
    ):
        evaluator({"a": MetricsEvaluation(), "b": MetricsEvaluation(split="tset")}).check_splits()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"eval": MetricsEvaluation()}, "evaluates 8 of 50 held-out examples"),
        ({"eval": MetricsEvaluation(batches=13)}, ""),
        ({"eval": MetricsEvaluation(batches="all"), "test": MetricsEvaluation(split="test", batches="all")}, ""),
        (
            {
                "e": MetricsEvaluation(batches=12),
                "t": MetricsEvaluation(split="train"),
                "w": MetricsEvaluation(split="test"),
            },
            "eval.e 48 of 50 held-out examples, eval.t 8 of 100 training examples, eval.w 8 of 23 examples of test",
        ),
        ({"text": TextEvaluation()}, ""),
    ],
)
def test_a_sample_is_told(named: dict[str, Any], words: str) -> None:
    assert evaluator(named).describe_samples() == words


@pytest.mark.parametrize(
    ("split", "is_one"),
    [
        *((name, True) for name in ("test", "test_b", "test-clean", "testing", "Test", "test2")),
        *((name, False) for name in ("eval", "train", "wild", "testimony", "latest", "dev_test")),
    ],
)
def test_which_sets_choose_nothing(split: str, *, is_one: bool) -> None:
    assert MetricsEvaluation(split=split).looks_at_test_set == is_one


def test_what_is_evaluated_at_the_end_alone_has_no_cadence() -> None:
    named = {"eval": MetricsEvaluation(), "test": MetricsEvaluation(split="test", steps="last")}
    assert find_cadences(named, 3) == {3}
    due = {step: find_due_evaluations(named, 3, step, 7) for step in range(1, 8)}
    assert [step for step, names in due.items() if "eval" in names] == [3, 6, 7]
    assert [step for step, names in due.items() if "test" in names] == [7]


def test_names_of_what_is_measured() -> None:
    named = {"eval": MetricsEvaluation(), "text": TextEvaluation(), "test": MetricsEvaluation(split="test")}
    measured = ["loss", "f1"]
    assert evaluator(named).list_metric_names([*measured, "weight"]) == {"eval": measured, "test": measured}
    found = evaluator(named, bytes_per_token=3.5).list_metric_names(["loss", "bits_per_token"])
    assert found["eval"] == ["loss", "bits_per_token", "bits_per_byte"]


@partial(jax.tree_util.register_dataclass, data_fields=["hits", "guesses"], meta_fields=[])
@dataclass(frozen=True)
class Precision:
    """No mean over examples: hits over guesses, both of all batches."""

    hits: jax.Array
    guesses: jax.Array

    def merge(self, other: Precision) -> Precision:
        return Precision(self.hits + other.hits, self.guesses + other.guesses)

    def compute(self) -> jax.Array:
        return self.hits / self.guesses


def test_a_metric_that_is_no_mean_is_put_together_over_all_batches() -> None:
    """Beside means, and not as the mean over batches: 7 examples in two batches, one of which is filled up."""

    @jax.jit
    def step(state: Any, batch: Any, weights: Any) -> dict[str, Any]:
        guessed = (batch["i"] % 3 == 0) * weights
        return {
            "precision": Precision((guessed * (batch["i"] > 3)).sum(), guessed.sum()),
            **sums(state, batch, weights),
        }

    found = measure({"a": MetricsEvaluation(split="wild", batches="all")}, step)["a"]
    assert found["precision"] == pytest.approx(1 / 3)  # guessed: 0, 3, 6; by batches: (0/2 + 1/1) / 2
    assert found["n"] == 3.0
    assert isinstance(found["precision"], float)


def test_nothing_waits_for_the_device_between_two_batches() -> None:
    """A value is read when all batches are dispatched, and not before."""
    order: list[str] = []

    class Later:
        def __init__(self, name: str):
            self.name = name

        def __add__(self, other: Later) -> Later:
            order.append(f"add {self.name}")
            return self

        def __float__(self) -> float:
            order.append("read")
            return 1.0

    class LaterMetric:
        def merge(self, other: Any) -> LaterMetric:
            order.append("merge")
            return self

        def compute(self) -> Later:
            order.append("compute")
            return Later("")

    def step(state: Any, batch: Any, weights: Any) -> dict[str, Any]:
        order.append("batch")
        return {"loss": Later("loss"), "f1": LaterMetric(), "weight": Later("weight")}

    measure({"a": MetricsEvaluation()}, step)
    assert order == ["batch", "batch", "add loss", "merge", "add weight", "read", "read", "compute", "read"]


def test_what_users_metrics_are_made_with() -> None:
    """Classes as those of clu and google-metrax: a dataclass of arrays with merge and compute."""
    one, two = (Precision(jnp.array(hits), jnp.array(4.0)) for hits in (1.0, 3.0))
    step = iter([one, two])
    found = measure({"a": MetricsEvaluation()}, lambda *_: {"p": next(step), "weight": jnp.array(4.0)})
    assert found["a"] == {"p": 0.5}
