"""WHICH: each rule as a pure function of records, and the law that holds whatever they say."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.checkpoint.record import Record, Score, find_best
from runner.checkpoint.retention import (
    DiskBudget,
    ExternalRetention,
    KeepAll,
    KeepBest,
    KeepEveryK,
    KeepInTime,
    KeepLast,
    KeepPinned,
    KeepSpaced,
    RetentionRule,
    max_kept,
    select_survivors,
)

SCORE = Score("eval/loss", "min")


def record(
    step: int,
    loss: float | None = None,
    *,
    pinned: bool = False,
    mark: str = "",
    num_bytes: int = 10,
    seconds: float = 0.0,
) -> Record:
    metrics = {} if loss is None else {"eval/loss": loss}
    return Record(step, "test", metrics, seconds, pinned, mark, num_bytes=num_bytes)  # type: ignore[arg-type]


def kept(rule: RetentionRule, records: list[Record]) -> list[int]:
    assert not isinstance(rule, DiskBudget)
    return sorted(rule.select(records))


def pruned_on_the_way(rules: dict[str, RetentionRule], every: int, until: int) -> list[int]:
    """What is left when retention is applied after each save."""
    there: list[Record] = []
    for step in range(every, until + 1, every):
        there.append(record(step))
        there = [r for r in there if r.step in select_survivors(rules, there, SCORE)]
    return [r.step for r in there]


def test_worsening_metric_and_nan_keep_the_newest_and_the_true_best() -> None:
    """Orbax's stock recipe (`best_fn` with `max_to_keep`) deletes the newest here, and the best at the first NaN."""
    records = [record(step, loss) for step, loss in enumerate([0.9, 0.5, 0.6, math.nan, 0.8, math.inf, 0.95], 1)]
    assert select_survivors({"last": KeepLast(n=1), "best": KeepBest(n=1)}, records, SCORE) == {
        2: "best, best 1 eval/loss",
        7: "newest, last 1",
    }


def test_milestones_stay_for_good_and_one_that_came_late_counts() -> None:
    assert pruned_on_the_way({"k": KeepEveryK(steps=1000)}, 50, 3300) == [1000, 2000, 3000, 3300]
    assert kept(KeepEveryK(steps=1000), [record(step) for step in (900, 1007, 1100, 2950, 3001)]) == [1007, 2950, 3001]


def test_spaced_is_dense_at_the_end_and_thin_at_the_beginning() -> None:
    assert pruned_on_the_way({"s": KeepSpaced(steps=100, n=2)}, 100, 6400) == [
        100,
        3200,
        4800,
        5600,
        6000,
        6200,
        6300,
        6400,
    ]
    assert (
        len(pruned_on_the_way({"s": KeepSpaced(steps=100, n=2)}, 100, 102400)) == 12
    )  # sixteen times as long, four more


def test_time_keeps_the_first_of_each_hour() -> None:
    records = [record(step, seconds=step * 600.0) for step in range(1, 25)]  # one each ten minutes, for four hours
    assert kept(KeepInTime(seconds=3600.0, n=24), records) == [1, 6, 12, 18, 24]
    assert kept(KeepInTime(seconds=3600.0, n=2), records) == [18, 24]


def test_a_clock_that_jumps_back_loses_nothing_that_the_law_keeps() -> None:
    records = [record(step, loss=1.0 / step, seconds=1e6 if step < 5 else 0.0) for step in range(1, 9)]
    assert 8 in select_survivors({"hourly": KeepInTime(seconds=3600.0, n=1)}, records, SCORE)


def test_a_clock_that_was_ahead_takes_no_place_for_good() -> None:
    """Hours that were saved in 2036 count as hours, and what comes after them, in 2026 again, as newer ones."""
    year = 10 * 365 * 86400.0
    times = [*range(3), *(year / 3600 + hour for hour in range(3, 6)), *range(6, 9)]
    records = [record(step, seconds=3600.0 * hour) for step, hour in enumerate(times, 1)]
    assert kept(KeepInTime(seconds=3600.0, n=4), records) == [6, 7, 8, 9]
    # And they age nothing: within an hour it is one, before as after.
    records += [record(10, seconds=3600.0 * 8 + 60), record(11, seconds=3600.0 * 8 + 120)]
    assert kept(KeepInTime(seconds=3600.0, n=4), records) == [6, 7, 8, 9]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 1e300, -1e300])
def test_a_time_that_is_none_is_a_time_of_its_own(odd: float) -> None:
    records = [record(1, seconds=0.0), record(2, seconds=odd), record(3, seconds=7200.0), record(4, seconds=7201.0)]
    assert kept(KeepInTime(seconds=3600.0, n=9), records) == [1, 2, 3]


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=12), st.integers(1, 5))
def test_pruning_by_a_clock_that_jumps_on_the_way_or_at_once(times: list[float], n: int) -> None:
    """What was kept is kept as long as it is among the newest n: to have pruned before changes nothing."""
    rule, here = KeepInTime(seconds=3600.0, n=n), []
    everything = [record(step, seconds=saved) for step, saved in enumerate(times, 1)]
    for each in everything:
        here = [old for old in [*here, each] if old.step in rule.select([*here, each])]
    assert sorted(rule.select(here)) == sorted(rule.select(everything))


def test_pinned_are_kept_and_nothing_else_is_asked_for() -> None:
    records = [record(1), record(2, pinned=True), record(3), record(4)]
    assert select_survivors({"p": KeepPinned()}, records, SCORE) == {2: "pinned, pinned", 4: "newest"}


def test_a_budget_drops_the_oldest_and_stops_at_the_law() -> None:
    records = [record(step, loss, num_bytes=10) for step, loss in enumerate([3.0, 0.5, 2.0, 1.0, 1.5], 1)]
    rules: dict[str, RetentionRule] = {"all": KeepAll(), "budget": DiskBudget(bytes=30)}
    assert list(select_survivors(rules, records, SCORE)) == [2, 4, 5]  # 1 and 3 go; 2 is the best
    assert list(select_survivors({**rules, "budget": DiskBudget(bytes=1)}, records, SCORE)) == [2, 5]
    assert list(select_survivors({**rules, "budget": DiskBudget(bytes=50)}, records, SCORE)) == [1, 2, 3, 4, 5]
    assert list(select_survivors({**rules, "again": DiskBudget(bytes=20)}, records, SCORE)) == [2, 5]  # the tighter one


def test_a_budget_is_written_as_people_write_it() -> None:
    written = {"20GB": 20e9, "1.5 TB": 1.5e12, "500MiB": 500 * 2**20, "20G": 20e9, "7": 7, 12: 12}
    assert {text: DiskBudget(bytes=text).limit for text in written} == written
    for wrong in ("GB", "20X", "lots", "-3GB", ""):
        with pytest.raises(ValueError, match="must be a number of bytes"):
            DiskBudget(bytes=wrong)


def test_what_an_error_left_is_nothing_to_resume_from() -> None:
    """The newest of them stays to be looked at; none is the newest, the best, or counted by a rule."""
    records = [record(1, 0.9), record(2, 0.1, mark="error"), record(3, 0.8), record(9, 0.0, mark="error")]
    assert select_survivors({"last": KeepLast(n=2)}, records, SCORE) == {
        1: "last 2",
        3: "newest, last 2",
        9: "the last that an error left",
    }
    assert find_best(records, SCORE) == records[2]


def test_how_many_stay_at_most() -> None:
    assert max_kept({"last": KeepLast(n=3), "best": KeepBest(n=2)}, 1000) == 5
    assert max_kept({"k": KeepEveryK(steps=100), "budget": DiskBudget(bytes=1)}, 1000) == 10
    assert max_kept({"all": KeepAll()}, 1000) is None
    assert max_kept({}, 1000) == 2


metrics = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
rows = st.tuples(metrics, st.booleans(), st.sampled_from(["", "", "", "error"]), st.integers(1, 100), st.floats(0, 1e6))
some_records = st.lists(rows, max_size=14).map(
    lambda drawn: [
        record(step * 7, loss, pinned=pinned, mark=mark, num_bytes=size, seconds=seconds)
        for step, (loss, pinned, mark, size, seconds) in enumerate(drawn, 1)
    ]
)
union_rules: st.SearchStrategy[RetentionRule] = st.one_of(
    st.builds(KeepLast, n=st.integers(1, 4)),
    st.builds(KeepBest, n=st.integers(1, 4), mode=st.sampled_from(["min", "max"])),
    st.builds(KeepEveryK, steps=st.integers(1, 40)),
    st.builds(KeepSpaced, steps=st.integers(1, 20), n=st.integers(2, 4)),
    st.builds(KeepInTime, seconds=st.floats(1.0, 1e5), n=st.integers(1, 4)),
    st.just(KeepPinned()),
    st.just(KeepAll()),
)
some_rules: st.SearchStrategy[dict[str, RetentionRule]] = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.one_of(union_rules, st.builds(DiskBudget, bytes=st.integers(1, 800))),
    max_size=4,
)


def test_every_rule_is_tested_here() -> None:
    assert set(get_args(RetentionRule)) == {
        KeepLast,
        KeepBest,
        KeepEveryK,
        KeepSpaced,
        KeepInTime,
        KeepPinned,
        KeepAll,
        DiskBudget,
        ExternalRetention,  # test_user_rules.py
    }


@given(some_records, some_rules)
def test_the_newest_the_best_and_the_pinned_survive_any_rules(
    records: list[Record], rules: dict[str, RetentionRule]
) -> None:
    stays = select_survivors(rules, records, SCORE)
    assert stays.keys() <= {r.step for r in records}
    assert {r.step for r in records if r.pinned} <= stays.keys()
    good = [r for r in records if not r.mark]
    if good:
        assert good[-1].step in stays
    finite = [(r.metrics["eval/loss"], -r.step) for r in good if math.isfinite(r.metrics.get("eval/loss", math.nan))]
    if finite:
        assert -min(finite)[1] in stays


@given(some_records, some_rules, st.randoms())
def test_retention_is_idempotent_and_looks_at_no_order(
    records: list[Record], rules: dict[str, RetentionRule], rng: random.Random
) -> None:
    stays = select_survivors(rules, records, SCORE)
    assert select_survivors(rules, [r for r in records if r.step in stays], SCORE).keys() == stays.keys()
    assert select_survivors(rules, rng.sample(records, len(records)), SCORE).keys() == stays.keys()


@given(some_records, st.dictionaries(st.text("abc", min_size=1, max_size=2), union_rules, max_size=3), union_rules)
def test_one_more_rule_keeps_more_and_a_budget_keeps_less(
    records: list[Record], rules: dict[str, RetentionRule], more: RetentionRule
) -> None:
    stays = select_survivors(rules, records, SCORE).keys()
    assert select_survivors({**rules, "more": more}, records, SCORE).keys() >= stays
    less = select_survivors({**rules, "budget": DiskBudget(bytes=100)}, records, SCORE).keys()
    assert less <= stays
    law = select_survivors({}, records, SCORE).keys()
    sizes = {r.step: r.num_bytes for r in records}
    assert sum(sizes[step] for step in less) <= 100 or less == law
    dropped, free = stays - less, less - law
    assert not dropped or not free or max(dropped) < min(free)  # oldest first


@given(st.lists(metrics, min_size=1, max_size=30), some_rules)
def test_pruning_after_every_save_never_loses_the_best_or_the_newest(
    measured: list[float | None], rules: dict[str, RetentionRule]
) -> None:
    there: list[Record] = []
    best = math.inf
    for step, loss in enumerate(measured, 1):
        there.append(record(step, loss))
        there = [r for r in there if r.step in select_survivors(rules, there, SCORE)]
        best = min(best, loss) if loss is not None and math.isfinite(loss) else best
        assert there[-1].step == step
        assert math.isinf(best) or best in [r.metrics.get("eval/loss") for r in there]
