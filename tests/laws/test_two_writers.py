"""The law: two processes never write one run, whatever becomes of the lock between them.

One process trains and is held after a step. Its lock is removed, its directory removed, moved, copied or put behind a
link, or the storage shares no locks; then the same command is typed a second time, and both are let go.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.laws.crash_states import Tree, read_tree
from tests.laws.endings import Ending, find_run, find_wrong_end, read_ending
from tests.laws.faults import TINY, Forks, compiled, forks, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

COMMAND = (*TINY, "retention.last.n=2")
FIRST_HELD, SECOND_HELD = 5, 8  # the steps after which each waits: there is a checkpoint of step 4 then
NO_LOCKS = {"FAULT_NO_FLOCK": "1"}
HOLD = """
import pathlib, time
from runner.rundir.attempt_log import AttemptLog
beat = AttemptLog.beat
def beaten(self, reached):
    beat(self, reached)
    if reached == {step}:
        pathlib.Path({here!r}).touch()
        while not pathlib.Path({go!r}).exists():
            time.sleep(0.005)
AttemptLog.beat = beaten
"""
# Leases that expire in seconds, and another boot of another machine.
SHORT_LEASE = """
import runner.rundir.lease as lease
lease.RENEW_SECONDS, lease.EXPIRED_SECONDS, lease.POLL_SECONDS = 0.2, 3.0, 0.1
"""
ELSEWHERE = f"{SHORT_LEASE}\nlease.read_machine = lambda: 'another-boot pid:[1]'\n"


@dataclass(frozen=True)
class Writer:
    """A process that works on the run, held after a step until it is let go."""

    room: Path
    name: str
    done: Future[CompletedProcess[str]]

    @property
    def is_held(self) -> bool:
        return (self.room / f"{self.name}.here").exists()

    def wait_until_held(self) -> bool:
        """Return whether it came to the step; not where it ended before."""
        while not self.is_held and not self.done.done():
            time.sleep(0.005)
        return self.is_held and not self.done.done()

    def let_go(self) -> CompletedProcess[str]:
        (self.room / f"{self.name}.go").touch()
        return self.done.result()


@dataclass(frozen=True)
class Bench:
    """Two processes to fork from, for each can only wait for one child at a time, and how an undisturbed run ends."""

    servers: tuple[Forks, Forks]
    threads: ThreadPoolExecutor
    ending: Ending


@dataclass(frozen=True)
class Race:
    """One working directory in which the command is typed twice."""

    bench: Bench
    room: Path

    @property
    def cwd(self) -> Path:
        return self.room / "work"

    @property
    def run(self) -> Path:
        return find_run(self.cwd)

    def start(self, name: str, *, planted: str = "", **environment: str) -> Writer:
        """Type the command, as the first or the second."""
        number, step = (0, FIRST_HELD) if name == "first" else (1, SECOND_HELD)
        hold = HOLD.format(step=step, here=str(self.room / f"{name}.here"), go=str(self.room / f"{name}.go"))
        server = self.bench.servers[number]
        done = self.bench.threads.submit(server.run, self.cwd, *COMMAND, planted=planted + hold, **environment)
        return Writer(self.room, name, done)

    def begin(self, *, planted: str = "", **environment: str) -> Writer:
        """Type the command for the first time, and wait until its process is held."""
        first = self.start("first", planted=planted, **environment)
        assert first.wait_until_held(), first.done.result().stdout
        return first

    def read_first_pid(self) -> int:
        return int(json.loads((self.run / ".lock").read_text())["pid"])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    room = tmp_path_factory.mktemp("two-writers")
    library, whole = compiled(room), room / "whole"
    whole.mkdir()
    with forks(library) as first, forks(library) as second, ThreadPoolExecutor(2) as threads:
        assert first.run(whole, *COMMAND).returncode == 0
        yield Bench((first, second), threads, read_ending(find_run(whole)))


@pytest.fixture
def race(bench: Bench, tmp_path: Path) -> Iterator[Race]:
    race = Race(bench, tmp_path)
    race.cwd.mkdir()
    yield race
    # Where a test has failed they would wait for ever.
    for name in ("first", "second"):
        (tmp_path / f"{name}.go").touch()


def _read_settled(cwd: Path) -> Tree:
    """Everything but the heartbeat, which no call writes, and the lease, whose time alone changes."""
    return {name: content for name, content in read_tree(cwd).items() if not name.endswith("/.pulse")}


def _assert_refused(done: CompletedProcess[str]) -> None:
    assert done.returncode == 3, done.stdout
    assert "Traceback" not in done.stdout
    assert sum(line.startswith("error: ") for line in done.stdout.splitlines()) == 1


def _assert_one_wrote(race: Race, first: Writer, second: Writer) -> None:
    """Let both go; assert that not both went on, that who lost wrote nothing more, and that the run is whole."""
    if second.wait_until_held():
        before = _read_settled(race.cwd)
        _assert_refused(first.let_go())
        assert _read_settled(race.cwd) == before
        done = second.let_go()
        assert done.returncode == 0, done.stdout
    else:
        _assert_refused(second.done.result())
        _assert_finished_or_refused(first.let_go())
    _assert_whole(race)


def _assert_finished_or_refused(done: CompletedProcess[str]) -> None:
    if done.returncode != 0:
        _assert_refused(done)


def _assert_whole(race: Race) -> None:
    again = race.bench.servers[0].run(race.cwd, *COMMAND)
    assert again.returncode == 0, again.stdout
    lines = [json.loads(line) for line in (race.run / "logs/metrics.jsonl").read_text().splitlines()]
    places = [(line["step"], line["split"]) for line in lines]
    assert len(places) == len(set(places))
    assert find_wrong_end(race.run, race.bench.ending) is None


def _remove_lock(run: Path, elsewhere: Path) -> None:
    (run / ".lock").unlink()


def _remove_lock_and_lease(run: Path, elsewhere: Path) -> None:
    (run / ".lock").unlink()
    (run / ".lease").unlink(missing_ok=True)


def _replace_lock(run: Path, elsewhere: Path) -> None:
    (run / ".other").write_bytes((run / ".lock").read_bytes())
    (run / ".other").rename(run / ".lock")


def _remove_run(run: Path, elsewhere: Path) -> None:
    shutil.rmtree(run)


def _move_run(run: Path, elsewhere: Path) -> None:
    run.rename(elsewhere)


def _copy_over(run: Path, elsewhere: Path) -> None:
    run.rename(elsewhere)
    shutil.copytree(elsewhere, run, symlinks=True)


def _move_root(run: Path, elsewhere: Path) -> None:
    run.parent.parent.rename(elsewhere)


def _slowly(break_it: Callable[[Path, Path], None]) -> Any:
    return pytest.param(break_it, marks=pytest.mark.slow)


BREAKS = [
    _remove_lock_and_lease,
    _remove_run,
    _copy_over,
    *(_slowly(break_it) for break_it in (_remove_lock, _replace_lock, _move_run, _move_root)),
]


@pytest.mark.parametrize("break_it", BREAKS)
def test_a_lock_that_is_gone_lets_nobody_write_beside(race: Race, break_it: Callable[[Path, Path], None]) -> None:
    first = race.begin()
    # To the same working directory: there it is seen whether something is written to what was moved.
    break_it(race.run, race.cwd / "elsewhere")
    _assert_one_wrote(race, first, race.start("second"))


@pytest.mark.slow
def test_a_run_behind_a_link_to_where_it_was_moved_is_still_one_run(race: Race) -> None:
    first, run, elsewhere = race.begin(), race.run, race.cwd / "elsewhere"
    run.rename(elsewhere)
    run.symlink_to(elsewhere)
    second = race.start("second")
    assert not second.wait_until_held()
    _assert_refused(second.done.result())
    _assert_finished_or_refused(first.let_go())
    run.unlink()
    elsewhere.rename(run)
    _assert_whole(race)


def test_storage_that_shares_no_locks_has_the_lease(race: Race) -> None:
    first, second = race.begin(**NO_LOCKS), race.start("second", **NO_LOCKS)
    assert not second.wait_until_held()
    _assert_refused(second.done.result())
    assert first.let_go().returncode == 0
    _assert_whole(race)


def test_another_machine_is_refused_while_the_lease_is_renewed(race: Race) -> None:
    first = race.begin(planted=SHORT_LEASE, **NO_LOCKS)
    second = race.start("second", planted=ELSEWHERE, **NO_LOCKS)
    assert not second.wait_until_held()
    _assert_refused(second.done.result())
    assert first.let_go().returncode == 0
    _assert_whole(race)


def test_another_machine_goes_on_where_the_lease_has_expired_and_who_wakes_up_has_lost_it(race: Race) -> None:
    first, pid = race.begin(planted=SHORT_LEASE, **NO_LOCKS), race.read_first_pid()
    os.kill(pid, signal.SIGSTOP)
    second = race.start("second", planted=ELSEWHERE, **NO_LOCKS)
    try:
        assert second.wait_until_held(), second.done.result().stdout
    finally:
        os.kill(pid, signal.SIGCONT)
    _assert_one_wrote(race, first, second)


@pytest.mark.slow
def test_another_machine_goes_on_after_a_kill(race: Race) -> None:
    first = race.begin(planted=SHORT_LEASE, **NO_LOCKS)
    os.kill(race.read_first_pid(), signal.SIGKILL)
    assert first.done.result().returncode == -signal.SIGKILL
    second = race.start("second", planted=ELSEWHERE, **NO_LOCKS)
    assert second.wait_until_held(), second.done.result().stdout
    assert second.let_go().returncode == 0
    _assert_whole(race)
