"""Whether training waits for its data: told once, with numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

WINDOW_STEPS, WINDOW_SECONDS, WARM_UP = 50, 2.0, 3
SHARE = 0.1  # of the wall-clock

State = dict[str, Any]
Batch = Mapping[str, Any]
Step = Callable[[State, Batch], tuple[State, Mapping[str, Any]]]


class Data(Protocol):
    """Endless batches that know their position."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...


class Fed:
    """The data of a loop and the step that consumes it, with an eye on who waits for whom.

    That a batch takes long costs nothing while the device still works on an earlier step. So only those batches count
    before which the last dispatched step was complete: then the device had run dry.
    """

    def __init__(self, data: Data, step: Step, say: Callable[[str], None], advice: str):
        self._data, self._step, self._say, self._advice = data, step, say, advice
        self._told = False
        self._last: Any = None  # the loss of the step that was dispatched last
        self._batches, self._dry, self._fetching = -WARM_UP, 0, 0.0  # the first ones wait for what only begins
        self._since = time.perf_counter()

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._data)
        if not self._told:
            self._count(began, time.perf_counter())
        return batch

    def state(self) -> dict[str, Any]:
        return self._data.state()

    def train(self, state: State, batch: Batch) -> tuple[State, Mapping[str, Any]]:
        """The step, whose loss is remembered: whether it is there yet tells whether the device has work."""
        state, metrics = self._step(state, batch)
        self._last = metrics["loss"]
        return state, metrics

    def _count(self, began: float, now: float) -> None:
        self._batches += 1
        if self._batches <= 0:
            self._since = now
            return
        self._fetching += now - began
        self._dry += self._last is None or self._last.is_ready()
        if self._batches >= WINDOW_STEPS and now - self._since >= WINDOW_SECONDS:
            self._judge(now - self._since)
            self._batches, self._dry, self._fetching, self._since = 0, 0, 0.0, now

    def _judge(self, seconds: float) -> None:
        share = self._fetching / seconds
        if share <= SHARE or self._dry <= self._batches / 2:
            return
        fetch, step = (1000 * value / self._batches for value in (self._fetching, seconds))
        self._say(
            f"warning: training waits for data: a batch takes {fetch:.3g} ms of {step:.3g} ms a step ({share:.0%}), "
            f"and the device runs dry meanwhile; {self._advice}"
        )
        self._told = True
