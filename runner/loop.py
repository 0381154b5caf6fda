"""The order of things in training. It is code and not callbacks, because exact resume depends on it:

    batch = next(data)  →  state, metrics = train_step(state, batch)  →  log if due  →  evaluate if due
    →  save if due  →  stop if asked

Saving comes after the update and before the next `next(data)`: so the position of the data that is saved is the first
batch the state has not seen. A step's lines are in the logs before its checkpoint is on disk: so a restored step is
never missing from them. Nothing leaves the device but where a value is due, and then when it is there: see `Flight`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from runner.errors import DivergedError
from runner.log import Truth
from runner.moment import Moment

State = dict[str, Any]
LOSSES = 64  # so many logged losses are remembered, for rules that look at them
STEPS_IN_FLIGHT = 2  # one is computed, one waits behind it; more would only delay a stop


class Data(Protocol):
    """Endless batches that know their position."""

    def __next__(self) -> Mapping[str, Any]: ...
    def state(self) -> dict[str, Any]: ...


class Saver(Protocol):
    """Decides when to save, and saves."""

    @property
    def newest(self) -> int | None: ...
    def holds(self, step: int) -> bool: ...
    def due(self, moment: Moment) -> str | None: ...
    def save(self, reason: str, moment: Moment, items: Mapping[str, Any]) -> None: ...
    def rescue(self, error: Exception, moment: Moment, items: Callable[[], Mapping[str, Any]]) -> None: ...


class Flag(Protocol):
    """A request to stop, or None."""

    notice: str | None


class Ledger(Protocol):
    """Counts seconds, and remembers how far training is and what it measured."""

    def spend(self, bucket: str) -> AbstractContextManager[None]: ...
    def note(self, step: int, measured: Mapping[str, float], durable_step: int | None) -> None: ...


class Progress(Protocol):
    """Shows how far training is."""

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None: ...


@dataclass(frozen=True)
class Cadence:
    """How long to train and how often to look, in steps."""

    steps: int
    log_steps: int
    eval_steps: int


@dataclass(frozen=True)
class Parts:
    """The live objects of one run."""

    cadence: Cadence
    train_step: Callable[[State, Mapping[str, Any]], tuple[State, Mapping[str, Any]]]
    evaluate: Callable[[State], dict[str, float]]
    items: Callable[[State, dict[str, Any]], Mapping[str, Any]]  # what a checkpoint holds: state, position of the data
    data: Data
    epoch_steps: float  # in one pass over the data
    saver: Saver
    last: bool  # whether the last state is saved when training ends or is stopped
    logger: Truth
    timing: Callable[[Mapping[str, Any]], None]
    progress: Progress
    ledger: Ledger


def train(parts: Parts, state: State, step: int, flag: Flag) -> tuple[State, int]:
    """Train from a state of `step` completed updates to the last step, or until asked to stop; save the last state.

    Raises DivergedError where the loss or the gradient is not finite at a step that is logged or saved: such a state
    is never saved as one to resume from.
    """
    cadence, first, flight = parts.cadence, step, Flight(parts, step)
    moment = Moment(step)
    try:
        while step < cadence.steps and flag.notice is None:
            with parts.ledger.spend("data"):
                batch = next(parts.data)
            state, metrics = parts.train_step(state, batch)
            step += 1
            flight.take_off(step, metrics)
            measured: dict[str, float] = {}
            if step % cadence.eval_steps == 0 or step == cadence.steps:
                flight.land_all()
                measured = _evaluate(parts, state, step)
            moment = Moment(step, measured, parts.epoch_steps, flight.losses)
            if reason := parts.saver.due(moment):
                flight.land_all()
                _save(parts, state, moment, metrics, reason)
        flight.land_all()
        if step > first and parts.last and not parts.saver.holds(step):
            _save(parts, state, moment, metrics, flag.notice or "end of training")
    except Exception as error:  # to be looked at later, where a rule asks for it; it goes on its way all the same
        parts.saver.rescue(error, Moment(step), lambda: parts.items(state, parts.data.state()))
        raise
    return state, step


class Flight:
    """Steps that were dispatched and are not yet known to be complete: a few, so that the device never waits for us.

    A step is logged when it has landed. By then its metrics are there, and reading them keeps nobody waiting.
    """

    def __init__(self, parts: Parts, step: int):
        self._parts, self._logged = parts, step
        self.losses: deque[float] = deque(maxlen=LOSSES)
        self._flying: deque[tuple[int, Mapping[str, Any]]] = deque()
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

    def _land(self) -> None:
        step, metrics = self._flying.popleft()
        with self._parts.ledger.spend("step"):
            metrics["loss"].block_until_ready()
        if step % self._parts.cadence.log_steps and step != self._parts.cadence.steps:
            return
        values = _finite(metrics, self._logged, step)
        self.losses.append(values["loss"])
        self._parts.logger.log(step, "train", values)
        self._parts.progress.tick(step, values, self._parts.saver.newest)
        self._parts.ledger.note(step, {}, self._parts.saver.newest)
        elapsed, self._since = time.perf_counter() - self._since, time.perf_counter()
        steps, self._logged = step - self._logged, step
        self._parts.timing({"step": step, "event": "train", "steps": steps, "seconds": round(elapsed, 6)})


def _save(parts: Parts, state: State, moment: Moment, metrics: Mapping[str, Any], reason: str) -> None:
    """Save a state, unless the step that made it was not finite, or the log does not hold its lines yet."""
    _finite(metrics, moment.step - 1, moment.step)
    if not parts.logger.flush():
        return
    with parts.ledger.spend("save"):
        parts.saver.save(reason, moment, parts.items(state, parts.data.state()))


def _evaluate(parts: Parts, state: State, step: int) -> dict[str, float]:
    start = time.perf_counter()
    with parts.ledger.spend("eval"):
        values = parts.evaluate(state)
    parts.logger.log(step, "eval", values)
    measured = {f"eval/{name}": value for name, value in values.items()}
    parts.ledger.note(step, measured, parts.saver.newest)
    parts.timing({"step": step, "event": "eval", "seconds": round(time.perf_counter() - start, 6)})
    return measured


def _finite(metrics: Mapping[str, Any], after: int, step: int) -> dict[str, float]:
    """Metrics as numbers, off the device. Raises DivergedError, naming the window in which they left the finite."""
    values = {name: float(value) for name, value in metrics.items()}
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if bad:
        raise DivergedError(
            f"step {step}: {bad[0]} is {values[bad[0]]}; it became so after step {after}; the newest checkpoint before "
            "it stands: lower optim.lr, or look at the data"
        )
    return values
