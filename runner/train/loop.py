"""The order of things in training. It is code and not callbacks, because exact resume depends on it:

    batch = next(data)  →  state, metrics = train_step(state, batch)  →  log if due  →  evaluate if due
    →  save if due  →  stop if asked

Saving comes after the update and before the next `next(data)`: so the position of the data that is saved is the first
batch the state has not seen. A step's lines are in the logs before its checkpoint is on disk: so a restored step is
never missing from them. An evaluation that a stop cuts short is owed: its step is saved, and whoever goes on from there
evaluates first. Nothing leaves the device but where a value is due, and then when it is there: see `Flight`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from runner.errors import DivergedError
from runner.log import MetricsFile
from runner.preempt.stop import Stopped
from runner.values import StepInfo

State = dict[str, Any]
LOSSES = 64  # so many logged losses are remembered, for rules that look at them
STEPS_IN_FLIGHT = 2  # one is computed, one waits behind it; more would only delay a stop


class Data(Protocol):
    """Endless batches that know their position. Waiting for one raises Stopped where a stop is asked for."""

    def __next__(self) -> Mapping[str, Any]: ...
    def state(self) -> dict[str, Any]: ...


class Saver(Protocol):
    """Decides when to save, and saves."""

    @property
    def newest(self) -> int | None: ...
    def holds(self, step: int) -> bool: ...
    def due(self, moment: StepInfo) -> str | None: ...
    def save(self, reason: str, moment: StepInfo, items: Mapping[str, Any]) -> None: ...
    def rescue(self, error: Exception, moment: StepInfo, items: Callable[[], Mapping[str, Any]]) -> None: ...


class Flag(Protocol):
    """A request to stop, or None; and one to save and go on, given once."""

    notice: str | None

    def take_wish(self) -> str | None: ...


class Ledger(Protocol):
    """Counts seconds, and remembers how far training is and what it measured."""

    def time_in(self, bucket: str) -> AbstractContextManager[None]: ...
    def beat(self, step: int) -> None: ...
    def note(self, step: int, measured: Mapping[str, float], durable_step: int | None) -> None: ...


class Time(Protocol):
    """Knows how long there is."""

    def check(self) -> None: ...


class Progress(Protocol):
    """Shows how far training is."""

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None: ...


@dataclass(frozen=True)
class Cadence:
    """How long to train and how often to look, in steps."""

    steps: int
    log_steps: int
    eval_steps: frozenset[int]  # one for each evaluation

    def evaluates(self, step: int) -> bool:
        """Whether there is something to evaluate after a step."""
        return step == self.steps or any(step % every == 0 for every in self.eval_steps)


@dataclass(frozen=True)
class Reached:
    """Where training is: a state of `step` completed updates, and whether the evaluation at that step is still owed."""

    state: State
    step: int
    owes: bool = False


@dataclass(frozen=True)
class Parts:
    """The live objects of one run."""

    cadence: Cadence
    train_step: Callable[[State, Mapping[str, Any]], tuple[State, Mapping[str, Any]]]
    evaluate: Callable[[State, int], Mapping[str, Mapping[str, Any]]]  # by split; raises Stopped where one is asked for
    is_finite: Callable[[State], bool]
    items: Callable[[Reached, dict[str, Any]], Mapping[str, Any]]  # what a checkpoint holds; the position of the data
    data: Data
    epoch_steps: float  # in one pass over the data
    saver: Saver
    last: bool  # whether the last state is saved when training ends or is stopped
    logger: MetricsFile
    timing: Callable[[Mapping[str, Any]], None]
    progress: Progress
    ledger: Ledger
    time: Time


def train(parts: Parts, start: Reached, flag: Flag) -> Reached:
    """Train to the last step, or until asked to stop; save the last state.

    Raises DivergedError where the loss, the gradient or the parameters are not finite at a step that is logged or
    saved: such a state is never saved as one to resume from. Raises Stopped where there is no time left to save.
    """
    cadence, flight = parts.cadence, Flight(parts, start.step)
    state, step, owes = start.state, start.step, start.owes
    try:
        with suppress(Stopped):
            while flag.notice is None and (owes or step < cadence.steps):
                late = owes  # cut short by a stop, before this process
                if not owes:
                    with parts.ledger.time_in("data"):
                        batch = next(parts.data)
                    state, metrics = parts.train_step(state, batch)
                    step += 1
                    flight.take_off(step, metrics)
                    owes = cadence.evaluates(step)
                measured: dict[str, float] = {}
                if owes:
                    flight.land_all()
                    measured = _evaluate(parts, state, step)
                    owes = False
                moment = StepInfo(step, measured, parts.epoch_steps, flight.losses)
                reason = _due(parts, moment) or flag.take_wish() or ("evaluated after a stop" if late else None)
                if reason:
                    flight.land_all()
                    _save(parts, flight, Reached(state, step), moment, reason)
        flight.land_all()
        parts.ledger.note(step, {}, parts.saver.newest)
        with parts.ledger.time_in("save"):
            saved = step == start.step or not parts.last or parts.saver.holds(step)  # may wait for one under way
        if not saved:
            parts.time.check()
            _save(parts, flight, Reached(state, step, owes), StepInfo(step), flag.notice or "end of training")
    except Stopped:
        raise
    except Exception as error:  # to be looked at later, where a rule asks for it; it goes on its way all the same
        parts.ledger.note(step, {}, parts.saver.newest)
        parts.saver.rescue(error, StepInfo(step), lambda: parts.items(Reached(state, step), parts.data.state()))
        raise
    return Reached(state, step, owes)


class Flight:
    """Steps that were dispatched and are not yet known to be complete: a few, so that the device never waits for us.

    A step is logged when it has landed. By then its metrics are there, and reading them keeps nobody waiting.
    """

    def __init__(self, parts: Parts, step: int):
        self._parts, self._logged, self._landed = parts, step, step
        self.losses: deque[float] = deque(maxlen=LOSSES)
        self._flying: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._unread: list[tuple[int, Mapping[str, Any]]] = []  # landed since a step was last found to be finite
        self._since = time.perf_counter()

    def take_off(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Remember a dispatched step; wait for an old one where too many are under way."""
        self._flying.append((step, metrics))
        while len(self._flying) > STEPS_IN_FLIGHT:
            self._land()

    def land_all(self) -> None:
        """Wait for every step, and log what is due: before anything that must come after these lines."""
        while self._flying:
            self._land()

    def prove(self) -> None:
        """Raises DivergedError, naming the first step that was not finite, where the last one that landed is not."""
        if not self._unread:
            return
        if _bad(self._unread[-1][1]):
            step, name, value = next((step, *bad) for step, metrics in self._unread if (bad := _bad(metrics)))
            raise self.diverged(step, f"{name} is {value}")
        self._unread = []

    def diverged(self, step: int, what: str) -> DivergedError:
        """The error that says which step was not finite, and how to find its batch."""
        newest = self._flying[-1][0] if self._flying else self._landed
        return DivergedError(f"step {step}: {what}", step, newest - step, self._parts.data.state())

    def _land(self) -> None:
        step, metrics = self._flying.popleft()
        metrics["loss"].block_until_ready()
        self._landed = step
        self._parts.ledger.beat(step)
        self._unread.append((step, {name: metrics[name] for name in WATCHED}))
        if step % self._parts.cadence.log_steps and step != self._parts.cadence.steps:
            return
        self.prove()
        values = {name: float(value) for name, value in metrics.items()}
        self.losses.append(values["loss"])
        self._parts.logger.log(step, "train", values)
        self._parts.progress.tick(step, values, self._parts.saver.newest)
        self._parts.ledger.note(step, {}, self._parts.saver.newest)
        elapsed, self._since = time.perf_counter() - self._since, time.perf_counter()
        steps, self._logged = step - self._logged, step
        self._parts.timing({"step": step, "event": "train", "steps": steps, "seconds": round(elapsed, 6)})


WATCHED = ("loss", "grad_norm")  # where either leaves the finite numbers, the update of that step is poisoned


def _bad(metrics: Mapping[str, Any]) -> tuple[str, float] | None:
    """The first metric that is not finite, and its value."""
    values = ((name, float(metrics[name])) for name in WATCHED)
    return next(((name, value) for name, value in values if not math.isfinite(value)), None)


def _due(parts: Parts, moment: StepInfo) -> str | None:
    """Why to save now, or None. After an evaluation this may wait for the save that is under way."""
    with parts.ledger.time_in("save") if moment.metrics else nullcontext():
        return parts.saver.due(moment)


def _save(parts: Parts, flight: Flight, at: Reached, moment: StepInfo, reason: str) -> None:
    """Save a state that is finite, unless the log does not hold its lines yet."""
    flight.prove()
    with parts.ledger.time_in("save"):
        if not parts.is_finite(at.state):
            raise flight.diverged(at.step, "the parameters are not finite")
        if not parts.logger.flush():
            return
        parts.saver.save(reason, moment, parts.items(at, parts.data.state()))


def _evaluate(parts: Parts, state: State, step: int) -> dict[str, float]:
    """All that is due at this step, then its lines: where it is cut short, none of it is in the log."""
    start = time.perf_counter()
    with parts.ledger.time_in("eval"):
        found = parts.evaluate(state, step)
    measured: dict[str, float] = {}
    for split, values in found.items():
        parts.logger.log(step, split, values)
        measured |= {f"{split}/{name}": value for name, value in values.items() if isinstance(value, float)}
    parts.ledger.note(step, measured, parts.saver.newest)
    parts.timing({"step": step, "event": "eval", "seconds": round(time.perf_counter() - start, 6)})
    return measured
