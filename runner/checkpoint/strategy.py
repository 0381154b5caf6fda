"""WHEN to save: pure rules over what is true now and what is on disk. Each returns a reason for people, or None.

Rules hold no state, so nothing about the strategy needs to be saved: after a restart they see the same records.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from runner.checkpoint.record import Mode, Record, Score, find_best
from runner.values import StepInfo

Count = Annotated[int, Ge(1)]
Duration = Annotated[float, Gt(0.0)]

RECENT_SAVES = 5  # the median cost of so many is what a save costs
UNKNOWN_SAVE_SECONDS = 1.0  # what a save is taken to cost while none has succeeded


@dataclass(frozen=True)
class Failures:
    """Count how often a run was interrupted without notice (killed, crashed), in how many seconds of work."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class History:
    """Hold what the rules look back on: the checkpoints on disk, and when a save was last begun.

    Attributes:
        records: the checkpoints on disk, oldest first.
        tried_step: the step of the last save that this process began, successful or not; 0 before the first.
        seconds_since: seconds since that save, or since this process began, by a clock that nobody can set.
        failures: what is known of interruptions.
    """

    records: Sequence[Record] = ()
    tried_step: int = 0
    seconds_since: float = 0.0
    failures: Failures = Failures()

    @property
    def last_step(self) -> int:
        """Return the step of the newest save, durable or not: a failed one is tried again when it is next due."""
        # From the end: rules are asked after every step, and a run may have thousands of checkpoints.
        newest = next((record.step for record in reversed(self.records) if not record.mark), 0)
        return max(self.tried_step, newest)


@dataclass(frozen=True, kw_only=True)
class EverySteps:
    """Save every so many steps: at each multiple, or as soon after it as the disk allows.

    Attributes:
        steps: how many.
    """

    kind: Literal["steps"] = "steps"
    steps: Count

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        # A multiple counts as crossed, not as hit: while one save is being written, the step of the next may go by.
        due = info.step // self.steps > history.last_step // self.steps
        return f"every {self.steps} steps" if due else None


@dataclass(frozen=True, kw_only=True)
class EverySeconds:
    """Save every so many seconds of training, counted from the last save or from the start of the process.

    Attributes:
        seconds: how many.
    """

    kind: Literal["seconds"] = "seconds"
    seconds: Duration

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        return f"every {self.seconds:g} s" if history.seconds_since >= self.seconds else None


@dataclass(frozen=True, kw_only=True)
class EveryEpochs:
    """Save every so many passes over the training data; a part of one is allowed.

    Attributes:
        epochs: how many.
    """

    kind: Literal["epochs"] = "epochs"
    epochs: Annotated[float, Gt(0.0)] = 1.0

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        steps = self.epochs * info.epoch_steps
        due = math.floor(info.step / steps) > math.floor(history.last_step / steps)
        return f"every {self.epochs:g} epochs" if due else None


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """Save after the first step: a disk that cannot be written shows in the first minute, not in the first hour."""

    kind: Literal["first"] = "first"

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        return None if history.last_step else "first step"


@dataclass(frozen=True, kw_only=True)
class NewBest:
    """Save when a metric measured at this step beats every checkpoint on disk; what is not finite never ranks.

    Attributes:
        metric: what is compared, as `eval/loss`.
        mode: whether the least (`min`) or the most (`max`) is best.
        min_improvement: it must be better by more than this.
    """

    kind: Literal["best"] = "best"
    metric: str = "eval/loss"
    mode: Mode = "min"
    min_improvement: Annotated[float, Ge(0.0)] = 0.0

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        score = Score(self.metric, self.mode)
        value = score.of(info.metrics)
        if value is None:
            return None
        best = find_best(history.records, score)
        if best is None:
            return f"first {self.metric}: {info.metrics[self.metric]:.4g}"
        # Compared as ranks, where less is better, whatever the mode; told as the numbers that were measured.
        previous = score.of(best.metrics)
        assert previous is not None
        if value >= previous - self.min_improvement:
            return None
        return f"best {self.metric}: {best.metrics[self.metric]:.4g} → {info.metrics[self.metric]:.4g}"


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Save as often as costs least: every √(2 × cost of a save × mean time between failures), as measured in this run.

    The interval of Young (1974), in the form of Daly (2006). It is never shorter than a save takes.

    Attributes:
        mtbf_seconds: mean time between failures to expect of the machine before this run has a history: it counts as
            one failure.
        max_overhead: saving never takes more than this share of the time.
    """

    kind: Literal["adaptive"] = "adaptive"
    mtbf_seconds: Duration = 10800.0
    max_overhead: Annotated[float, Interval(gt=0.0, le=1.0)] = 0.02

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        if not history.last_step:
            return "adaptive: the first save, to learn what one costs"
        seconds, why = self.interval(history)
        return f"adaptive: every {seconds:.3g} s ({why})" if history.seconds_since >= seconds else None

    def interval(self, history: History) -> tuple[float, str]:
        """Return the seconds between saves, and where the number comes from."""
        # From the newest back, and no further than needed: this runs after every step. A record without a cost says
        # nothing.
        costed = (record for record in reversed(history.records) if _is_cost(record))
        recent = list(islice(costed, RECENT_SAVES))
        # What training waits for (the stall) is what a save costs; while one is being written, none can begin.
        cost = statistics.median([record.stall_seconds for record in recent] or [UNKNOWN_SAVE_SECONDS])
        takes = statistics.median([record.write_seconds for record in recent] or [UNKNOWN_SAVE_SECONDS])
        # What is known of the past comes from a file: a clock that was set back made it less than nothing.
        worked = history.failures.seconds if math.isfinite(history.failures.seconds) else 0.0
        mtbf = (self.mtbf_seconds + max(worked, 0.0)) / (1 + history.failures.count)
        young = math.sqrt(2 * cost * mtbf)
        if young >= max(cost / self.max_overhead, takes):
            return young, f"√(2 × {cost:.3g} s a save × {mtbf:.0f} s between failures)"
        if cost / self.max_overhead >= takes:
            return cost / self.max_overhead, f"at most {self.max_overhead:.1%} of the time for saves of {cost:.3g} s"
        return takes, "as long as a save takes"


def _is_cost(record: Record) -> bool:
    """Tell whether a record says what it cost: lengths of time, and more than none for writing."""
    return 0.0 < record.write_seconds < math.inf and 0.0 <= record.stall_seconds < math.inf


@dataclass(frozen=True, kw_only=True)
class Unstable:
    """Save more often while the training loss is unsteady, and less often while it is calm.

    Unsteady is the standard deviation of the last `window` logged losses against `spread`: twice as unsteady, twice as
    often, between `min_steps` and `max_steps`; a loss that is not finite counts as very unsteady.

    Attributes:
        steps: so many between saves where the deviation is `spread`, or not known yet.
        min_steps: never fewer.
        max_steps: never more.
        spread: the deviation that is usual.
        window: so many logged losses are looked at.
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

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        steps, why = self.interval(info.losses)
        return f"unstable: every {steps} steps ({why})" if info.step - history.last_step >= steps else None

    def interval(self, losses: Sequence[float]) -> tuple[int, str]:
        """Return the steps between saves, and why so many."""
        if len(losses) < self.window:
            return self.steps, "too few losses to tell"
        recent = list(losses)[-self.window :]
        # The deviation of such losses would be NaN, which compares as neither more nor less.
        if not all(map(math.isfinite, recent)):
            return self.min_steps, "the loss is not finite"
        measured = statistics.pstdev(recent)
        wanted = self.steps * self.spread / measured if measured else math.inf
        return round(min(max(wanted, self.min_steps), self.max_steps)), f"the loss varies by {measured:.2g}"


@dataclass(frozen=True, kw_only=True)
class Continuous:
    """Save again as soon as the last save is durable, for machines that vanish without notice.

    Attributes:
        min_seconds: but leave at least so many between saves.
    """

    kind: Literal["continuous"] = "continuous"
    min_seconds: Annotated[float, Ge(0.0)] = 1.0

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        # A process that has saved nothing yet does not wait.
        waited = history.seconds_since >= self.min_seconds or not history.tried_step
        return "continuous" if waited and info.step > history.last_step else None


@dataclass(frozen=True, kw_only=True)
class OnError:
    """Save, marked, what there is when a step or an evaluation raises, for people to look at.

    A run never resumes from it unasked; `step=N` asks.
    """

    kind: Literal["on_error"] = "on_error"

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return None: the loop asks for this save, where the exception is."""
        return None


@dataclass(frozen=True, kw_only=True)
class ExternalSave:
    """Save when a function of your own says so.

    It is asked after every step, in the process that trains, as

        target(info: StepInfo, history: History, **options) -> str | bool | None

    A reason, or true, saves; nothing, or false, does not. Where it raises, it saves nothing, and that is told once.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`.
        options: what it is called with by name.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return None: the option runs no code; the Checkpointer asks in its place (user_rules.py)."""
        return None


SaveRule = (
    EverySteps
    | EverySeconds
    | EveryEpochs
    | FirstStep
    | NewBest
    | Adaptive
    | Unstable
    | Continuous
    | OnError
    | ExternalSave
)


def find_save_reason(rules: Mapping[str, SaveRule], info: StepInfo, history: History) -> str | None:
    """Return every reason to save now, joined by semicolons; None where no rule asks for it."""
    reasons = [reason for rule in rules.values() if (reason := rule.reason(info, history))]
    return "; ".join(reasons) or None
