"""What is evaluated while a model trains, by name: options, defaults and ranges. Free of jax.

The name of an evaluation is its split in the log: one named `eval` measures `eval/loss`. Each has a cadence of its own;
at the last step all of them are due, and some only then. To add a kind: a dataclass here (also in the union
`Evaluation`), what it does in runner/train/evaluator.py, and a YAML in conf/eval/. One of the user's own needs none of
these: see `ExternalEvaluation`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge, Gt

Count = Annotated[int, Ge(1)]
WeightsChoice = Literal["params", "ema"]
# What a function of the user's own may ask for by the names of its parameters, beside what is evaluated.
ASKED_BY_NAME = ("batches", "step", "key", "decode", "classes")
# Splits that training itself writes to the log.
RESERVED_NAMES = ("save", "train")


@dataclass(frozen=True, kw_only=True)
class EvaluationOption:
    """What every evaluation has.

    Attributes:
        steps: evaluate every so many; null: train.eval_steps; `last`: at the last step alone.
        weights: `ema` looks at the moving average of the weights (optim.ema).
    """

    steps: Count | Literal["last"] | None = None
    weights: WeightsChoice = "params"


@dataclass(frozen=True, kw_only=True)
class MetricsEvaluation(EvaluationOption):
    """The mean of every metric of the objective, over data that is held out, or over training data.

    Attributes:
        split: `eval` is what is held out, `train` is training data, without dropout; any other name is that of a
            further set that the data holds out, as `test`.
        batches: so many, evenly apart; null: train.eval_batches; `all`: every example once.
    """

    kind: Literal["metrics"] = "metrics"
    split: str = "eval"
    batches: Count | Literal["all"] | None = None

    @property
    def looks_at_test_set(self) -> bool:
        """Return whether what is measured may choose nothing: it says how good a model is that was chosen without."""
        # `test`, `test_matched`, `testing`, `test-clean`; data of others has all of these, and `testimony` is none.
        return re.fullmatch(r"test(ing)?([^a-z].*)?", self.split, re.IGNORECASE) is not None


@dataclass(frozen=True, kw_only=True)
class TextEvaluation(EvaluationOption):
    """How a language model goes on after the first tokens of texts that are held out: a text file a time.

    Attributes:
        count: so many texts.
        prompt_tokens: so many tokens of each are given.
        new_tokens: so many are made.
        temperature: less than 1 prefers what is likely.
    """

    kind: Literal["text"] = "text"
    count: Count = 2
    prompt_tokens: Count = 16
    new_tokens: Count = 200
    temperature: Annotated[float, Gt(0.0)] = 0.8


@dataclass(frozen=True, kw_only=True)
class SamplesEvaluation(EvaluationOption):
    """Pictures that a generative model makes from noise, the same noise each time: one PNG a time.

    Attributes:
        count: so many pictures in it.
    """

    kind: Literal["samples"] = "samples"
    count: Count = 64


@dataclass(frozen=True, kw_only=True)
class ReconstructionsEvaluation(EvaluationOption):
    """Held-out pictures, and below each what an autoencoder makes of it: one PNG a time.

    Attributes:
        count: so many pictures in it.
    """

    kind: Literal["reconstructions"] = "reconstructions"
    count: Count = 18


@dataclass(frozen=True, kw_only=True)
class ExternalEvaluation(EvaluationOption):
    """A function of your own: numbers for the log, and pictures and texts as files in the run's directory.

    Attributes:
        target: `module:function`, called as target(subject, **options) with what it asks for by name: `batches`,
            `step`, `key`, `decode`, `classes`. The subject is the live model.
        options: for the target, as `+eval.mine.options.bins=20`.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


Evaluation = MetricsEvaluation | TextEvaluation | SamplesEvaluation | ReconstructionsEvaluation | ExternalEvaluation
Evaluations = Mapping[str, Evaluation]


class Showing(Protocol):
    """Say which evaluations the thing that is trained can do beside metrics."""

    @property
    def kind(self) -> str:
        """Return its name."""

    @property
    def shows(self) -> tuple[str, ...]:
        """Return the kinds of these evaluations."""


def check_evaluations(evaluations: Evaluations, model: Showing, *, has_ema: bool) -> None:
    """Raise ValueError where a name is taken, or where an evaluation needs what the run does not have.

    `has_ema` says whether a moving average of the weights is kept.
    """
    if taken := sorted(evaluations.keys() & set(RESERVED_NAMES)):
        raise ValueError(f"eval.{taken[0]}: this name is taken by training itself; choose another")
    for name, option in evaluations.items():
        # What a function of the user's own makes of a model is its own business.
        needs_model = not isinstance(option, MetricsEvaluation | ExternalEvaluation)
        if needs_model and option.kind not in model.shows:
            shows = ", ".join(model.shows) or "nothing"
            raise ValueError(f"eval.{name}: model={model.kind} makes no {option.kind} (it has: {shows})")
        if option.weights == "ema" and not has_ema:
            way_out = "leave it out: its state has what it keeps" if model.kind == "program" else "add optim.ema=0.999"
            raise ValueError(f"eval.{name}.weights=ema: no average is kept; {way_out}")


def find_due_evaluations(evaluations: Evaluations, eval_steps: int, step: int, last: int) -> list[str]:
    """Return the names of the evaluations that are due after `step` completed updates, in their order.

    `eval_steps` is the cadence of those that have none of their own; after step `last` all are due.
    """
    return [
        name
        for name, one in evaluations.items()
        if step == last or (one.steps != "last" and step % (one.steps or eval_steps) == 0)
    ]


def find_cadences(evaluations: Evaluations, eval_steps: int) -> frozenset[int]:
    """Return every how many steps there is something to evaluate, one number for each cadence."""
    return frozenset(one.steps or eval_steps for one in evaluations.values() if one.steps != "last")
