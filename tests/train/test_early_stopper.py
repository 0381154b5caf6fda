"""Where training ends because a metric gets no better, and that it ends there however often it was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.config.early_stop import EarlyStop
from runner.log.jsonl import JsonLinesFile
from runner.preempt.stop import Stopped
from runner.train.early_stopper import EarlyStopper
from runner.train.loop import Cadence, LoopParts, Progress, train
from tests.train.test_loop import World

# The loss at the evaluations after steps 3, 6, 9 …: the best is the second.
LOSSES = (3.0, 1.0, 2.0, 1.5, 1.0, 0.5)


def write_log(path: Path, values: tuple[float, ...]) -> Path:
    log = JsonLinesFile(path, print)
    for number, value in enumerate(values, 1):
        log.log(number * 3, "train", {"loss": 7.0})
        log.log(number * 3, "eval", {"loss": value})
    log.close()
    return path


class Measuring(World):
    """Measures one loss after the other, and at the end something else as well."""

    def evaluate(self, state: dict[str, Any], step: int) -> dict[str, dict[str, float]]:
        super().evaluate(state, step)
        return {"eval": {"loss": LOSSES[step // 3 - 1]}}

    def evaluate_rest(self, state: dict[str, Any], step: int) -> dict[str, dict[str, float]]:
        if step == self.stop_in_rest:
            self.flag.reason = "SIGTERM"
            raise Stopped
        return {"test": {"loss": 9.0}}

    stop_in_rest: int | None = None


def parts_of(world: Measuring, rule: EarlyStopper, steps: int = 18) -> LoopParts:
    parts = world.parts()
    cadence = Cadence(steps=steps, log_steps=3, eval_steps=frozenset({3}))
    evaluating = replace(parts.evaluating, evaluate_rest=world.evaluate_rest)
    return replace(parts, cadence=cadence, end_rule=rule, evaluating=evaluating)


def stopper(log: Path, patience: int) -> EarlyStopper:
    return EarlyStopper(EarlyStop(metric="eval/loss", patience=patience), "min", log)


@pytest.mark.parametrize(("patience", "end"), [(1, 9), (2, 12), (3, 15), (4, 18)])
def test_it_ends_when_patience_is_used_up(tmp_path: Path, patience: int, end: int) -> None:
    """With patience 4 the last step comes first, and there the metric has improved."""
    world = Measuring(save_every=100)
    reached = train(parts_of(world, stopper(tmp_path / "none", patience)), Progress({"step": 0}, 0), world.flag)
    assert (reached.step, reached.owes) == (end, False)
    # The last step is saved, with all that is due at the end; its lines are in the log before that.
    assert world.saved.keys() == {end}
    assert world.events[-1] == ("save", end)
    assert (("test", end) in world.events) == (end < 18)
    reason = "end of training" if end == 18 else f"eval/loss has not improved in {patience} evaluation"
    assert world.saved[end][2].startswith(reason)
    assert world.measured[end].get("test/loss") == (9.0 if end < 18 else None)


@pytest.mark.parametrize("restored", [0, 1, 2, 3, 4])
def test_it_ends_at_the_same_step_from_wherever_it_goes_on(tmp_path: Path, restored: int) -> None:
    """What counts is what the log holds up to the restored step: after a kill, a rollback, or `step=`."""
    log = write_log(tmp_path / "metrics.jsonl", LOSSES[:restored])
    world, start = Measuring(save_every=100), restored * 3
    world.batches = world.landed = start
    reached = train(parts_of(world, stopper(log, 3)), Progress({"step": start}, start), world.flag)
    assert reached.step == 15


def test_a_run_that_has_ended_so_does_nothing_more(tmp_path: Path) -> None:
    """Killed after its last save and before it said that it is finished; with more patience it goes on."""
    log = write_log(tmp_path / "metrics.jsonl", LOSSES[:5])
    world = Measuring(save_every=100)
    assert train(parts_of(world, stopper(log, 3)), Progress({"step": 15}, 15), world.flag).step == 15
    assert world.events == []
    world.batches = world.landed = 15
    assert train(parts_of(world, stopper(log, 4)), Progress({"step": 15}, 15), world.flag).step == 18


def test_a_stop_in_the_evaluations_of_the_end_owes_all_of_that_step(tmp_path: Path) -> None:
    """None of them is in the log, the step is saved as one that owes, and whoever goes on ends there."""
    world = Measuring(save_every=100)
    world.stop_in_rest = 15
    reached = train(parts_of(world, stopper(tmp_path / "none", 3)), Progress({"step": 0}, 0), world.flag)
    assert (reached.step, reached.owes) == (15, True)
    assert world.owing == [15]
    assert ("eval", 15) not in world.events
    assert world.saved[15][2] == "SIGTERM"
    log = write_log(tmp_path / "metrics.jsonl", LOSSES[:4])
    world = Measuring(save_every=100)
    reached = train(parts_of(world, stopper(log, 3)), Progress({"step": 15}, 15, owes=True), world.flag)
    assert (reached.step, reached.owes) == (15, False)
    assert [event for event in world.events if event[0] != "save"] == [("eval", 15), ("test", 15)]


def test_evaluations_of_other_data_are_no_evaluations_of_it(tmp_path: Path) -> None:
    rule = EarlyStopper(EarlyStop(metric="eval/loss", patience=2), "min", tmp_path / "none")
    for measured in ({"eval/loss": 1.0}, {"test/loss": 9.0}, {"evaluation/loss": 9.0}, {"eval/loss": 2.0}, {}):
        rule.observe(measured, 5)
        assert rule.reason == ""
    rule.observe({"eval/accuracy": 0.5}, 5)
    assert rule.reason == "eval/loss has not improved in 2 evaluations"


def test_nothing_is_read_where_nothing_is_looked_at(tmp_path: Path) -> None:
    rule = EarlyStopper(EarlyStop(), "min", tmp_path)
    rule.observe({"eval/loss": 1.0}, 5)
    assert rule.reason == ""
