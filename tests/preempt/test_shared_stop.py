"""A request to stop among several processes: at once before training begins, and at an agreed boundary from then on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from runner import hosts
from runner.hosts.group import Group
from runner.hosts.link import Link
from runner.preempt.shared_stop import SharedStopFlag
from runner.preempt.stop import Stopped


class Wire(Group):
    """What one process says and hears; `word` is what process 0 says next, where this one does not lead."""

    links: tuple[Link, ...] = ()

    def __init__(self, index: int):
        super().__init__()
        self.index, self.count = index, 2
        self.word: Any = (None, None)
        self.said: list[Any] = []

    def agree(self, key: str, value: Any) -> Any:
        if self.index == 0:
            self.said.append((key, value))
            return value
        return self.word

    def gather(self, key: str, value: Any) -> list[Any] | None:
        raise AssertionError

    def ask_to_stop(self, reason: str, seconds: float | None) -> None:
        self.said.append(("ask to stop", reason, seconds))

    def ask_to_save(self, reason: str) -> None:
        self.said.append(("ask to save", reason))

    def tell_end(self, code: int) -> None:
        raise AssertionError


@pytest.fixture
def lead() -> Iterator[Wire]:
    wire = Wire(0)
    hosts.use_group(wire)
    yield wire
    hosts.use_group(hosts.Alone())


@pytest.fixture
def follower() -> Iterator[Wire]:
    wire = Wire(1)
    hosts.use_group(wire)
    yield wire
    hosts.use_group(hosts.Alone())


def make_flag() -> SharedStopFlag:
    flag = SharedStopFlag()
    flag.listen_to_others()
    return flag


def test_before_training_the_lead_stops_all_at_once(lead: Wire) -> None:
    flag = make_flag()
    flag.request_stop("SIGTERM", 30.0)
    assert flag.reason == "SIGTERM"
    assert lead.said == [("ask to stop", "SIGTERM", 30.0)]
    with pytest.raises(Stopped):
        flag.raise_if_stopped()


def test_while_training_the_lead_waits_for_a_boundary(lead: Wire) -> None:
    flag = make_flag()
    flag.begin_training()
    lead.said.clear()
    flag.request_stop("SIGTERM", 30.0)
    assert (flag.reason, flag.asked) == (None, "SIGTERM")
    assert lead.said == []
    assert flag.deadline is not None
    assert flag.deadline <= time.monotonic() + 30.0
    assert flag.agree_to_stop() == "SIGTERM"
    ((key, (why, seconds)),) = lead.said
    assert (key, why) == ("stop", "SIGTERM")
    assert 25.0 < seconds <= 30.0


def test_a_follower_asks_the_lead_and_goes_on_until_that_one_says_so(follower: Wire) -> None:
    flag = make_flag()
    flag.begin_training()
    flag.request_stop("SIGUSR1")
    assert flag.reason is None
    assert follower.said == [("ask to stop", "SIGUSR1", None)]
    assert flag.agree_to_stop() is None
    follower.word = ("SIGUSR1 at process 1 (n2)", 7.0)
    assert flag.agree_to_stop() == "SIGUSR1 at process 1 (n2)"
    # The time that process 0 has left is now this one's as well.
    assert flag.deadline is not None


def test_what_another_process_asks_for_is_heard(lead: Wire) -> None:
    flag = make_flag()
    flag.begin_training()
    lead.handlers.on_stop("notice at process 1", 12.0)
    lead.handlers.on_save("warning at process 1")
    assert flag.reason is None
    assert flag.pop_save_request() == "warning at process 1"
    assert flag.agree_to_stop() == "notice at process 1"


def test_a_follower_is_told_before_training(follower: Wire) -> None:
    flag = make_flag()
    follower.handlers.on_stop("SIGTERM at process 0", None)
    assert flag.reason == "SIGTERM at process 0"


def test_a_wish_to_save_goes_to_the_lead(follower: Wire) -> None:
    flag = make_flag()
    flag.request_save("rebalance recommendation")
    assert flag.pop_save_request() is None
    assert follower.said == [("ask to save", "rebalance recommendation")]


def test_a_request_before_training_stops_it_before_the_first_step(lead: Wire) -> None:
    flag = make_flag()
    flag.request_stop("SIGTERM")
    with pytest.raises(Stopped):
        flag.begin_training()
    assert lead.said[-1][0] == "stop"


def test_while_training_no_process_leaves_a_wait_alone(lead: Wire) -> None:
    flag, future = make_flag(), Future[int]()
    flag.request_stop("SIGTERM")
    with pytest.raises(Stopped):
        flag.wait_for(future)
    flag._trains = True
    future.set_result(7)
    assert flag.wait_for(future) == 7


def test_a_signal_before_the_others_are_there_stops_this_process() -> None:
    flag = SharedStopFlag()
    flag.request_stop("SIGTERM")
    assert flag.reason == "SIGTERM"
