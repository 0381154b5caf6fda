"""Train: the order of things, in code and not in callbacks, because exact resume depends on it.

    batch = next(data)  →  state, metrics = train_step(state, batch)  →  log if due  →  evaluate if due
    →  save if due  →  stop if asked, or where a metric gets no better

Saving comes after the update and before the next `next(data)`: so the data position that is saved is the first batch
the state has not seen. A step's lines are in the logs before its checkpoint is on disk: so a restored step is never
missing from them. An evaluation that a stop cuts short is owed: its step is saved, and whoever goes on from there
evaluates first. Nothing leaves the device but where a value is due, and then when it is there: see `PendingSteps`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from runner import hosts
from runner.errors import DivergedError, LostProcessError, LostRunError
from runner.log.sinks import LogDigest, MetricWriter
from runner.preempt.stop import Stopped
from runner.profiling.step_profiler import NoProfiler
from runner.train.early_stopper import EndRule, NoEarlyEnd
from runner.train.speed import SpeedMeter
from runner.train.starvation import StarvationMonitor
from runner.types import Batch, CheckpointItems, JsonObject, Metrics, State
from runner.values import MetricValues, Speed, StepInfo

if TYPE_CHECKING:
    import jax

# So many logged losses are remembered, for rules that look at them.
NUM_REMEMBERED_LOSSES = 64
# One step is computed, one waits behind it; more would only delay a stop.
MAX_PENDING_STEPS = 2
# Where one of these leaves the finite numbers, the update of that step is poisoned; so with any that is called
# `…_loss`, as a program of the user's own may have several of.
WATCHED_METRICS = ("loss", "grad_norm")


class BatchStream(Protocol):
    """Endless batches that know their position. Waiting for one raises Stopped where a stop is asked for."""

    def __next__(self) -> Batch: ...

    def state(self) -> JsonObject:
        """Return the position of the next batch, as plain JSON values."""


class Saver(Protocol):
    """Decides when to save, and saves."""

    @property
    def newest(self) -> int | None:
        """Return the step of the newest durable checkpoint."""

    @property
    def trouble(self) -> str | None:
        """Return why the newest save did not become durable; None where it did."""

    @property
    def copied_at(self) -> float | None:
        """Return when the state of the newest save was copied, by `time.perf_counter`; None where that is not known."""

    def holds(self, step: int) -> bool:
        """Return whether a step is saved; wait for a save that is under way."""

    def due(self, info: StepInfo) -> str | None:
        """Return why to save now, or None."""

    def save(self, reason: str, info: StepInfo, items: CheckpointItems, log: LogDigest | None = None) -> None:
        """Save a state, here or in the background, with what the log is up to this step."""

    def rescue(self, error: Exception, info: StepInfo, items: Callable[[], CheckpointItems]) -> None:
        """Save what there is after an error, where a rule asks for it."""


class StopRequest(Protocol):
    """Why to stop, or None; and a request to save and go on, given once."""

    reason: str | None

    def agree_to_stop(self) -> str | None:
        """Return why to stop at this boundary, as all processes of the run agree; None where to go on."""

    def pop_save_request(self) -> str | None:
        """Return why to save and go on, once; None where nobody asked."""


class ProgressLog(Protocol):
    """Counts seconds by bucket, and remembers how far training is and what it measured."""

    def time_in(self, bucket: str) -> AbstractContextManager[None]:
        """Count the time of a block towards a bucket."""

    def move_to(self, bucket: str, seconds: float) -> None:
        """Count seconds of what is counted now towards another bucket."""

    def beat(self, step: int) -> None:
        """Note that so many steps are complete."""

    def note(self, step: int, measured: Mapping[str, float], durable_step: int | None) -> None:
        """Remember how far training is and what it measured."""


class Deadline(Protocol):
    """Knows whether there is time for one more save."""

    def raise_if_hopeless(self) -> None:
        """Raise Stopped where a save that begins now would surely be cut off."""


class ProgressDisplay(Protocol):
    """Shows a person how far training is."""

    def say(self, line: str) -> None:
        """Show a line, and keep it in run.log."""

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None, speed: Speed) -> None:
        """Show the metrics of a step that was logged, and how fast the steps before it went."""


class Profiler(Protocol):
    """Traces some steps. Both are called at every step with what waits for those that were dispatched."""

    def before_step(self, step: int, drain: Callable[[], None]) -> None:
        """Begin a trace where this step is to be its first."""

    def after_step(self, step: int, drain: Callable[[], None]) -> None:
        """End the trace where this step was its last."""


@dataclass(frozen=True)
class Cadence:
    """How long to train and how often to look, in steps.

    Attributes:
        steps: train so many updates in all.
        log_steps: log every so many.
        eval_steps: for each evaluation, after how many it is due.
        epoch_steps: so many are one pass over the training data.
        save_last: whether the last state is saved when training ends or is stopped.
    """

    steps: int
    log_steps: int
    eval_steps: frozenset[int]
    epoch_steps: float = math.inf
    save_last: bool = True

    def logs(self, step: int) -> bool:
        """Return whether the metrics of a step are logged."""
        return step % self.log_steps == 0 or step == self.steps

    def evaluates(self, step: int) -> bool:
        """Return whether there is something to evaluate after a step."""
        return step == self.steps or any(step % every == 0 for every in self.eval_steps)


@dataclass(frozen=True)
class CompiledStep:
    """The compiled train step, and its learning rate, which lies on the device once for all steps."""

    program: Callable[[State, Batch, jax.Array], tuple[State, Metrics]]
    lr: jax.Array


@dataclass(frozen=True)
class Evaluating:
    """`evaluate(state, step)`: the metrics of every evaluation that is due, by split; raises Stopped if asked to.

    `is_finite(state)`: whether the parameters are. `evaluate_rest(state, step)`: what `evaluate` leaves out at a step
    that is not the last, for training may end there all the same.
    """

    evaluate: Callable[[State, int], Mapping[str, MetricValues]]
    is_finite: Callable[[State], bool]
    evaluate_rest: Callable[[State, int], Mapping[str, MetricValues]] = lambda state, step: {}


@dataclass(frozen=True)
class Saving:
    """The saver, and `items(progress, data_position)`: what a checkpoint holds."""

    saver: Saver
    items: Callable[[Progress, JsonObject], CheckpointItems]


@dataclass(frozen=True)
class Outputs:
    """Where a step is told: the metrics, what it took (`timing`, one record a line), and to a person."""

    metrics: MetricWriter
    timing: Callable[[JsonObject], None]
    display: ProgressDisplay


@dataclass(frozen=True)
class LoopParts:
    """The live objects of one run."""

    cadence: Cadence
    step: CompiledStep
    data: BatchStream
    starvation: StarvationMonitor
    evaluating: Evaluating
    saving: Saving
    outputs: Outputs
    log: ProgressLog
    deadline: Deadline
    meter: SpeedMeter
    profiler: Profiler = field(default_factory=NoProfiler)
    end_rule: EndRule = field(default_factory=NoEarlyEnd)


@dataclass(frozen=True)
class Progress:
    """Where training is.

    Attributes:
        state: that of `step` completed updates.
        owes: whether the evaluation at that step is still owed.
        base: the digest of what does not train, in a place of its own; "" where all of it trains.
    """

    state: State
    step: int
    owes: bool = False
    base: str = ""


def train(parts: LoopParts, start: Progress, stop: StopRequest) -> Progress:
    """Train to the last step, to where a metric gets no better, or until asked to stop; save the last state.

    Raises:
        DivergedError: the loss or the gradient of a step is not finite, or the parameters are not at a step that is
            saved: such a state is never saved as one to resume from.
        Stopped: there is no time left to save.
    """
    cadence, log, saver = parts.cadence, parts.log, parts.saving.saver
    pending = PendingSteps(parts, start.step)
    state, step, owes = start.state, start.step, start.owes
    evaluated = StepInfo(step)  # the newest step that was evaluated, with what was measured
    try:
        with suppress(Stopped):
            # The processes of a run stop, and save, at the same step: each of them asks what all have agreed on.
            while stop.agree_to_stop() is None and (owes or (step < cadence.steps and not parts.end_rule.reason)):
                # An evaluation that a stop cut short before this process began comes before the next batch.
                late = owes
                if not owes:
                    parts.profiler.before_step(step + 1, pending.drain)
                    began = time.perf_counter()
                    with log.time_in("data"):
                        batch = next(parts.data)
                    ready = time.perf_counter()
                    parts.starvation.count_batch(began, ready, device_is_idle=pending.are_complete())
                    pending.note_beginning(step + 1, ready)
                    state, metrics = parts.step.program(state, batch, parts.step.lr)
                    step += 1
                    pending.add(step, metrics)
                    parts.profiler.after_step(step, pending.drain)
                    owes = cadence.evaluates(step)
                measured: dict[str, float] = {}
                if owes:
                    # The lines of a step come in order: its training metrics before its evaluation.
                    pending.drain()
                    with parts.meter.pause():
                        measured = _evaluate(parts, state, step)
                    evaluated, owes = StepInfo(step, measured), False
                info = StepInfo(step, measured, cadence.epoch_steps, pending.losses)
                reason = _due(parts, info) or stop.pop_save_request() or ("evaluated after a stop" if late else None)
                reason = hosts.agree("save", reason)
                if reason:
                    pending.drain()
                    with parts.meter.pause():
                        _save(parts, pending, Progress(state, step), info, reason)
                    pending.follow_save()
        pending.drain()
        log.note(step, {}, saver.newest)
        with log.time_in("save"):
            # `holds` may wait for a save that is under way.
            saved = hosts.agree("saved", step == start.step or not cadence.save_last or saver.holds(step))
        if not saved:
            parts.deadline.raise_if_hopeless()
            # Where the save after the last evaluation failed, this one must still be able to be the best.
            info = evaluated if evaluated.step == step else StepInfo(step)
            why = ("" if owes else parts.end_rule.reason) or stop.reason or "end of training"
            _save(parts, pending, Progress(state, step, owes), info, why)
    except (Stopped, LostRunError, LostProcessError):
        raise
    except Exception as error:
        # Where a rule asks for it, what there is is saved to be looked at; the error goes on its way all the same.
        log.note(step, {}, saver.newest)
        saver.rescue(error, StepInfo(step), lambda: parts.saving.items(Progress(state, step), parts.data.state()))
        raise
    return Progress(state, step, owes)


class PendingSteps:
    """Steps that were dispatched and are not yet known to be complete: a few, so that the device never waits for us.

    A step is logged when it is complete. By then its metrics are there, and reading them keeps nobody waiting.
    """

    def __init__(self, parts: LoopParts, step: int):
        self._parts, self._complete = parts, step
        self.losses: deque[float] = deque(maxlen=NUM_REMEMBERED_LOSSES)
        self._pending: deque[tuple[int, Metrics]] = deque()
        # Complete since a step was last found to be finite.
        self._unread: list[tuple[int, Metrics]] = []
        self._last_metric: jax.Array | None = None
        # The first step after a save, and when it could have begun.
        self._follows_save, self._first_after_save = False, (-1, 0.0)

    def follow_save(self) -> None:
        """Note that the next step is given the arrays that were just saved."""
        self._follows_save = True

    def note_beginning(self, step: int, ready: float) -> None:
        """Note when a step could begin, by `time.perf_counter`."""
        if self._follows_save:
            self._follows_save, self._first_after_save = False, (step, ready)

    def add(self, step: int, metrics: Metrics) -> None:
        """Remember a dispatched step; wait for an old one where too many are under way."""
        self._pending.append((step, metrics))
        self._last_metric = next(iter(metrics.values()))
        while len(self._pending) > MAX_PENDING_STEPS:
            self._complete_one()

    def are_complete(self) -> bool:
        """Return whether the step that was dispatched last is complete: then the device has nothing to do."""
        return self._last_metric is None or self._last_metric.is_ready()  # type: ignore[attr-defined]

    def drain(self) -> None:
        """Wait for every step, and log what is due: before anything that must come after these lines."""
        while self._pending:
            self._complete_one()

    def check_finite(self) -> None:
        """Raise DivergedError, naming the first step that was not finite, where a complete one is not."""
        # Each of them and not the last alone: an update that a program or an optimizer leaves out for its NaN shows at
        # that step only, and when steps are looked at depends on when a run is saved.
        for step, metrics in self._unread:
            if bad := _first_not_finite(metrics):
                raise self.diverged(step, "{} is {}".format(*bad))
        self._unread = []

    def diverged(self, step: int, what: str) -> DivergedError:
        """Return the error that says which step was not finite, and how to find its batch."""
        newest = self._pending[-1][0] if self._pending else self._complete
        return DivergedError(f"step {step}: {what}", step, newest - step, self._parts.data.state())

    def _complete_one(self) -> None:
        step, metrics = self._pending.popleft()
        # One program computes all of them: where one is there, the step is complete.
        next(iter(metrics.values())).block_until_ready()
        self._complete = step
        if step == self._first_after_save[0]:
            self._count_copy(self._first_after_save[1])
        log, outputs, newest = self._parts.log, self._parts.outputs, self._parts.saving.saver.newest
        log.beat(step)
        self._unread.append((step, _select_watched(metrics)))
        if not self._parts.cadence.logs(step):
            return
        self.check_finite()
        values = {name: float(value) for name, value in metrics.items()}
        if not self.losses and values.get("grad_norm") == 0.0:
            outputs.display.say(
                f"warning: the gradient is 0 at step {step}: the loss does not depend on the parameters there, so "
                "nothing is learnt (a stop_gradient, an argmax, labels that are all left out?)"
            )
        if "loss" in values:
            self.losses.append(values["loss"])
        outputs.metrics.log(step, "train", values)
        took, speed = self._parts.meter.measure(step)
        outputs.display.tick(step, values, newest, speed)
        log.note(step, {}, newest)
        outputs.timing({"step": step, "event": "train", **took})

    def _count_copy(self, ready: float) -> None:
        """Count towards saving what a step, now complete, waited for the copy of the arrays that it was given."""
        copied_at = self._parts.saving.saver.copied_at
        if copied_at is not None and copied_at > ready:
            self._parts.log.move_to("save", copied_at - ready)
            self._parts.meter.leave_out(copied_at - ready)


def _select_watched(metrics: Metrics) -> Metrics:
    """Return the metrics whose values must be finite, the loss first."""
    own = [name for name in metrics if name.endswith("_loss")]
    return {name: metrics[name] for name in (*WATCHED_METRICS, *own) if name in metrics}


def _first_not_finite(metrics: Metrics) -> tuple[str, float] | None:
    """Return the first of the watched metrics that is not finite, and its value."""
    values = ((name, float(value)) for name, value in metrics.items())
    return next(((name, value) for name, value in values if not math.isfinite(value)), None)


def _due(parts: LoopParts, info: StepInfo) -> str | None:
    """Return why to save now, or None. After an evaluation this may wait for the save that is under way."""
    with parts.log.time_in("save") if info.metrics else nullcontext():
        return parts.saving.saver.due(info)


def _save(parts: LoopParts, pending: PendingSteps, at: Progress, info: StepInfo, reason: str) -> None:
    """Save a state that is finite, unless the log does not hold its lines yet."""
    pending.check_finite()
    with parts.log.time_in("save"):
        if not parts.evaluating.is_finite(at.state):
            raise pending.diverged(at.step, "the parameters are not finite")
        # A restored step is never missing from the log: where the disk has no room for its lines, it is not saved.
        metrics = parts.outputs.metrics
        if not hosts.agree("log is whole", metrics.flush()):
            return
        parts.saving.saver.save(reason, info, parts.saving.items(at, parts.data.state()), metrics.digest())


def _evaluate(parts: LoopParts, state: State, step: int) -> dict[str, float]:
    """Do all that is due at this step, then log it: where it is cut short, none of it is in the log."""
    start = time.perf_counter()
    with parts.log.time_in("eval"):
        found = dict(parts.evaluating.evaluate(state, step))
        parts.end_rule.observe(name_numbers(found), step)
        if parts.end_rule.reason and step < parts.cadence.steps:
            # This turned out to be the last step, so what is evaluated at the end is due as well.
            found |= parts.evaluating.evaluate_rest(state, step)
    for split, values in found.items():
        parts.outputs.metrics.log(step, split, values)
    measured = name_numbers(found)
    parts.log.note(step, measured, parts.saving.saver.newest)
    parts.outputs.timing({"step": step, "event": "eval", "seconds": round(time.perf_counter() - start, 6)})
    return measured


def name_numbers(found: Mapping[str, MetricValues]) -> dict[str, float]:
    """Return what was measured under names such as `eval/loss`, without the names of files."""
    return {
        f"{split}/{name}": value
        for split, values in found.items()
        for name, value in values.items()
        if isinstance(value, float)
    }
