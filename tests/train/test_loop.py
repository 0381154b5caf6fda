"""The order of things in training, seen from outside: a fake for each part writes down when it is asked."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest

from runner.errors import DivergedError
from runner.log.sinks import LogDigest
from runner.preempt.stop import Stopped
from runner.train.loop import (
    MAX_PENDING_STEPS,
    Cadence,
    CompiledStep,
    Evaluating,
    LoopParts,
    Outputs,
    Progress,
    Saving,
    train,
)
from runner.train.speed import SpeedMeter, StepWork
from runner.train.starvation import StarvationMonitor
from runner.values import Speed, StepInfo


class Number:
    """A metric on a device: reading it before it has landed would make training wait."""

    def __init__(self, step: int, value: float, world: World):
        self.step, self.value, self.world = step, value, world

    def block_until_ready(self) -> None:
        self.world.landed = max(self.world.landed, self.step)

    def is_ready(self) -> bool:
        return self.step <= self.world.landed

    def __float__(self) -> float:
        assert self.step <= self.world.landed, f"step {self.step} was read while it was under way"
        return self.value


class Flag:
    reason: str | None = None
    wish: str | None = None

    def agree_to_stop(self) -> str | None:
        return self.reason

    def pop_save_request(self) -> str | None:
        wish, self.wish = self.wish, None
        return wish


class World:
    """Everything the loop works with, and the list of what happened."""

    def __init__(self, *, save_every: int = 5, losses: Mapping[int, float] | None = None, stop_at: int | None = None):
        self.events: list[tuple[str, int]] = []
        self.save_every, self.losses, self.stop_at = save_every, losses or {}, stop_at
        self.log_is_whole = True
        self.poisoned: set[int] = set()
        self.stop_in_evaluation: int | None = None
        self.moments: list[tuple[StepInfo, list[float]]] = []
        self.batches, self.landed, self.newest, self.flag = 0, 0, None, Flag()
        self.saved: dict[int, tuple[int, int, str]] = {}
        self.owing: list[int] = []
        self.measured: dict[int, Mapping[str, float]] = {}
        self.failing_saves = 0
        self.gradient = 1.0
        self.said: list[str] = []
        self.copied_at: float | None = None
        self.moved: list[tuple[str, float]] = []

    def __next__(self) -> Mapping[str, Any]:
        self.batches += 1
        return {"n": self.batches}

    def state(self) -> dict[str, Any]:
        return {"next": self.batches}

    def train_step(self, state: dict[str, Any], batch: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
        step = state["step"] + 1
        assert batch["n"] == step
        assert step - self.landed <= MAX_PENDING_STEPS + 1, "too many steps under way"
        if step == self.stop_at:
            self.flag.reason = "SIGTERM"
        loss = Number(step, self.losses.get(step, 1.0), self)
        return {"step": step}, {"loss": loss, "grad_norm": Number(step, self.gradient, self)}

    def evaluate(self, state: dict[str, Any], step: int) -> dict[str, dict[str, float]]:
        assert step == state["step"]
        if state["step"] == self.stop_in_evaluation:
            self.flag.reason = "SIGTERM"
            raise Stopped
        return {"eval": {"loss": 1.0 / state["step"]}}

    def holds(self, step: int) -> bool:
        return step in self.saved

    def due(self, moment: StepInfo) -> str | None:
        self.moments.append((moment, list(moment.losses)))
        return "due" if moment.step % self.save_every == 0 else None

    def save(self, reason: str, moment: StepInfo, items: Mapping[str, Any], log: LogDigest | None = None) -> None:
        assert log == self.digest()
        assert items["state"]["step"] == moment.step
        self.events.append(("save", moment.step))
        self.measured[moment.step] = moment.metrics
        if self.failing_saves:
            self.failing_saves -= 1
            return
        self.saved[moment.step] = (items["state"]["step"], items["data"]["next"], reason)
        self.owing += [moment.step] if items["owes"] else []

    def rescue(self, error: Exception, moment: StepInfo, items: Any) -> None:
        self.events.append(("rescue", items()["state"]["step"]))

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.events.append((split, step))

    def flush(self) -> bool:
        return self.log_is_whole

    def digest(self) -> LogDigest:
        return LogDigest(len(self.events), "")

    def close(self) -> None: ...

    def time_in(self, bucket: str) -> AbstractContextManager[None]:
        return nullcontext()

    def move_to(self, bucket: str, seconds: float) -> None:
        self.moved.append((bucket, seconds))

    def raise_if_hopeless(self) -> None: ...

    def beat(self, step: int) -> None:
        assert step == self.landed

    def note(self, step: int, measured: Mapping[str, float], durable_step: int | None) -> None: ...

    def say(self, line: str) -> None:
        self.said.append(line)

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None, speed: Speed) -> None: ...

    def parts(self, *, steps: int = 20, last: bool = True) -> LoopParts:
        return LoopParts(
            cadence=Cadence(steps=steps, log_steps=2, eval_steps=frozenset({10}), epoch_steps=7.5, save_last=last),
            step=CompiledStep(lambda state, batch, lr: self.train_step(state, batch), 1.0),
            data=self,
            starvation=StarvationMonitor(print, ""),
            evaluating=Evaluating(self.evaluate, lambda state: state["step"] not in self.poisoned),
            saving=Saving(self, lambda at, position: {"state": at.state, "data": position, "owes": at.owes}),
            outputs=Outputs(self, lambda record: None, self),
            meter=SpeedMeter(StepWork(None, None), Future(), self.say, 0),
            log=self,
            deadline=self,
        )

    def train(self, start: Progress | None = None, **options: Any) -> Progress:
        return train(self.parts(**options), start or Progress({"step": 0}, 0), self.flag)


def test_a_loss_that_depends_on_no_parameter_is_told_once() -> None:
    world = World()
    world.gradient = 0.0
    world.train()
    (said,) = world.said
    assert said.startswith("warning: the gradient is 0 at step 2: the loss does not depend on the parameters there")
    usual = World()
    usual.train()
    assert usual.said == []


def test_each_line_comes_once_in_order_and_before_the_checkpoint_of_its_step() -> None:
    world = World()
    assert world.train() == Progress({"step": 20}, 20)
    assert [event for event in world.events if event[0] == "train"] == [("train", step) for step in range(2, 21, 2)]
    assert [event for event in world.events if event[0] == "eval"] == [("eval", 10), ("eval", 20)]
    for step in (5, 10, 15, 20):
        at = world.events.index(("save", step))
        before = world.events[:at]
        assert {line for line in world.events if line[0] != "save" and line[1] <= step} <= set(before)
    assert world.events.index(("train", 10)) < world.events.index(("eval", 10)) < world.events.index(("save", 10))


def test_a_checkpoint_holds_the_first_batch_its_state_has_not_seen() -> None:
    world = World()
    world.train()
    assert {step: saved[:2] for step, saved in world.saved.items()} == {n: (n, n) for n in (5, 10, 15, 20)}


def test_a_stop_saves_the_step_it_comes_in_and_says_why() -> None:
    world = World(stop_at=7)
    assert world.train() == Progress({"step": 7}, 7)
    assert world.saved[7] == (7, 7, "SIGTERM")
    assert world.batches == 7  # no batch was drawn that nobody has seen


def test_a_step_that_is_saved_already_is_not_saved_again() -> None:
    world = World(stop_at=10)
    world.train()
    assert [event for event in world.events if event == ("save", 10)] == [("save", 10)]
    world = World(save_every=100)
    world.train(last=False)
    assert world.saved == {}


def test_a_step_whose_save_failed_is_saved_again_with_what_was_measured() -> None:
    """Else it could never be the best."""
    world = World(save_every=20)
    world.failing_saves = 1
    world.train()
    assert [event for event in world.events if event[0] == "save"] == [("save", 20)] * 2
    assert world.saved.keys() == {20}
    assert world.measured[20] == {"eval/loss": 1 / 20}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_saved(bad: float) -> None:
    world = World(losses={5: bad})
    with pytest.raises(DivergedError, match=r"step 5: loss is (nan|inf)") as caught:
        world.train()
    assert (caught.value.step, caught.value.behind, caught.value.position) == (5, 0, {"next": 5})
    assert world.saved == {}
    world = World(save_every=100, losses={7: bad, 8: bad})
    with pytest.raises(DivergedError, match=r"step 7: loss is (nan|inf)") as caught:  # seen at 8, which is logged
        world.train()
    assert (caught.value.step, caught.value.behind, caught.value.position) == (7, 3, {"next": 10})
    # Also where the next step is finite again: whether it is noticed must not depend on what is logged.
    world = World(save_every=100, losses={7: bad})
    with pytest.raises(DivergedError, match=r"step 7: loss is (nan|inf)"):
        world.train()
    world = World()
    world.poisoned = {5}
    with pytest.raises(DivergedError, match="step 5: the parameters are not finite"):
        world.train()
    assert world.saved == {}


def test_rules_see_what_is_true_after_each_step() -> None:
    world = World(losses={2: 0.5, 4: 0.25})
    world.train()
    assert [moment.step for moment, _ in world.moments] == list(range(1, 21))
    assert {moment.epoch_steps for moment, _ in world.moments} == {7.5}
    assert {moment.step: moment.metrics for moment, _ in world.moments if moment.metrics} == {
        10: {"eval/loss": 0.1},
        20: {"eval/loss": 0.05},
    }
    seen = dict((moment.step, losses) for moment, losses in world.moments)
    assert seen[20][:2] == [0.5, 0.25]  # of the steps that were logged, oldest first
    assert len(seen[20]) == 10
    assert seen[3] == []  # nobody waits for a loss that has not landed


@pytest.mark.parametrize("where", ["__next__", "train_step", "evaluate"])
def test_an_exception_anywhere_leaves_what_there_is_and_goes_on_its_way(where: str) -> None:
    class Breaks(World):
        def __getattribute__(self, name: str) -> Any:
            if name == where and object.__getattribute__(self, "batches") >= 10:
                raise KeyError("boom")
            return object.__getattribute__(self, name)

    world = Breaks()
    parts = world.parts()
    broken = dataclasses.replace(
        parts,
        data=world if where != "__next__" else Feeds(world),
        step=CompiledStep(lambda state, batch, lr: world.train_step(state, batch), 1.0),
        evaluating=Evaluating(lambda state, step: world.evaluate(state, step), parts.evaluating.is_finite),
    )
    with pytest.raises(KeyError, match="boom"):
        train(broken, Progress({"step": 0}, 0), world.flag)
    last = {"__next__": 10, "train_step": 9, "evaluate": 10}[where]
    assert world.events[-1] == ("rescue", last)


class Feeds:
    """A world's data, looked up at each step."""

    def __init__(self, world: World):
        self._world = world

    def __next__(self) -> Mapping[str, Any]:
        return self._world.__next__()

    def state(self) -> dict[str, Any]:
        return self._world.state()


def test_nothing_is_saved_while_the_log_waits_for_the_disk() -> None:
    """A restored step is never missing from the log: also not where the log was what the disk had no room for."""
    world = World()
    world.log_is_whole = False
    world.train()
    assert world.saved == {}


def test_nothing_is_left_to_do_at_the_last_step() -> None:
    world = World()
    assert world.train(Progress({"step": 20}, 20)) == Progress({"step": 20}, 20)
    assert world.events == []


def test_an_evaluation_that_a_stop_cuts_short_is_owed_and_made_up_for() -> None:
    world = World()
    world.stop_in_evaluation = 10
    assert world.train() == Progress({"step": 10}, 10, owes=True)
    assert world.owing == [10]
    assert [event for event in world.events if event[0] == "eval"] == []
    later = World()
    later.batches = 10
    later.landed = 10
    assert later.train(Progress({"step": 10}, 10, owes=True)) == Progress({"step": 20}, 20)
    assert later.events[:2] == [("eval", 10), ("save", 10)]  # first of all, and its step saved with what was measured
    assert later.owing == []
    undisturbed = World()
    undisturbed.train()
    assert _lines(world) + _lines(later) == _lines(undisturbed)


def _lines(world: World) -> list[tuple[str, int]]:
    return [event for event in world.events if event[0] != "save"]


def test_a_wish_saves_once_and_training_goes_on() -> None:
    world = World(save_every=100)
    world.flag.wish = "rebalance"
    assert world.train().step == 20
    assert {step: saved[2] for step, saved in world.saved.items()} == {1: "rebalance", 20: "end of training"}


@pytest.mark.parametrize("slow", [True, False])
def test_a_step_that_waits_for_the_copy_of_a_save_waits_for_saving(slow: bool) -> None:
    """On an accelerator `save` returns before the copy is made; on CPUs after, and nothing is to be counted."""

    class Copies(World):
        began = 0.0

        def save(self, reason: str, moment: StepInfo, items: Mapping[str, Any], log: LogDigest | None = None) -> None:
            super().save(reason, moment, items, log)
            self.copied_at, self.began = time.perf_counter() + (0.3 if slow else 0), time.perf_counter()

        def train_step(self, state: dict[str, Any], batch: Mapping[str, Any]) -> Any:
            # The first step after a save is given arrays that are still being copied.
            time.sleep(max(0.0, (self.copied_at or 0.0) - time.perf_counter()))
            return super().train_step(state, batch)

    world = Copies(save_every=7)
    records: list[dict[str, Any]] = []
    parts = dataclasses.replace(world.parts(steps=8), outputs=Outputs(world, records.append, world))
    train(parts, Progress({"step": 0}, 0), world.flag)
    assert [bucket for bucket, _ in world.moved] == ["save"] * slow
    assert all(0.0 < seconds <= 0.3 for _, seconds in world.moved)
    (paused,) = (record["paused"] for record in records if (record["event"], record["step"]) == ("train", 8))
    # Making the save itself takes next to no time here.
    assert paused >= sum(seconds for _, seconds in world.moved)


def test_waiting_for_a_save_is_saving() -> None:
    """Where a saver may wait for one under way (after an evaluation, at the end), and all that making one takes."""

    class Asks(World):
        def __init__(self) -> None:
            super().__init__(save_every=20)
            self.inside: list[str] = []
            self.asked: list[tuple[str, int, list[str]]] = []

        @contextmanager
        def time_in(self, bucket: str) -> Iterator[None]:  # type: ignore[override]
            self.inside.append(bucket)
            yield
            self.inside.pop()

        def holds(self, step: int) -> bool:
            self.asked.append(("holds", step, [*self.inside]))
            return super().holds(step)

        def due(self, moment: StepInfo) -> str | None:
            self.asked.append(("due after evaluation" if moment.metrics else "due", moment.step, [*self.inside]))
            return super().due(moment)

        def flush(self) -> bool:
            self.asked.append(("flush", 0, [*self.inside]))
            return super().flush()

    world = Asks()
    world.train()
    buckets = {(what, *inside) for what, _, inside in world.asked}
    assert buckets == {("holds", "save"), ("due after evaluation", "save"), ("due",), ("flush", "save")}
