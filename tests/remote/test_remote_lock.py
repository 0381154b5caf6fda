"""One writer: whoever takes the lock of a run has it alone, and whoever has lost it stops before it does harm."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from obstore.store import LocalStore, MemoryStore

from runner.errors import ConfigError, HoldfastError, LostRunError, RefusedError
from runner.remote import remote_lock
from runner.remote.objects import FolderObjects, Objects, OtherObjectError
from runner.remote.options import Remote
from runner.remote.remote_lock import LOCK, new_token, read_lock, take_lock
from runner.rundir.lease import Owner, identify_process, read_machine
from tests.buckets import BUCKET, Server, serve_bucket

FAST = Remote(url="s3://test", renew_seconds=0.05, lost_seconds=0.3)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve_bucket() as server:
        yield server


@pytest.fixture(params=["memory", "folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Objects:
    """Each kind of store that a run may live in, empty."""
    if request.param == "memory":
        return Objects(MemoryStore(), "s3://test")
    if request.param == "folder":
        return FolderObjects(LocalStore(tmp_path), tmp_path.as_uri(), tmp_path)
    server: Server = request.getfixturevalue("server")
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    from runner.remote.objects import open_objects

    url = f"s3://{BUCKET}/{new_token()}"
    return open_objects(Remote(url=url, endpoint=server.endpoint), url)


def on_another_machine(token: str) -> Owner:
    return Owner(token, 7, 7, "elsewhere", "another boot")


def take(objects: Objects, token: str = "", remote: Remote = FAST) -> Any:
    found = None
    with suppress(remote_lock.NoSuchObjectError):
        found = read_lock(objects)
    return take_lock(objects, remote, found, token or new_token(), print, lambda: None)


def test_of_many_who_begin_at_once_one_has_it(objects: Objects) -> None:
    barrier = threading.Barrier(8)

    def begin(number: int) -> str | None:
        barrier.wait()
        try:
            return take_lock(objects, FAST, None, f"token {number}", print, lambda: None).token
        except RefusedError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [token for token in pool.map(begin, range(8)) if token]
    assert len(winners) == 1
    assert read_lock(objects).token == winners[0]


def test_of_many_who_take_over_one_has_it(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty times: the holder has gone, and several machines come for its run at the same moment."""
    monkeypatch.setattr(remote_lock, "identify_process", on_another_machine)
    quick = replace(FAST, renew_seconds=0.001, lost_seconds=0.003)
    take(objects, "first")
    for race in range(50):
        found, barrier = read_lock(objects), threading.Barrier(4)

        def begin(number: int, found: Any = found, barrier: Any = barrier, race: int = race) -> str | None:
            barrier.wait()
            try:
                return take_lock(objects, quick, found, f"race {race} {number}", lambda line: None, lambda: None).token
            except RefusedError:
                return None

        with ThreadPoolExecutor(4) as pool:
            winners = [token for token in pool.map(begin, range(4)) if token]
        assert len(winners) == 1, race
        assert read_lock(objects).token == winners[0]
        assert read_lock(objects).hold.previous == found.token  # type: ignore[union-attr]


def test_a_live_holder_is_not_disturbed(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(remote_lock, "identify_process", on_another_machine)
        lock = take(objects)
    with lock.keep(), pytest.raises(RefusedError, match="in use by pid 7 on host elsewhere"):
        take(objects, remote=replace(FAST, lost_seconds=30.0))


def test_a_holder_that_has_gone_is_waited_for_and_then_followed(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(remote_lock, "identify_process", on_another_machine)
        take(objects, "gone")
    began = time.monotonic()
    lock = take(objects)
    assert time.monotonic() - began >= FAST.lost_seconds
    assert "waiting up to" in capsys.readouterr().out
    assert lock.previous == "gone"


def test_nobody_waits_for_one_that_gave_it_back_or_has_ended_here(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    with take(objects, "first").keep():
        pass
    slow = replace(FAST, renew_seconds=30.0, lost_seconds=600.0)
    ended = Owner("second", 1 << 40, 1, "here", read_machine())
    with monkeypatch.context() as before:
        before.setattr(remote_lock, "identify_process", lambda token: ended)
        take(objects, "second", slow)
    assert take(objects, "third", slow).previous == "second"


def test_a_holder_that_slept_too_long_finds_out_before_it_does_harm(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(remote_lock, "identify_process", on_another_machine)
        sleeper = take(objects, "sleeper")
    take(objects, "next")
    with pytest.raises(LostRunError, match="has taken it over"):
        sleeper.prove()
    with pytest.raises(LostRunError):
        sleeper.renew()
    with pytest.raises(LostRunError):
        sleeper.check()
    # Nor does it give back what is not its own.
    with sleeper.keep():
        pass
    assert read_lock(objects).token == "next"
    assert read_lock(objects).hold.held  # type: ignore[union-attr]


def test_a_removed_lock_is_a_lost_run(objects: Objects) -> None:
    lock = take(objects)
    objects.delete([LOCK])
    with pytest.raises(LostRunError, match="removed"):
        lock.prove()


def test_an_answer_that_was_lost_is_no_lost_run(objects: Objects) -> None:
    """The store has done what it was asked, and the holder does not know: its own content is there."""
    lock = take(objects, "mine")
    found = read_lock(objects)
    assert found.hold is not None
    objects.swap(LOCK, replace(found.hold, beat=7).encode(), found.tag)
    lock.renew()
    lock.prove()
    lock.check()


def test_content_that_names_nobody_belongs_to_nobody(objects: Objects) -> None:
    for content in (b"", b"{", b"[]", b'{"token": 3}', b"\xff" * 99):
        objects.write(LOCK, content)
        take(objects)


@pytest.mark.parametrize("clock", [-3600.0, 3600.0])
def test_clocks_count_for_nothing(objects: Objects, monkeypatch: pytest.MonkeyPatch, clock: float) -> None:
    real = time.time
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(remote_lock, "identify_process", on_another_machine)
        lock = take(objects)
        elsewhere.setattr(time, "time", lambda: real() + clock)
        with lock.keep(), pytest.raises(RefusedError, match="in use"):
            take(objects, remote=replace(FAST, lost_seconds=30.0))


class Obliging(Objects):
    """A store that writes whatever comes, whether or not it was to compare first."""

    def create(self, key: str, content: bytes) -> Any:
        self.write(key, content)
        return self.read_with_tag(key)[1]

    def swap(self, key: str, content: bytes, expected: Any) -> Any:
        return self.create(key, content)


class Incapable(Objects):
    """A store that cannot compare."""

    def swap(self, key: str, content: bytes, expected: Any) -> Any:
        raise OtherObjectError(key)


def test_a_store_that_is_set_up_without_comparing_is_refused(tmp_path: Path) -> None:
    """As the client says it, which for S3 can be switched off by a variable."""
    with pytest.raises(ConfigError, match=r"cannot compare before it writes.*remote\.lock=off"):
        take(Objects(LocalStore(tmp_path), "s3://test"))


@pytest.mark.parametrize("kind", [Obliging, Incapable])
def test_a_store_that_does_not_compare_is_refused(kind: type[Objects]) -> None:
    store = MemoryStore()
    with pytest.raises(ConfigError, match=r"remote\.lock=off"):
        take(kind(store, "s3://test"))
    assert Objects(store, "s3://test").list_sizes() == {}


def test_a_process_names_itself() -> None:
    owner = identify_process("mine")
    assert owner.is_alive_here()
    assert not owner.has_ended_here()
    assert not isinstance(HoldfastError(""), RefusedError)
