"""The law: trouble of the machine condemns no checkpoint, and no run starts over because of it (machine_trouble.py).

The short form takes one call of each sort that a restart reads by, and what is no single call: a full device, limits
that are too small. The slow form, as `python -m tests.laws.faults`, takes 600, and those of a whole run.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

import pytest

from tests.laws.faults import Trouble, Window, missing
from tests.laws.machine_trouble import RESTART, Case, Laboratory, iter_cases, laboratory, list_machine_cases

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

NUM_SHORT, NUM_FULL = 6, 600
SHORT = ("device-full", "device-full-once", "files-8", "memory-250-MiB")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with laboratory(tmp_path_factory.mktemp("trouble"), RESTART) as lab:
        yield lab


@pytest.mark.parametrize(
    "case", [case for case in list_machine_cases() if case.name in SHORT], ids=lambda case: case.name
)
def test_a_machine_without_room_gives_nothing_up(lab: Laboratory, case: Case) -> None:
    assert lab.try_case(case) is None


def test_a_call_that_fails_while_it_restarts_gives_nothing_up(lab: Laboratory) -> None:
    calls = lab.list_calls()
    assert {call.kind for call in calls} == {"open", "read", "list", "look", "map"}
    # Its configuration is looked at before much else is there, in several places.
    looks = [call.number for call in calls if call.kind == "look" and call.path.endswith("/config.yaml")][:3]
    assert looks
    early = [Case(f"EIO at call {number}", number, Trouble(errno.EIO)) for number in looks]
    cases = [*early, *itertools.islice(iter_cases(calls, seed=0), NUM_SHORT)]
    assert [problem for case in cases if (problem := lab.try_case(case))] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in list_machine_cases() if case.name not in SHORT], ids=lambda case: case.name
)
def test_no_machine_without_room_gives_anything_up(lab: Laboratory, case: Case) -> None:
    assert lab.try_case(case) is None


@pytest.mark.slow
@pytest.mark.parametrize("window", [RESTART, Window()], ids=["restart", "whole"])
def test_no_call_that_fails_gives_anything_up(tmp_path_factory: pytest.TempPathFactory, window: Window) -> None:
    with laboratory(tmp_path_factory.mktemp("trouble-in-full"), window) as lab:
        cases = itertools.islice(iter_cases(lab.list_calls(), seed=1), NUM_FULL // 2)
        assert [problem for case in cases if (problem := lab.try_case(case))] == []
