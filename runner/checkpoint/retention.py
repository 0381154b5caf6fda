"""WHICH checkpoints stay: pure rules from records to sets of steps. What any of the rules keeps survives.

The law stands above the rules: the newest, the best by score and the pinned checkpoints survive. A disk budget is the
one rule that takes away: it comes last, drops the oldest first, and stops at the law.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from runner.checkpoint.record import Mode, Record, Score, find_best
from runner.text import parse_size

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class KeepLast:
    """Keep the newest n.

    Attributes:
        n: how many.
    """

    kind: Literal["last"] = "last"
    n: Count = 2

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason that `ls` shows."""
        newest = sorted((record.step for record in records), reverse=True)[: self.n]
        return dict.fromkeys(newest, f"last {self.n}")

    def max_kept(self, steps: int) -> int | None:
        """Return how many checkpoints this keeps at most in a run of so many steps."""
        return self.n


@dataclass(frozen=True, kw_only=True)
class KeepBest:
    """Keep the best n by a metric; a checkpoint whose metric is missing or not finite never ranks.

    Attributes:
        n: how many.
        metric: what they are ranked by, as `eval/loss`.
        mode: whether the least (`min`) or the most (`max`) is best.
    """

    kind: Literal["best"] = "best"
    n: Count = 1
    metric: str = "eval/loss"
    mode: Mode = "min"

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason; the newer of two equals ranks first."""
        score = Score(self.metric, self.mode)
        ranked = sorted((value, -record.step) for record in records if (value := score.of(record.metrics)) is not None)
        return {-step: f"best {self.n} {self.metric}" for _, step in ranked[: self.n]}

    def max_kept(self, steps: int) -> int | None:
        """Return how many checkpoints this keeps at most in a run of so many steps."""
        return self.n


@dataclass(frozen=True, kw_only=True)
class KeepEveryK:
    """Keep milestones for good: the first checkpoint at or after each multiple of so many steps.

    Attributes:
        steps: how many.
    """

    kind: Literal["every_k"] = "every_k"
    steps: Count = 1000

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason."""
        # Step 0 is no milestone: without this the first checkpoint of every run would stay.
        later = [record for record in records if record.step >= self.steps]
        milestones = _first_of_each(later, lambda record: record.step // self.steps)
        return dict.fromkeys(milestones, f"every {self.steps}th step")

    def max_kept(self, steps: int) -> int | None:
        """Return how many checkpoints this keeps at most in a run of so many steps."""
        return steps // self.steps


@dataclass(frozen=True, kw_only=True)
class KeepSpaced:
    """Keep checkpoints dense near the end and ever thinner towards the beginning: gaps grow by a factor of two.

    For windows of `steps`, 2 × `steps`, 4 × `steps` … the first checkpoint of each of the newest n windows stays.

    Attributes:
        steps: the narrowest window.
        n: so many windows of each width.
    """

    kind: Literal["spaced"] = "spaced"
    steps: Count = 100
    n: Annotated[int, Ge(2)] = 2

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason: the narrowest window that keeps it."""
        kept: dict[int, str] = {}
        # The first checkpoint of a wide window is the first of a narrow one as well. So what a wide window will want
        # later is still there when its time comes, though every save prunes.
        for width in self._window_widths(max((record.step for record in records), default=0)):
            firsts = _first_of_each(records, lambda record, width=width: record.step // width)  # type: ignore[misc]
            for step in firsts[-self.n :]:
                kept.setdefault(step, f"spaced {width}")
        return kept

    def max_kept(self, steps: int) -> int | None:
        """Return how many checkpoints this keeps at most in a run of so many steps."""
        return self.n * len(self._window_widths(steps))

    def _window_widths(self, newest_step: int) -> list[int]:
        return [self.steps << level for level in range(max(newest_step // self.steps, 1).bit_length() + 1)]


@dataclass(frozen=True, kw_only=True)
class KeepInTime:
    """Keep one in so many seconds of the clock: the first of each of the newest n.

    The clock only decides how many stay, never which is the newest. Each time it jumps, it keeps one more: what was
    saved while it was wrong counts as a time of its own, and is neither newer nor older than its step says.

    Attributes:
        seconds: how many (3600: an hour, 86400: a day).
        n: so many of them.
    """

    kind: Literal["time"] = "time"
    seconds: Annotated[float, Gt(0.0)] = 3600.0
    n: Count = 24

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason."""
        firsts, last = [], None
        for record in sorted(records, key=lambda record: record.step):
            # Compared with the one before it alone: after a clock that was years ahead, nothing would ever be newer.
            if (now := record.saved_unix_seconds // self.seconds) != last:
                firsts.append(record.step)
            last = now
        return dict.fromkeys(firsts[-self.n :], f"one in {self.seconds:g} s")

    def max_kept(self, steps: int) -> int | None:
        """Return how many checkpoints this keeps at most in a run of so many steps."""
        return self.n


@dataclass(frozen=True, kw_only=True)
class KeepPinned:
    """Keep only those that were pinned by hand (`python -m runner pin RUN@STEP`), and what the law keeps."""

    kind: Literal["pinned"] = "pinned"

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason."""
        return {record.step: "pinned" for record in records if record.pinned}

    def max_kept(self, steps: int) -> int | None:
        """Return 0: how many a person will pin cannot be known."""
        return 0


@dataclass(frozen=True, kw_only=True)
class KeepAll:
    """Keep every one."""

    kind: Literal["all"] = "all"

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason."""
        return {record.step: "all" for record in records}

    def max_kept(self, steps: int) -> int | None:
        """Return None: there is no limit."""
        return None


@dataclass(frozen=True, kw_only=True)
class DiskBudget:
    """Keep at most so many bytes: drop the oldest of what the other rules keep.

    Attributes:
        bytes: how many, as `20000000000`, `20GB` or `500MiB`.
    """

    kind: Literal["disk_budget"] = "disk_budget"
    # As it was typed: this is part of the document that runs are compared by, so 20GB must not turn into a number.
    bytes: Annotated[int, Ge(1)] | str = "20GB"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"bytes={self.bytes} must be a number of bytes, as 20000000000, 20GB or 500MiB")

    @property
    def limit(self) -> int:
        """Return the budget in bytes; 0 where it cannot be read."""
        return parse_size(self.bytes)

    def select_dropped(self, records: Sequence[Record], protected: Container[int]) -> list[int]:
        """Return the steps to let go so that the rest fits, oldest first; what is protected stays, fit or not."""
        limit, total = self.limit, sum(record.num_bytes for record in records)
        dropped = []
        for record in sorted(records, key=lambda record: record.step):
            if total > limit and record.step not in protected:
                dropped.append(record.step)
                total -= record.num_bytes
        return dropped


@dataclass(frozen=True, kw_only=True)
class ExternalRetention:
    """Keep what a function of your own says.

    It is asked after every save, in the process that trains, as

        target(records: Sequence[Record], **options) -> Iterable[int] | Mapping[int, str]

    It returns the steps to keep, or a reason for each. Where it raises, every checkpoint stays, and that is told once.
    Verbs such as `ls` and `prune` do not run it: for them it keeps every checkpoint.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`.
        options: what it is called with by name.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    # Whether `select` asks the function. The option itself runs no code; the Checkpointer asks (user_rules.py).
    is_asked: ClassVar[bool] = False

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return every step: what the function would say is not known here."""
        return {record.step: f"{self.target} is asked in training alone" for record in records}

    def max_kept(self, steps: int) -> int | None:
        """Return None: nobody knows."""
        return None


RetentionRule = (
    KeepLast | KeepBest | KeepEveryK | KeepSpaced | KeepInTime | KeepPinned | KeepAll | DiskBudget | ExternalRetention
)


def select_survivors(rules: Mapping[str, RetentionRule], records: Sequence[Record], score: Score) -> dict[int, str]:
    """Return the steps that stay, each with every reason why, joined.

    A marked checkpoint is nothing to resume from: the newest of them stays to be looked at, the others go.
    """
    law = _apply_law(records, score)
    reasons: dict[int, list[str]] = {step: [why] for step, why in law.items()}
    good = [record for record in records if not record.mark]
    for rule in rules.values():
        if not isinstance(rule, DiskBudget):
            for step, why in rule.select(good).items():
                reasons.setdefault(step, []).append(why)
    # A budget drops from what the rules keep: where one of them was not asked, nobody knows what that is.
    is_known = not any(isinstance(rule, ExternalRetention) and not rule.is_asked for rule in rules.values())
    # Budgets come last, for each drops from what is left; two of them make the tighter one.
    for rule in rules.values():
        if isinstance(rule, DiskBudget) and is_known:
            for step in rule.select_dropped([record for record in records if record.step in reasons], protected=law):
                del reasons[step]
    return {step: ", ".join(whys) for step, whys in sorted(reasons.items())}


def max_kept(rules: Mapping[str, RetentionRule], steps: int) -> int | None:
    """Return how many checkpoints stay at most in a run of so many steps; None where there is no limit."""
    total = 0
    for rule in rules.values():
        if isinstance(rule, DiskBudget):
            continue
        most = rule.max_kept(steps)
        if most is None:
            return None
        total += most
    # The newest and the best stay whatever the rules say.
    return max(total, 2)


def _apply_law(records: Sequence[Record], score: Score) -> dict[int, str]:
    """Return the steps that no rule can drop, each with the reason; the last of several reasons is the one told."""
    kept = {record.step: "pinned" for record in records if record.pinned}
    if marked := [record.step for record in records if record.mark]:
        kept[max(marked)] = "the last that an error left"
    good = [record for record in records if not record.mark]
    if best := find_best(good, score):
        kept[best.step] = "best"
    if good:
        kept[max(record.step for record in good)] = "newest"
    return kept


def _first_of_each(records: Sequence[Record], window: Callable[[Record], int]) -> list[int]:
    """Return the first step in each window that has one, oldest window first."""
    first: dict[int, int] = {}
    for record in sorted(records, key=lambda record: record.step):
        first.setdefault(window(record), record.step)
    return [first[key] for key in sorted(first)]
