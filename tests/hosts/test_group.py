"""Processes of a run that talk: what they agree on, who is missing, who has gone. As threads, over real connections."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from runner import hosts
from runner.errors import ConfigError, LostProcessError, RefusedError
from runner.hosts import group as group_module
from runner.hosts.early_end import EarlyEnd, tell_early_end
from runner.hosts.group import Alone, Follower, Lead, Several, join_lead
from runner.hosts.link import Sign
from runner.hosts.options import AutoHosts, Place
from tests.ranks import find_free_port

FACTS = {"configuration": "12345678", "jax": "0.10.2"}
HANG_SECONDS = 60


def join(place: Place, facts: dict[str, str] = FACTS, patience: AutoHosts | None = None) -> Follower | int:
    return join_lead(place, patience or AutoHosts(join_seconds=HANG_SECONDS), facts, lambda: None)


class World:
    """Process 0 of several, and the others as they come."""

    def __init__(self, count: int, patience: AutoHosts | None = None):
        self.patience = patience or AutoHosts(join_seconds=HANG_SECONDS)
        self.port, self.count = find_free_port(), count
        self.lead = Lead(self.place(0), self.patience, FACTS)
        self.others: list[Follower] = []

    def place(self, index: int) -> Place:
        return Place("127.0.0.1", self.port, self.count, index)

    def add(self, index: int) -> Follower:
        other = join(self.place(index), patience=self.patience)
        assert isinstance(other, Follower)
        self.others.append(other)
        return other

    def add_all(self) -> list[Several]:
        for index in range(1, self.count):
            self.add(index)
        self.wait()
        return [self.lead, *self.others]

    def wait(self, said: list[str] | None = None) -> None:
        self.lead.wait_for_all((said if said is not None else []).append, lambda: None)

    def close(self) -> None:
        self.lead.tell_end(0)
        for other in self.others:
            other._is_over.set()
            for link in other.links:
                link.close()
        self.lead._listener.close()


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(*arguments: Any) -> World:
        worlds.append(World(*arguments))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def in_each(groups: list[Several], work: Callable[[Several], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(work, groups))


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_process_leads_agrees_and_waits_for_nobody() -> None:
    assert hosts.is_lead()
    assert hosts.is_alone()
    assert hosts.agree("key", {"step": 3}) == {"step": 3}
    assert hosts.gather("key", 3) == [3]
    assert hosts.is_true_for_all("key", True)
    assert not hosts.is_true_for_all("key", False)
    hosts.barrier("key")
    assert isinstance(hosts.current_group(), Alone)


def test_all_have_the_word_of_process_0(make_world: Callable[..., World]) -> None:
    groups = make_world(3).add_all()
    assert in_each(groups, lambda one: one.agree("step", one.index + 7)) == [7, 7, 7]
    assert in_each(groups, lambda one: one.gather("found", one.index * 10)) == [[0, 10, 20], None, None]


def test_words_of_one_key_come_in_order_and_keys_do_not_mix(make_world: Callable[..., World]) -> None:
    groups = make_world(3).add_all()

    def talk(one: Several) -> list[int]:
        other = threading.Thread(target=lambda: [one.agree("b", -number) for number in range(300)])
        other.start()
        found = [one.agree("a", number if one.index == 0 else None) for number in range(300)]
        other.join()
        return found

    assert in_each(groups, talk) == [list(range(300))] * 3


def test_who_comes_later_hears_what_was_said_before(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    world.lead.agree("begin", {"run": "here"})
    world.lead.agree("threads", 8)
    other = world.add(1)
    assert other.agree("threads", None) == 8
    assert other.agree("begin", None) == {"run": "here"}


def test_who_is_missing_is_named(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "GREETING_SECONDS", 0.1)
    world, said = make_world(4, AutoHosts(join_seconds=0.5)), list[str]()
    world.add(2)
    with pytest.raises(LostProcessError, match=r"processes 1, 3 of 4 did not come within 0.5 s"):
        world.wait(said)
    assert said == ["waiting for processes 1, 3 of 4"]


def test_process_0_that_is_not_there_is_told_by_the_others() -> None:
    place = Place("127.0.0.1", find_free_port(), 2, 1)
    with pytest.raises(LostProcessError, match=r"process 1 of 2 did not reach process 0 at 127.0.0.1:\d+ within 0.3 s"):
        join(place, patience=AutoHosts(join_seconds=0.3))


def test_process_0_may_start_last(make_world: Callable[..., World]) -> None:
    port = find_free_port()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(join, Place("127.0.0.1", port, 2, 1))
        time.sleep(0.3)
        lead = Lead(Place("127.0.0.1", port, 2, 0), AutoHosts(), FACTS)
        other = coming.result()
    assert isinstance(other, Follower)
    lead.tell_end(0)


@pytest.mark.parametrize(
    ("index", "facts", "said"),
    [
        (1, {**FACTS, "configuration": "87654321"}, "has another configuration: 87654321; here it is 12345678"),
        (1, {**FACTS, "jax": "0.10.1"}, "has another jax: 0.10.1; here it is 0.10.2"),
        (1, {}, "has another configuration: None"),
    ],
)
def test_another_configuration_is_refused_by_both(
    index: int, facts: dict[str, str], said: str, make_world: Callable[..., World]
) -> None:
    world = make_world(2)
    assert join(world.place(index), facts) == ConfigError.exit_code
    with pytest.raises(ConfigError, match=said):
        world.wait()


def test_two_of_one_index_are_refused(make_world: Callable[..., World]) -> None:
    world = make_world(3)
    world.add(1)
    assert join(world.place(1)) == ConfigError.exit_code
    with pytest.raises(ConfigError, match="came twice"):
        world.wait()


def test_another_count_is_refused(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    assert join(Place("127.0.0.1", world.port, 3, 1)) == ConfigError.exit_code
    with pytest.raises(ConfigError, match="says it is 1 of 3; here are 2"):
        world.wait()


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b'{"index": 1}\n', b"[]\n", b""])
def test_a_stranger_does_no_harm(junk: bytes, make_world: Callable[..., World]) -> None:
    world = make_world(2)
    with socket.create_connection(("127.0.0.1", world.port)) as stranger:
        # Reset, where not all of it was read.
        with suppress(OSError):
            stranger.sendall(junk)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(100) == b""
    world.add_all()
    assert world.lead.agree("still", 1) == world.others[0].agree("still", None) == 1


def test_a_process_that_dies_is_named_at_once_and_with_what_it_did(make_world: Callable[..., World]) -> None:
    world = make_world(3)
    world.add_all()
    lost: list[tuple[int, str]] = []
    world.lead.handlers.on_lost = lambda link, how: lost.append((link.index, how))
    world.others[1].read_own_sign = lambda: Sign(412, "data", "", 1.0)
    wait_until(lambda: world.lead.links[1].sign.step == 412)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(world.lead.gather, "never", 0)
        # As the kernel does when a process ends.
        world.others[1].links[0].close()
        with pytest.raises(
            LostProcessError, match=r"process 2 .* is gone \(its connection is closed\).*after step 412"
        ):
            waiting.result(HANG_SECONDS)
    assert lost == [(2, "its connection is closed")]
    assert "in data" in str(world.lead.find_lost())


def test_when_process_0_dies_the_others_know(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    world.add_all()
    lost: list[int] = []
    world.others[0].handlers.on_lost = lambda link, how: lost.append(link.index)
    world.lead.links[0].close()
    with pytest.raises(LostProcessError, match="process 0"):
        world.others[0].agree("never", None)
    wait_until(lambda: lost == [0])


def test_a_process_that_says_nothing_counts_as_gone(make_world: Callable[..., World]) -> None:
    """Its connection stays: it was suspended, or its machine has lost its network."""
    world = make_world(2, AutoHosts(lost_seconds=2.0))
    with socket.create_connection(("127.0.0.1", world.port)) as silent:
        hello = {"index": 1, "count": 2, "host": "n2", "pid": 4711, **FACTS}
        silent.sendall(json.dumps(hello).encode() + b"\n")
        world.wait()
        with pytest.raises(LostProcessError, match=r"process 1 \(n2, pid 4711\) is gone \(not a word for 2 s\)"):
            world.lead.gather("never", 0)


def test_a_process_that_reads_nothing_keeps_nobody_waiting(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    with socket.create_connection(("127.0.0.1", world.port)) as silent:
        silent.sendall(json.dumps({"index": 1, "count": 2, "host": "n2", "pid": 1, **FACTS}).encode() + b"\n")
        world.wait()
        # Far more than a connection takes: were one of them waited for, this would never end.
        for number in range(2000):
            world.lead.agree("much", [number] * 1000)
        received = b""
        while received.count(b"\n") < 2001:
            received += silent.recv(1 << 20)
    words = [json.loads(line) for line in received.splitlines()]
    said = [word["value"][0] for word in words if word.get("say") == "much"]
    assert said == list(range(len(said)))


def test_all_end_as_process_0_says_and_it_ends_last(make_world: Callable[..., World]) -> None:
    world, ended = make_world(3), list[int]()
    world.add_all()
    for other in world.others:
        leave = other.links[0].close
        other.handlers.on_end = lambda code, leave=leave: (time.sleep(0.2), ended.append(code), leave())
    world.lead.end_others(75)
    assert ended == [75, 75]
    assert world.lead.links == ()


def test_who_comes_when_it_is_over_hears_how_it_ended(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(world.lead.end_others, 3)
        assert join(world.place(1)) == 3
        ending.result(HANG_SECONDS)


def test_a_failure_reaches_process_0(make_world: Callable[..., World]) -> None:
    world, heard = make_world(2), list[Any]()
    world.add_all()
    world.lead.handlers.on_failed = lambda link, code, line: heard.append((link.index, code, line))
    world.others[0].tell_failure(2, "data.path: it is not here")
    wait_until(lambda: heard == [(1, 2, "data.path: it is not here")])


def test_stacks_of_the_others_are_told(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    world.add_all()
    ((name, stacks),) = world.lead.collect_stacks(HANG_SECONDS).items()
    assert name.startswith("process 1 (")
    assert "test_stacks_of_the_others_are_told" in stacks


def test_an_end_that_comes_before_anybody_listens_is_kept(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    other = world.add(1)
    world.lead.tell_end(3)
    wait_until(lambda: other.ended == 3)


def test_who_goes_while_others_are_waited_for_is_told_at_once(make_world: Callable[..., World]) -> None:
    world = make_world(3)
    world.add(1).links[0].close()
    with pytest.raises(LostProcessError, match=r"process 1 .* is gone"):
        world.wait()


def test_one_that_ended_before_it_came_is_waited_for_by_nobody(make_world: Callable[..., World]) -> None:
    world = make_world(3)
    world.add(2)
    assert tell_early_end("127.0.0.1", world.port, EarlyEnd(1, 3, "error: in use"))
    with pytest.raises(RefusedError, match=r"^process 1: in use$"):
        world.wait()
    # Also later, and whoever it is.
    with pytest.raises(RefusedError):
        world.lead.raise_if_lost()
    began = time.monotonic()
    world.others[0].links[0].close()
    world.lead.end_others(3)
    assert time.monotonic() - began < group_module.FAREWELL_SECONDS / 2


def test_of_one_that_has_joined_its_connection_tells(make_world: Callable[..., World]) -> None:
    world = make_world(2)
    groups = world.add_all()
    assert tell_early_end("127.0.0.1", world.port, EarlyEnd(1, -9))
    world.lead.raise_if_lost()
    assert in_each(groups, lambda one: one.agree("step", 7)) == [7, 7]
    # Where nobody listens, and where nobody of that number is expected.
    assert not tell_early_end("127.0.0.1", world.port, EarlyEnd(2, -9))
    assert not tell_early_end("127.0.0.1", find_free_port(), EarlyEnd(1, -9))


def test_one_that_was_asked_to_stop_before_it_came_has_all_stopped(make_world: Callable[..., World]) -> None:
    world, asked = make_world(2), list[str]()
    world.lead.handlers.on_stop = lambda reason, seconds: asked.append(reason)
    world.lead.handlers.on_early_end = lambda error: asked.append(str(error))
    assert tell_early_end("127.0.0.1", world.port, EarlyEnd(1, 75))

    def raise_if_stopped() -> None:
        raise KeyError(asked)

    with pytest.raises(KeyError, match="a signal to process 1"):
        world.lead.wait_for_all(asked.append, raise_if_stopped)
    assert asked == ["a signal to process 1"]
