"""When training ends before its last step, because a metric gets no better. Free of jax.

The rule is a pure function of what was measured so far, which metrics.jsonl holds: nothing about it is in a checkpoint,
and a run that goes on, from whichever step, counts as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from runner.checkpoint.record import Mode, Score
from runner.log.jsonl import read_metric_lines

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """End training where a metric gets no better; the step at which it ends is saved and evaluated as the last.

    Attributes:
        metric: what is looked at, as `eval/loss`; null: nothing, and training goes to its last step.
        patience: so many evaluations in a row without an improvement end it.
        min_improvement: an improvement is more than this, compared with the last value that was one.
        mode: whether less (`min`) or more (`max`) is better; null: as score.mode says.
    """

    metric: str | None = None
    patience: Count = 5
    min_improvement: Annotated[float, Ge(0.0)] = 0.0
    mode: Mode | None = None


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
