"""WHICH checkpoints stay: pure rules from records to sets of steps. The union of what the rules keep survives.

The law, whatever the rules say: the newest, the best by score and the pinned checkpoints survive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from runner.checkpoint.record import Mode, Record, Score, best_of

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class Last:
    """The newest n."""

    kind: Literal["last"] = "last"
    n: Count = 2

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        newest = sorted((record.step for record in records), reverse=True)[: self.n]
        return dict.fromkeys(newest, f"last {self.n}")


@dataclass(frozen=True, kw_only=True)
class BestN:
    """The best n by a metric; a checkpoint whose metric is missing or not finite never ranks."""

    kind: Literal["best"] = "best"
    n: Count = 1
    metric: str = "eval/loss"
    mode: Mode = "min"

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        score = Score(self.metric, self.mode)
        ranked = sorted((value, -record.step) for record in records if (value := score.of(record.metrics)) is not None)
        return {-step: f"best {self.n} {self.metric}" for _, step in ranked[: self.n]}


@dataclass(frozen=True, kw_only=True)
class All:
    """Every one."""

    kind: Literal["all"] = "all"

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        return {record.step: "all" for record in records}


Keep = Last | BestN | All


def survivors(rules: Mapping[str, Keep], records: Sequence[Record], score: Score) -> dict[int, str]:
    """The steps that stay, each with every reason why."""
    reasons: dict[int, list[str]] = {}
    for kept in [_law(records, score), *(rule.keeps(records) for rule in rules.values())]:
        for step, why in kept.items():
            reasons.setdefault(step, []).append(why)
    return {step: ", ".join(whys) for step, whys in sorted(reasons.items())}


def _law(records: Sequence[Record], score: Score) -> dict[int, str]:
    kept = {record.step: "pinned" for record in records if record.pinned}
    if best := best_of(records, score):
        kept[best.step] = "best"
    if records:
        kept[max(record.step for record in records)] = "newest"
    return kept
