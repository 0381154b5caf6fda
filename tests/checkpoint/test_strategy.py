"""WHEN: each rule as a pure function of a moment and a history, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoint.record import Record
from runner.checkpoint.strategy import (
    Adaptive,
    Continuous,
    EveryEpochs,
    EverySeconds,
    EverySteps,
    ExternalSave,
    Failures,
    FirstStep,
    History,
    NewBest,
    OnError,
    SaveRule,
    Unstable,
    find_save_reason,
)
from runner.values import StepInfo


def record(step: int, loss: float | None = None, *, stall: float = 0.0, write: float = 0.0, mark: str = "") -> Record:
    metrics = {} if loss is None else {"eval/loss": loss}
    return Record(step, "test", metrics, 0.0, mark=mark, stall_seconds=stall, write_seconds=write)  # type: ignore[arg-type]


def saved_at(rule: SaveRule, moments: list[StepInfo]) -> list[int]:
    """The steps at which a rule alone would have saved, each save being durable at once."""
    saved: list[Record] = []
    for moment in moments:
        if rule.reason(moment, History(saved)):
            saved.append(Record(moment.step, "test", moment.metrics, 0.0))
    return [r.step for r in saved]


def test_steps_are_counted_from_the_beginning() -> None:
    assert saved_at(EverySteps(steps=5), [StepInfo(step) for step in range(1, 21)]) == [5, 10, 15, 20]
    assert find_save_reason({"periodic": EverySteps(steps=5)}, StepInfo(5), History()) == "every 5 steps"


def test_a_multiple_that_was_missed_is_made_up_for_and_the_grid_stays() -> None:
    rule = EverySteps(steps=5)
    assert rule.reason(StepInfo(7), History([record(4)]))  # 5 fell due while another save was written
    assert rule.reason(StepInfo(8), History([record(7)])) is None
    assert rule.reason(StepInfo(10), History([record(7)]))


def test_a_failed_save_is_tried_again_when_next_due_and_not_at_every_step() -> None:
    rule = EverySteps(steps=5)
    assert rule.reason(StepInfo(11), History([record(5)], tried_step=10)) is None
    assert rule.reason(StepInfo(15), History([record(5)], tried_step=10))


def test_what_an_error_left_does_not_count_as_a_save() -> None:
    assert EverySteps(steps=5).reason(StepInfo(10), History([record(5), record(9, mark="error")]))
    assert EverySteps(steps=5).reason(StepInfo(10), History([record(11, mark="error")]))


def test_seconds_are_counted_from_the_last_save() -> None:
    rule = EverySeconds(seconds=60.0)
    assert rule.reason(StepInfo(9), History(seconds_since=59.9)) is None
    assert rule.reason(StepInfo(9), History(seconds_since=60.0)) == "every 60 s"


def test_epochs_are_passes_over_the_data() -> None:
    moments = [StepInfo(step, epoch_steps=7.5) for step in range(1, 31)]
    assert saved_at(EveryEpochs(epochs=1.0), moments) == [8, 15, 23, 30]
    assert saved_at(EveryEpochs(epochs=0.5), moments) == [4, 8, 12, 15, 19, 23, 27, 30]
    assert saved_at(EveryEpochs(), [StepInfo(step) for step in range(1, 31)]) == []  # data without an end


def test_first_is_once() -> None:
    assert saved_at(FirstStep(), [StepInfo(step) for step in range(1, 5)]) == [1]
    assert FirstStep().reason(StepInfo(2), History(tried_step=1)) is None  # it failed: the other rules try again


def test_best_beats_what_is_on_disk_and_nothing_else_ranks() -> None:
    rule, history = NewBest(min_improvement=0.1), History([record(1, 2.0), record(2, math.nan), record(3)])
    reasons = {loss: rule.reason(StepInfo(9, {"eval/loss": loss}), history) for loss in (1.5, 1.95, 2.5, math.nan)}
    assert reasons == {1.5: "best eval/loss: 2 → 1.5", 1.95: None, 2.5: None, math.nan: None}
    assert rule.reason(StepInfo(9, {"eval/loss": -math.inf}), history) is None
    assert rule.reason(StepInfo(9), history) is None
    assert rule.reason(StepInfo(9, {"eval/loss": 7.0}), History([record(1, math.nan)])) == "first eval/loss: 7"
    assert NewBest(mode="max").reason(StepInfo(9, {"eval/loss": 2.5}), history) == "best eval/loss: 2 → 2.5"
    marked = History([record(1, 2.0), record(2, 0.5, mark="error")])
    assert rule.reason(StepInfo(9, {"eval/loss": 1.5}), marked) == "best eval/loss: 2 → 1.5"


def test_adaptive_is_young_and_daly() -> None:
    rule, saves = Adaptive(mtbf_seconds=1000.0, max_overhead=1.0), [record(9, stall=2.0, write=3.0)]
    assert rule.interval(History(saves)) == (
        math.sqrt(2 * 2.0 * 1000.0),
        "√(2 × 2 s a save × 1000 s between failures)",
    )
    assert rule.reason(StepInfo(10), History(saves, seconds_since=63.2)) is None
    assert rule.reason(StepInfo(10), History(saves, seconds_since=63.3)) is not None


def test_adaptive_learns_from_this_run() -> None:
    rule = Adaptive(mtbf_seconds=1000.0, max_overhead=1.0)
    cheap, dear = [record(9, stall=0.5, write=0.5)], [record(9, stall=8.0, write=8.0)]
    assert rule.interval(History(cheap))[0] < rule.interval(History(dear))[0]
    often = History(cheap, failures=Failures(count=9, seconds=1000.0))  # 10 in 2000 s, the expected one included
    assert rule.interval(often)[0] == math.sqrt(2 * 0.5 * 200.0)
    outlier = History([record(step, stall=99.0 if step == 3 else 0.5, write=0.5) for step in range(1, 6)])
    assert rule.interval(outlier)[0] == rule.interval(History(cheap))[0]  # the median
    old = History([record(1, stall=99.0, write=99.0)] * 9 + [record(step, stall=0.5, write=0.5) for step in range(5)])
    assert rule.interval(old)[0] == rule.interval(History(cheap))[0]  # the last five


def test_adaptive_is_clamped_and_says_by_what() -> None:
    costly = History([record(9, stall=2.0, write=3.0)])
    assert Adaptive(max_overhead=0.001).interval(costly) == (2000.0, "at most 0.1% of the time for saves of 2 s")
    assert Adaptive(max_overhead=0.01).interval(History([record(9, stall=9.0, write=9.0)])) == (
        900.0,
        "at most 1.0% of the time for saves of 9 s",
    )
    slow = History([record(9, stall=0.0001, write=500.0)])
    assert Adaptive().interval(slow) == (500.0, "as long as a save takes")


@pytest.mark.parametrize("seconds", [-86400.0, -315359941.0, -math.inf, math.nan])
def test_adaptive_after_a_clock_that_was_set_back(seconds: float) -> None:
    """Attempts that ended before they began say how often it failed, and nothing of how long it worked."""
    rule, records = Adaptive(mtbf_seconds=3600.0), [record(10, stall=0.5, write=2.0)]
    found = rule.interval(History(records, failures=Failures(3, seconds)))
    assert found == rule.interval(History(records, failures=Failures(3, 0.0)))
    assert found[0] == pytest.approx(math.sqrt(2 * 0.5 * 3600 / 4))


@pytest.mark.parametrize("odd", [-1.0, math.nan, math.inf])
def test_adaptive_believes_no_cost_that_is_none(odd: float) -> None:
    rule, good = Adaptive(), [record(10, stall=0.5, write=2.0)]
    for records in ([*good, record(20, stall=odd, write=2.0)], [*good, record(20, stall=0.5, write=odd)]):
        assert rule.interval(History(records)) == rule.interval(History(good))


def test_adaptive_begins_by_learning_what_a_save_costs() -> None:
    assert Adaptive().reason(StepInfo(1), History()) == "adaptive: the first save, to learn what one costs"
    failed = History(tried_step=1, seconds_since=10.0)
    assert Adaptive().reason(StepInfo(2), failed) is None
    assert Adaptive().reason(StepInfo(900), History(tried_step=1, seconds_since=150.0)) is not None  # it is tried again


def test_unstable_saves_more_often_while_the_loss_is_unsteady() -> None:
    rule = Unstable(steps=100, min_steps=25, max_steps=400, spread=0.1, window=4)
    assert rule.interval([1.0, 1.0]) == (100, "too few losses to tell")
    assert rule.interval([0.9, 1.1, 0.9, 1.1]) == (100, "the loss varies by 0.1")
    assert rule.interval([0.8, 1.2, 0.8, 1.2])[0] == 50
    assert rule.interval([0.0, 9.0, 0.0, 9.0])[0] == 25
    assert rule.interval([0.95, 1.05, 0.95, 1.05])[0] == 200
    assert rule.interval([1.0] * 4)[0] == 400
    assert rule.interval([1.0, math.nan, 1.0, 1.0]) == (25, "the loss is not finite")
    assert rule.interval([9.0, 0.0, 9.0, 1.0, 1.0, 1.0, 1.0])[0] == 400  # only the last `window` count
    unsteady, calm = StepInfo(150, losses=[0.8, 1.2] * 2), StepInfo(150, losses=[1.0] * 4)
    assert rule.reason(unsteady, History([record(100)])) == "unstable: every 50 steps (the loss varies by 0.2)"
    assert rule.reason(calm, History([record(100)])) is None


def test_continuous_waits_only_for_the_clock() -> None:
    rule = Continuous(min_seconds=1.0)
    assert rule.reason(StepInfo(1), History())
    assert rule.reason(StepInfo(2), History([record(1)], tried_step=1, seconds_since=0.9)) is None
    assert rule.reason(StepInfo(2), History([record(1)], tried_step=1, seconds_since=1.0))
    assert rule.reason(StepInfo(1), History([record(1)], tried_step=1, seconds_since=9.0)) is None


def test_reasons_are_joined() -> None:
    rules: dict[str, SaveRule] = {"periodic": EverySteps(steps=3), "best": NewBest()}
    assert find_save_reason(rules, StepInfo(3, {"eval/loss": 1.0}), History()) == "every 3 steps; first eval/loss: 1"
    assert find_save_reason({}, StepInfo(3), History()) is None


def test_every_rule_is_tested_here() -> None:
    tested = {EverySteps, EverySeconds, EveryEpochs, FirstStep, NewBest, Adaptive, Unstable, Continuous, OnError}
    assert set(get_args(SaveRule)) == {*tested, ExternalSave}  # test_user_rules.py
    assert OnError().reason(StepInfo(5, {"eval/loss": 1.0}), History(seconds_since=1e9)) is None  # the loop asks for it


losses = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
all_rules: st.SearchStrategy[SaveRule] = st.one_of(
    st.builds(EverySteps, steps=st.integers(1, 9)),
    st.builds(EverySeconds, seconds=st.floats(0.1, 9.0)),
    st.builds(EveryEpochs, epochs=st.floats(0.1, 3.0)),
    st.just(FirstStep()),
    st.builds(NewBest, mode=st.sampled_from(["min", "max"]), min_improvement=st.floats(0.0, 1.0)),
    st.builds(Adaptive, mtbf_seconds=st.floats(1.0, 100.0), max_overhead=st.floats(0.01, 1.0)),
    st.builds(Unstable, steps=st.just(5), min_steps=st.integers(1, 5), max_steps=st.integers(5, 20)),
    st.builds(Continuous, min_seconds=st.floats(0.0, 3.0)),
    st.just(OnError()),
)


@given(st.lists(all_rules, max_size=4), st.lists(losses, min_size=1, max_size=40), st.data())
def test_any_strategy_on_any_metrics_gives_reasons_and_never_fails(
    rules: list[SaveRule], measured: list[float | None], data: st.DataObject
) -> None:
    """And it is a function: the same moment and history give the same answer."""
    saved: list[Record] = []
    tried = 0
    for step, loss in enumerate(measured, 1):
        metrics = {} if loss is None else {"eval/loss": loss}
        moment = StepInfo(step, metrics, epoch_steps=3.5, losses=[x for x in measured[:step] if x is not None])
        history = History(saved, tried, seconds_since=float(data.draw(st.integers(0, 20))))
        named = dict(zip("abcd", rules, strict=False))
        reason = find_save_reason(named, moment, history)
        assert find_save_reason(named, moment, history) == reason
        if reason:
            tried = step
            if data.draw(st.booleans()):  # or else it failed
                saved.append(Record(step, reason, metrics, 0.0, stall_seconds=0.1, write_seconds=0.2))


class Counted(list[Record]):
    """Records that count how many were looked at."""

    looks = 0

    def __reversed__(self) -> Iterator[Record]:
        for record in list.__reversed__(self):
            Counted.looks += 1
            yield record

    def __iter__(self) -> Iterator[Record]:
        Counted.looks += len(self)
        return list.__iter__(self)


def test_a_step_does_not_look_at_every_checkpoint_there_is() -> None:
    """Rules are asked after every step of a run that may keep thousands of checkpoints."""
    records = Counted(record(step, stall=0.1, write=0.1) for step in range(1, 5001))
    rules = {
        str(n): rule
        for n, rule in enumerate(
            [EverySteps(steps=9), EveryEpochs(), FirstStep(), Adaptive(), Unstable(), Continuous()]
        )
    }
    Counted.looks = 0
    find_save_reason(rules, StepInfo(5001, epoch_steps=7.0), History(records))
    assert 0 < Counted.looks < 50


@pytest.mark.parametrize("rule", [EverySteps(steps=4), EveryEpochs(epochs=0.5), FirstStep()])
def test_a_restart_changes_nothing(rule: SaveRule) -> None:
    """Rules hold no state: with the same records, a new process decides as the old one would have."""
    moments = [StepInfo(step, epoch_steps=6.0) for step in range(1, 25)]
    whole = saved_at(rule, moments)
    for cut in range(1, 24):
        before = [Record(step, "", {}, 0.0) for step in whole if step <= cut]
        after = [moment for moment in moments if moment.step > cut]
        first = next((m.step for m in after if rule.reason(m, History(before))), None)
        assert first == next((step for step in whole if step > cut), None)
