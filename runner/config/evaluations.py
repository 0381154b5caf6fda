"""What is evaluated while a model trains, by name: options, defaults and ranges. Free of jax.

The name of an evaluation is its split in the log: one named `eval` measures `eval/loss`. Each has a cadence of its own;
at the last step all of them are due, and some only then. To add a kind: a dataclass here (also in the union
`Evaluation`), what it does in runner/train/evaluator.py, and a YAML in conf/eval/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from models import Model

Count = Annotated[int, Ge(1)]
WeightsChoice = Literal["params", "ema"]
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


Evaluation = MetricsEvaluation | TextEvaluation | SamplesEvaluation | ReconstructionsEvaluation
Evaluations = Mapping[str, Evaluation]


def check_evaluations(evaluations: Evaluations, model: Model, *, has_ema: bool) -> None:
    """Raise ValueError where a name is taken, or where an evaluation needs what the run does not have.

    `has_ema` says whether a moving average of the weights is kept.
    """
    if taken := sorted(evaluations.keys() & set(RESERVED_NAMES)):
        raise ValueError(f"eval.{taken[0]}: this name is taken by training itself; choose another")
    for name, option in evaluations.items():
        if not isinstance(option, MetricsEvaluation) and option.kind not in model.shows:
            shows = ", ".join(model.shows) or "nothing"
            raise ValueError(f"eval.{name}: model={model.kind} makes no {option.kind} (it has: {shows})")
        if option.weights == "ema" and not has_ema:
            raise ValueError(f"eval.{name}.weights=ema: no average is kept; add optim.ema=0.999")


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
