"""WHICH checkpoints stay: pure rules from records to sets of steps. The union of what the rules keep survives.

The law, whatever the rules say: the newest, the best by score and the pinned checkpoints survive. A budget is the one
rule that takes away: it comes last, oldest first, and stops at the law.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from runner.checkpoint.record import Mode, Record, Score, find_best
from runner.text import parsed_size

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class Last:
    """The newest n."""

    kind: Literal["last"] = "last"
    n: Count = 2

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        newest = sorted((record.step for record in records), reverse=True)[: self.n]
        return dict.fromkeys(newest, f"last {self.n}")

    def most(self, steps: int) -> int | None:
        return self.n


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

    def most(self, steps: int) -> int | None:
        return self.n


@dataclass(frozen=True, kw_only=True)
class EveryK:
    """Milestones, for good: the first checkpoint at or after each multiple of so many steps."""

    kind: Literal["every_k"] = "every_k"
    steps: Count = 1000

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        later = [record for record in records if record.step >= self.steps]
        return dict.fromkeys(_firsts(later, lambda record: record.step // self.steps), f"every {self.steps}th step")

    def most(self, steps: int) -> int | None:
        return steps // self.steps


@dataclass(frozen=True, kw_only=True)
class Spaced:
    """Dense near the end, ever thinner towards the beginning: gaps grow by a factor of two.

    For windows of `steps`, 2 × `steps`, 4 × `steps` … the first checkpoint of each of the newest n windows stays. What
    a wide window will want is the first of a narrow one as well, so it is there when its time comes.
    """

    kind: Literal["spaced"] = "spaced"
    steps: Count = 100
    n: Annotated[int, Ge(2)] = 2

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        kept: dict[int, str] = {}
        for width in self._widths(max((record.step for record in records), default=0)):
            for step in _firsts(records, lambda record, width=width: record.step // width)[-self.n :]:  # type: ignore[misc]
                kept.setdefault(step, f"spaced {width}")
        return kept

    def most(self, steps: int) -> int | None:
        return self.n * len(self._widths(steps))

    def _widths(self, newest: int) -> list[int]:
        return [self.steps << level for level in range(max(newest // self.steps, 1).bit_length() + 1)]


@dataclass(frozen=True, kw_only=True)
class SpacedInTime:
    """One for each so many seconds of the clock (3600: an hour, 86400: a day): the first of each of the newest n.

    The clock only decides how many stay, never which is the newest: a clock that jumps keeps one more or one less.
    """

    kind: Literal["time"] = "time"
    seconds: Annotated[float, Gt(0.0)] = 3600.0
    n: Count = 24

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        firsts = _firsts(records, lambda record: int(record.saved_unix_seconds // self.seconds))
        return dict.fromkeys(firsts[-self.n :], f"one in {self.seconds:g} s")

    def most(self, steps: int) -> int | None:
        return self.n


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """Only those that were pinned by hand (`python -m runner pin RUN@STEP`), and what the law keeps."""

    kind: Literal["pinned"] = "pinned"

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        return {record.step: "pinned" for record in records if record.pinned}

    def most(self, steps: int) -> int | None:
        return 0


@dataclass(frozen=True, kw_only=True)
class All:
    """Every one."""

    kind: Literal["all"] = "all"

    def keeps(self, records: Sequence[Record]) -> dict[int, str]:
        return {record.step: "all" for record in records}

    def most(self, steps: int) -> int | None:
        return None


@dataclass(frozen=True, kw_only=True)
class DiskBudget:
    """At most so many bytes (`20000000000` or `20GB`): drops the oldest of what the other rules keep."""

    kind: Literal["disk_budget"] = "disk_budget"
    bytes: Annotated[int, Ge(1)] | str = "20GB"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"bytes={self.bytes} must be a number of bytes, as 20000000000, 20GB or 500MiB")

    @property
    def limit(self) -> int:
        """In bytes; 0 where it cannot be read."""
        return parsed_size(self.bytes)

    def drops(self, records: Sequence[Record], protected: Container[int]) -> list[int]:
        """Steps to let go so that the rest fits, oldest first; what is protected stays, fit or not."""
        total, dropped = sum(record.num_bytes for record in records), []
        for record in sorted(records, key=lambda record: record.step):
            if total > self.limit and record.step not in protected:
                dropped.append(record.step)
                total -= record.num_bytes
        return dropped


RetentionRule = Last | BestN | EveryK | Spaced | SpacedInTime | Pinned | All | DiskBudget


def select_survivors(rules: Mapping[str, RetentionRule], records: Sequence[Record], score: Score) -> dict[int, str]:
    """The steps that stay, each with every reason why.

    A marked checkpoint is nothing to resume from: the newest of them stays to be looked at, the others go.
    """
    law = _law(records, score)
    reasons: dict[int, list[str]] = {step: [why] for step, why in law.items()}
    good = [record for record in records if not record.mark]
    for rule in rules.values():
        for step, why in ({} if isinstance(rule, DiskBudget) else rule.keeps(good)).items():
            reasons.setdefault(step, []).append(why)
    for rule in rules.values():
        if isinstance(rule, DiskBudget):
            for step in rule.drops([record for record in records if record.step in reasons], protected=law):
                del reasons[step]
    return {step: ", ".join(whys) for step, whys in sorted(reasons.items())}


def max_kept(rules: Mapping[str, RetentionRule], steps: int) -> int | None:
    """How many checkpoints stay at most in a run of so many steps, the law's two included; None for no limit."""
    counts = [rule.most(steps) for rule in rules.values() if not isinstance(rule, DiskBudget)]
    return None if None in counts else max(sum(count for count in counts if count is not None), 2)


def _law(records: Sequence[Record], score: Score) -> dict[int, str]:
    kept = {record.step: "pinned" for record in records if record.pinned}
    if marked := [record.step for record in records if record.mark]:
        kept[max(marked)] = "the last that an error left"
    good = [record for record in records if not record.mark]
    if best := find_best(good, score):
        kept[best.step] = "best"
    if good:
        kept[max(record.step for record in good)] = "newest"
    return kept


def _firsts(records: Sequence[Record], window: Callable[[Record], int]) -> list[int]:
    """The first step in each window that has one, oldest window first."""
    first: dict[int, int] = {}
    for record in sorted(records, key=lambda record: record.step):
        first.setdefault(window(record), record.step)
    return [first[key] for key in sorted(first)]
