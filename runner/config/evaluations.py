"""What is looked at while a model trains, by name: option, default and range of each. Free of jax.

The name of an evaluation is its split in the log: one named `eval` measures `eval/loss`. Each has a cadence of its own;
at the last step all of them are due. To add a kind: a dataclass here, what it does in measure.py, a YAML in conf/eval/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

Count = Annotated[int, Ge(1)]
WeightsChoice = Literal["params", "ema"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOption:
    """What every evaluation has. `steps`: every so many (null: train.eval_steps).

    `weights: ema` looks at the moving average of the weights (optim.ema).
    """

    steps: Count | None = None
    weights: WeightsChoice = "params"


@dataclass(frozen=True, kw_only=True)
class MetricsEvaluation(EvaluationOption):
    """The mean of every metric of the objective, over data that is held out or (`split: train`) over training data.

    `batches`: so many, evenly apart (null: train.eval_batches).
    """

    kind: Literal["metrics"] = "metrics"
    split: Literal["eval", "train"] = "eval"
    batches: Count | None = None


@dataclass(frozen=True, kw_only=True)
class TextEvaluation(EvaluationOption):
    """How a language model goes on after the first tokens of texts that are held out: a text file a time."""

    kind: Literal["text"] = "text"
    count: Count = 2
    prompt_tokens: Count = 16
    new_tokens: Count = 200
    temperature: Annotated[float, Gt(0.0)] = 0.8


@dataclass(frozen=True, kw_only=True)
class SamplesEvaluation(EvaluationOption):
    """Pictures that a generative model makes from noise, the same noise each time: one PNG a time."""

    kind: Literal["samples"] = "samples"
    count: Count = 64


@dataclass(frozen=True, kw_only=True)
class ReconstructionsEvaluation(EvaluationOption):
    """Held-out pictures, and below each what an autoencoder makes of it: one PNG a time."""

    kind: Literal["reconstructions"] = "reconstructions"
    count: Count = 18


Evaluation = MetricsEvaluation | TextEvaluation | SamplesEvaluation | ReconstructionsEvaluation
Evaluations = Mapping[str, Evaluation]


def find_due_evaluations(evaluations: Evaluations, eval_steps: int, step: int, last: int) -> list[str]:
    """The names of the evaluations after `step` completed updates, in their order."""
    return [name for name, one in evaluations.items() if step == last or step % (one.steps or eval_steps) == 0]


def find_cadences(evaluations: Evaluations, eval_steps: int) -> frozenset[int]:
    """Every how many steps there is something to evaluate."""
    return frozenset(one.steps or eval_steps for one in evaluations.values())
