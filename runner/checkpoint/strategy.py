"""WHEN to save: pure rules over what is true now and what is on disk. Each gives a reason a person can read, or none.

Rules hold no state, so nothing about the strategy needs saving: after a restart they see the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from runner.checkpoint.record import Mode, Record, Score, best_of
from runner.moment import Moment


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Every so many steps: at each multiple, or as soon after it as the disk allows."""

    kind: Literal["steps"] = "steps"
    steps: Annotated[int, Ge(1)]

    def reason(self, moment: Moment, records: Sequence[Record]) -> str | None:
        newest = max((record.step for record in records), default=0)
        return f"every {self.steps} steps" if moment.step // self.steps > newest // self.steps else None


@dataclass(frozen=True, kw_only=True)
class Best:
    """When a metric measured at this step beats every checkpoint on disk. What is not finite never ranks."""

    kind: Literal["best"] = "best"
    metric: str = "eval/loss"
    mode: Mode = "min"
    min_improvement: Annotated[float, Ge(0.0)] = 0.0

    def reason(self, moment: Moment, records: Sequence[Record]) -> str | None:
        score = Score(self.metric, self.mode)
        value = score.of(moment.metrics)
        if value is None:
            return None
        best = best_of(records, score)
        if best is None:
            return f"first {self.metric}: {moment.metrics[self.metric]:.4g}"
        previous = score.of(best.metrics)
        assert previous is not None
        if value >= previous - self.min_improvement:
            return None
        return f"best {self.metric}: {best.metrics[self.metric]:.4g} → {moment.metrics[self.metric]:.4g}"


Rule = Steps | Best


def due(rules: Mapping[str, Rule], moment: Moment, records: Sequence[Record]) -> str | None:
    """Every reason to save now, joined; None where no rule asks for it."""
    reasons = [reason for rule in rules.values() if (reason := rule.reason(moment, records))]
    return "; ".join(reasons) or None
