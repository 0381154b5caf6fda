"""Which process of several hangs, and for how long it may."""

from __future__ import annotations

import pytest

from runner.hosts.link import Sign
from runner.preempt.deadline import PATIENT_SECONDS, TICK_SECONDS, Silences, find_hanging


def watch(signs: dict[str, Sign], seconds: float, *, is_alone: bool = False) -> Silences:
    silences = Silences(is_alone=is_alone)
    for _ in range(round(seconds / TICK_SECONDS) + 2):
        silences.count_tick(dict(signs))
    return silences


def test_who_is_silent_for_too_long_hangs() -> None:
    signs = {"": Sign(5, "step"), "process 1": Sign(5, "data")}
    assert watch(signs, 3.0).are_too_long(3.0)
    assert not watch(signs, 2.0).are_too_long(3.0)


def test_a_sign_begins_the_time_anew() -> None:
    silences = watch({"": Sign(5, "step")}, 3.0)
    silences.count_tick({"": Sign(6, "step")})
    assert not silences.are_too_long(1.0)


def test_one_that_compiles_keeps_the_others_waiting() -> None:
    signs = {"": Sign(0, "restore"), "process 1": Sign(0, "compile")}
    assert not watch(signs, 50.0).are_too_long(3.0)
    assert not watch({"": Sign(0, "compile")}, 50.0, is_alone=True).are_too_long(3.0)


def test_one_of_several_does_not_compile_for_ever() -> None:
    silences = watch({"": Sign(0, "compile"), "process 1": Sign(0, "compile")}, 1.0)
    silences._ticks = dict.fromkeys(silences._ticks, round(PATIENT_SECONDS / TICK_SECONDS) + 1)
    assert silences.are_too_long(3.0)


@pytest.mark.parametrize(
    ("signs", "hangs"),
    [
        ({"": Sign(9, "step"), "1": Sign(9, "data"), "2": Sign(9, "step")}, "1"),
        ({"": Sign(9, "step"), "1": Sign(9, "step"), "2": Sign(7, "step")}, "2"),
        ({"": Sign(9, "data"), "1": Sign(9, "step")}, ""),
        ({"": Sign(9, "step"), "1": Sign(9, "step")}, ""),
    ],
)
def test_the_others_wait_for_the_one_that_is_behind(signs: dict[str, Sign], hangs: str) -> None:
    assert find_hanging(signs) == hangs
