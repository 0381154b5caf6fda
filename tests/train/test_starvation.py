"""Training that waits for data is told so once, with numbers; training that does not is left in peace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from runner.train import starvation
from runner.train.starvation import WARM_UP_STEPS, WINDOW_STEPS, StarvationMonitor


class Clock:
    """Time that passes when something takes time."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Device:
    """A device that works through its queue while the host does something else."""

    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds, self.free = clock, seconds, 0.0

    def step(self, state: dict[str, Any], batch: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
        self.free = max(self.free, self.clock.now) + self.seconds
        return state, {"loss": Loss(self.clock, self.free)}


class Loss:
    def __init__(self, clock: Clock, there: float):
        self.clock, self.there = clock, there

    def is_ready(self) -> bool:
        return self.clock.now >= self.there


class Data:
    def __init__(self, clock: Clock, seconds: float):
        self.clock, self.seconds, self.count = clock, seconds, 0

    def __next__(self) -> dict[str, Any]:
        self.count += 1
        self.clock.now += 10.0 if self.count == 1 else self.seconds  # the first one waits for what only begins
        return {}


def said(monkeypatch: pytest.MonkeyPatch, *, fetch: float, step: float, in_flight: int = 2) -> list[str]:
    """What is said in five windows of steps, of which so many may be under way when the next batch is fetched."""
    clock, lines, flying = Clock(), list[str](), list[Loss]()
    monkeypatch.setattr(starvation.time, "perf_counter", clock)
    device, data = Device(clock, step), Data(clock, fetch)
    monitor, last = StarvationMonitor(lines.append, "try data.workers=2"), None
    for _ in range(5 * WINDOW_STEPS + WARM_UP_STEPS):
        began = clock.now
        batch = next(data)
        monitor.count_batch(began, clock.now, device_is_idle=last is None or last.is_ready())
        _, metrics = device.step({}, batch)
        last = metrics["loss"]
        flying.append(metrics["loss"])
        if len(flying) > in_flight:
            clock.now = max(clock.now, flying.pop(0).there)
    return lines


def test_it_is_said_once_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, fetch=0.08, step=0.02) == [
        "warning: training waits for data: a batch takes 80 ms of 80 ms a step (100%), and the device runs dry "
        "meanwhile; try data.workers=2"
    ]


def test_a_device_that_is_always_busy_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the wall-clock goes to batches, and none of it is lost: the device works meanwhile."""
    assert said(monkeypatch, fetch=0.05, step=0.1) == []


def test_a_device_that_works_while_the_host_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without steps in flight (a step that runs in the thread that asks for it), every batch is waited for."""
    (line,) = said(monkeypatch, fetch=0.03, step=0.06, in_flight=0)
    assert "waits for data: a batch takes 30 ms of 90 ms a step (33%)" in line
    assert said(monkeypatch, fetch=0.005, step=0.06, in_flight=0) == []
