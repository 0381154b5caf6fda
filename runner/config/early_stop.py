"""When training ends before its last step: a metric gets no better, or a rule of the user's own says so. No jax.

Either is a pure function of what was measured so far, which metrics.jsonl holds: nothing about it is in a checkpoint,
and a run that goes on, from whichever step, counts as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from runner.checkpoint.record import Mode, Score
from runner.log.jsonl import read_metric_lines

Count = Annotated[int, Ge(1)]


# One evaluation for a rule: its step, and what was measured, as `{"eval/loss": 1.2}`.
Measured = tuple[int, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class ExternalStop:
    """End training where a function of your own says so.

    It is asked after every evaluation, in the process that trains, as

        target(history: list[tuple[int, dict[str, float]]], **options) -> str | bool | None

    with every evaluation so far, oldest first: its step, and what was measured, as `{"eval/loss": 1.2}`. A reason, or
    true, ends training; nothing, or false, does not. Where it raises, training goes on, and that is told once.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`.
        options: what it is called with by name.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """End training before its last step; the step at which it ends is saved and evaluated as the last.

    Attributes:
        metric: what is looked at, as `eval/loss`; null: nothing, and training goes to its last step.
        patience: so many evaluations in a row without an improvement end it.
        min_improvement: an improvement is more than this, compared with the last value that was one.
        mode: whether less (`min`) or more (`max`) is better; null: as score.mode says.
        rules: functions of your own that may end training as well, each under a name of its own.
    """

    metric: str | None = None
    patience: Count = 5
    min_improvement: Annotated[float, Ge(0.0)] = 0.0
    mode: Mode | None = None
    rules: Mapping[str, ExternalStop] = field(default_factory=dict)


def count_unimproved(values: Iterable[float | None], mode: Mode, min_improvement: float) -> int:
    """Return how many values have come since the last one that was an improvement; all of them where none was.

    The first finite value is one. A value that is missing or not finite never is.
    """
    score, best, count = Score("value", mode), math.inf, 0
    for value in values:
        # As a rank, where less is better.
        rank = None if value is None else score.of({"value": value})
        if rank is not None and rank < best - min_improvement:
            best, count = rank, 0
        else:
            count += 1
    return count


def read_history(metrics: Path, metric: str) -> Iterator[float | None]:
    """Yield a metric at each evaluation that metrics.jsonl holds, in their order; None where it is missing there."""
    split, _, name = metric.partition("/")
    for _, found, values in read_metric_lines(metrics):
        if found == split:
            value = values.get(name)
            yield None if isinstance(value, str) else value


def explain_early_stop(option: EarlyStop, default_mode: Mode, values: Iterable[float | None]) -> str:
    """Return why training ends after these values, in words for a person; empty where it goes on.

    `default_mode` counts where the option names none.
    """
    if option.metric is None:
        return ""
    count = count_unimproved(values, option.mode or default_mode, option.min_improvement)
    if count < option.patience:
        return ""
    more = f" by more than {option.min_improvement:g}" if option.min_improvement else ""
    return f"{option.metric} has not improved{more} in {count} evaluation{'s' * (count > 1)}"


def read_evaluations(metrics: Path, splits: Collection[str]) -> list[Measured]:
    """Return every evaluation that metrics.jsonl holds, oldest first, as far as it is of these splits."""
    found: list[Measured] = []
    for step, split, values in read_metric_lines(metrics):
        if split not in splits:
            continue
        # What is measured at one step comes in lines that follow each other, a line for each split.
        if not found or found[-1][0] != step:
            found.append((step, {}))
        numbers = {name: float(value) for name, value in values.items() if not isinstance(value, str)}
        found[-1][1].update({f"{split}/{name}": value for name, value in numbers.items()})
    return found
