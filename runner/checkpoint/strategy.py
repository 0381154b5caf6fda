"""WHEN to save: pure rules over what is true now and what is on disk. Each gives a reason a person can read, or none.

Rules hold no state, so nothing about the strategy needs saving: after a restart they see the same records.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from runner.checkpoint.record import Mode, Record, Score, find_best
from runner.values import StepInfo

Count = Annotated[int, Ge(1)]
Duration = Annotated[float, Gt(0.0)]
RECENT = 5  # saves whose median cost is what a save costs
UNKNOWN_SECONDS = 1.0  # what a save is taken to cost while none has succeeded


@dataclass(frozen=True)
class Failures:
    """How often this run was interrupted without notice (killed, crashed), and in how many seconds of work."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class History:
    """What the rules look back on: the checkpoints on disk, and when a save was last begun, successful or not.

    Records come oldest first: rules are asked after every step, and look from the end, however many there are.
    """

    records: Sequence[Record] = ()
    tried_step: int = 0
    seconds_since: float = 0.0  # since that save, or since this process began; a clock that cannot be set
    failures: Failures = Failures()

    @property
    def last_step(self) -> int:
        """The step of the newest save, durable or not: a failed one is tried again when it is next due."""
        newest = next((record.step for record in reversed(self.records) if not record.mark), 0)
        return max(self.tried_step, newest)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Every so many steps: at each multiple, or as soon after it as the disk allows."""

    kind: Literal["steps"] = "steps"
    steps: Count

    def reason(self, moment: StepInfo, history: History) -> str | None:
        due = moment.step // self.steps > history.last_step // self.steps
        return f"every {self.steps} steps" if due else None


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Every so many seconds of training, counted from the last save, or from the start of the process."""

    kind: Literal["seconds"] = "seconds"
    seconds: Duration

    def reason(self, moment: StepInfo, history: History) -> str | None:
        return f"every {self.seconds:g} s" if history.seconds_since >= self.seconds else None


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """Every so many passes over the training data; a part of one is allowed."""

    kind: Literal["epochs"] = "epochs"
    epochs: Annotated[float, Gt(0.0)] = 1.0

    def reason(self, moment: StepInfo, history: History) -> str | None:
        steps = self.epochs * moment.epoch_steps
        due = math.floor(moment.step / steps) > math.floor(history.last_step / steps)
        return f"every {self.epochs:g} epochs" if due else None


@dataclass(frozen=True, kw_only=True)
class First:
    """As soon as one step is done: a disk that cannot be written shows in the first minute, not in the first hour."""

    kind: Literal["first"] = "first"

    def reason(self, moment: StepInfo, history: History) -> str | None:
        return None if history.last_step else "first step"


@dataclass(frozen=True, kw_only=True)
class Best:
    """When a metric measured at this step beats every checkpoint on disk. What is not finite never ranks."""

    kind: Literal["best"] = "best"
    metric: str = "eval/loss"
    mode: Mode = "min"
    min_improvement: Annotated[float, Ge(0.0)] = 0.0

    def reason(self, moment: StepInfo, history: History) -> str | None:
        score = Score(self.metric, self.mode)
        value = score.of(moment.metrics)
        if value is None:
            return None
        best = find_best(history.records, score)
        if best is None:
            return f"first {self.metric}: {moment.metrics[self.metric]:.4g}"
        previous = score.of(best.metrics)
        assert previous is not None
        if value >= previous - self.min_improvement:
            return None
        return f"best {self.metric}: {best.metrics[self.metric]:.4g} → {moment.metrics[self.metric]:.4g}"


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """As often as costs least: √(2 × cost of a save × mean time between failures), both as measured in this run.

    Young (1974), Daly (2006). Saving never takes more than `max_overhead` of the time, and never comes faster than a
    save takes. `mtbf_seconds` is what to expect of the machine before this run has a history: it counts as one failure.
    """

    kind: Literal["adaptive"] = "adaptive"
    mtbf_seconds: Duration = 10800.0
    max_overhead: Annotated[float, Interval(gt=0.0, le=1.0)] = 0.02

    def reason(self, moment: StepInfo, history: History) -> str | None:
        if not history.last_step:
            return "adaptive: the first save, to learn what one costs"
        seconds, why = self.interval(history)
        return f"adaptive: every {seconds:.3g} s ({why})" if history.seconds_since >= seconds else None

    def interval(self, history: History) -> tuple[float, str]:
        """Seconds between saves, and where the number comes from."""
        recent = list(islice((record for record in reversed(history.records) if record.write_seconds), RECENT))
        cost = statistics.median([record.stall_seconds for record in recent] or [UNKNOWN_SECONDS])
        takes = statistics.median([record.write_seconds for record in recent] or [UNKNOWN_SECONDS])
        mtbf = (self.mtbf_seconds + history.failures.seconds) / (1 + history.failures.count)
        young = math.sqrt(2 * cost * mtbf)
        if young >= max(cost / self.max_overhead, takes):
            return young, f"√(2 × {cost:.3g} s a save × {mtbf:.0f} s between failures)"
        if cost / self.max_overhead >= takes:
            return cost / self.max_overhead, f"at most {self.max_overhead:.1%} of the time for saves of {cost:.3g} s"
        return takes, "as long as a save takes"


@dataclass(frozen=True, kw_only=True)
class Unstable:
    """More often while the training loss is unsteady, less while it is calm.

    Unsteady is the standard deviation of the last `window` logged losses against `spread`: twice as unsteady, twice as
    often, between `min_steps` and `max_steps`; a loss that is not finite counts as very unsteady.
    """

    kind: Literal["unstable"] = "unstable"
    steps: Count = 1000
    min_steps: Count = 100
    max_steps: Count = 5000
    spread: Annotated[float, Gt(0.0)] = 0.1
    window: Annotated[int, Ge(2)] = 10

    def __post_init__(self) -> None:
        if not self.min_steps <= self.steps <= self.max_steps:
            raise ValueError(
                f"steps={self.steps} must lie between min_steps={self.min_steps} and max_steps={self.max_steps}"
            )

    def reason(self, moment: StepInfo, history: History) -> str | None:
        steps, why = self.interval(moment.losses)
        return f"unstable: every {steps} steps ({why})" if moment.step - history.last_step >= steps else None

    def interval(self, losses: Sequence[float]) -> tuple[int, str]:
        """Steps between saves, and why so many."""
        if len(losses) < self.window:
            return self.steps, "too few losses to tell"
        recent = list(losses)[-self.window :]
        if not all(map(math.isfinite, recent)):
            return self.min_steps, "the loss is not finite"
        measured = statistics.pstdev(recent)
        wanted = self.steps * self.spread / measured if measured else math.inf
        return round(min(max(wanted, self.min_steps), self.max_steps)), f"the loss varies by {measured:.2g}"


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """Whenever the last save is durable and `min_seconds` have passed. For machines that vanish without notice."""

    kind: Literal["continuous"] = "continuous"
    min_seconds: Annotated[float, Ge(0.0)] = 1.0

    def reason(self, moment: StepInfo, history: History) -> str | None:
        waited = history.seconds_since >= self.min_seconds or not history.tried_step
        return "continuous" if waited and moment.step > history.last_step else None


@dataclass(frozen=True, kw_only=True)
class OnError:
    """When a step or an evaluation raises: what was there is left, marked, for people to look at.

    A run never resumes from it unasked; `step=N` asks.
    """

    kind: Literal["on_error"] = "on_error"

    def reason(self, moment: StepInfo, history: History) -> str | None:
        return None  # asked for by the loop, where the exception is


SaveRule = Steps | Seconds | Epochs | First | Best | Adaptive | Unstable | Continuous | OnError


def find_save_reason(rules: Mapping[str, SaveRule], moment: StepInfo, history: History) -> str | None:
    """Every reason to save now, joined; None where no rule asks for it."""
    reasons = [reason for rule in rules.values() if (reason := rule.reason(moment, history))]
    return "; ".join(reasons) or None
