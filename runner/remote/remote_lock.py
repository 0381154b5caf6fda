"""Hold a run in a bucket for one process: the object LOCK, which its holder replaces every few seconds.

Each replacement says which content it expects to find: of two processes that try, one succeeds. No clock of any machine
is compared with another's. Whoever waits for a lock looks whether it changes, and one that has not changed for
`lost_seconds` belongs to nobody. A holder that was asleep for longer finds another content there when it wakes up. So
it looks once more before what cannot be taken back: before a checkpoint gets its seal, and before anything is deleted.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from runner.errors import ConfigError, LostRunError, RefusedError
from runner.files import parse_json
from runner.remote.objects import (
    CannotCompareError,
    NoSuchObjectError,
    Objects,
    OtherObjectError,
    RemoteError,
    Tag,
)
from runner.remote.options import Remote
from runner.rundir.lease import Owner, identify_process
from runner.rundir.side_files import is_count
from runner.values import Say

LOCK = "LOCK"
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Hold:
    """Say who has a run: the content of LOCK.

    Attributes:
        owner: the process; its token is of this hold alone.
        previous: the token of the hold before it; empty for the first.
        beat: how often it was renewed, so that no two contents are equal.
        held: false once it was given back; the token stays, for it tells who has worked on the run last.
    """

    owner: Owner
    previous: str = ""
    beat: int = 0
    held: bool = True

    def encode(self) -> bytes:
        """Return the content of the object."""
        rest = {"previous": self.previous, "beat": self.beat, "held": self.held}
        return json.dumps({**asdict(self.owner), **rest}).encode()


@dataclass(frozen=True)
class Found:
    """Hold what lies under LOCK: the hold, None where its bytes name nobody, and the tag of that content."""

    hold: Hold | None
    tag: Tag

    @property
    def token(self) -> str:
        """Return the token of the hold; empty where the bytes name nobody."""
        return "" if self.hold is None else self.hold.owner.token


class RemoteLock:
    """The hold of this process on a run in a bucket. `keep` renews it while a context lasts, and gives it back.

    Attributes:
        taken_by: who has the run now, once that was seen; else None.
        has_worked: something of the run was changed under this hold. A hold that has only looked, because a command was
            refused, is given back under the token of the one before: nobody has worked on the run since.
    """

    has_worked = False

    def __init__(self, objects: Objects, hold: Hold, tag: Tag, renew_seconds: float):
        self._objects, self._hold, self._tag, self._renew_seconds = objects, hold, tag, renew_seconds
        # The thread that renews changes the tag, with which others compare.
        self._using = threading.Lock()
        self.taken_by: str | None = None

    @property
    def token(self) -> str:
        """Return what tells this hold from all others."""
        return self._hold.owner.token

    @property
    def previous(self) -> str:
        """Return the token of the hold before this one; empty for the first."""
        return self._hold.previous

    def check(self) -> None:
        """Raise LostRunError where it is known that somebody else has the run now. Asks nobody."""
        if self.taken_by is not None:
            raise LostRunError(
                f"{self._objects.url}: the run was taken from this process: {self.taken_by} has taken it over; nothing "
                "more is written; the same command goes on from what is durable"
            )

    def prove(self) -> None:
        """Raise LostRunError where somebody else has the run now, after a look. Raises RemoteError as well."""
        with self._using:
            self.check()
            try:
                found = read_lock(self._objects)
            except NoSuchObjectError:
                self.taken_by = "whoever has removed its LOCK"
            else:
                # A renewal whose answer was lost has changed the tag, and not the owner.
                if found.hold is None or found.hold.owner.token != self.token:
                    self.taken_by = "another process" if found.hold is None else str(found.hold.owner)
                self._tag = found.tag
            self.check()

    def renew(self) -> None:
        """Say that the holder is still there. Raises LostRunError, RemoteError."""
        with self._using:
            self._replace(replace(self._hold, beat=self._hold.beat + 1))

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Renew the lock from a thread of its own while the context lasts; then give it back."""
        done = threading.Event()
        thread = threading.Thread(target=self._renew_again, args=(done,), name="remote-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            # Where the store does not answer, the thread ends with the process.
            thread.join(POLL_SECONDS)
            if self._using.acquire(timeout=POLL_SECONDS):
                # What cannot be given back is free when it has not changed for long enough.
                with suppress(LostRunError, RemoteError):
                    owner = self._hold.owner
                    if not self.has_worked and self.previous:
                        owner = replace(owner, token=self.previous)
                    self._replace(replace(self._hold, owner=owner, beat=self._hold.beat + 1, held=False))
                self._using.release()

    def _renew_again(self, done: threading.Event) -> None:
        while not done.wait(self._renew_seconds):
            # Trouble says nothing about who has the run; what was lost is found by `check`.
            with suppress(RemoteError, LostRunError):
                self.renew()

    def _replace(self, hold: Hold) -> None:
        self.check()
        try:
            self._tag = self._objects.swap(LOCK, hold.encode(), self._tag)
        except OtherObjectError:
            # Perhaps by this very process: the answer to a request may be lost after it was done.
            found = _read_or_none(self._objects)
            if found is None or found.hold is None or found.hold.owner.token != self.token:
                owner = None if found is None or found.hold is None else found.hold.owner
                self.taken_by = str(owner or "another process")
                self.check()
            assert found is not None
            self._tag = found.tag
        self._hold = hold


def read_lock(objects: Objects) -> Found:
    """Return what lies under LOCK. Raises NoSuchObjectError, RemoteError."""
    content, tag = objects.read_with_tag(LOCK)
    return Found(_parse_hold(content), tag)


def take_lock(
    objects: Objects, remote: Remote, found: Found | None, token: str, say: Say, raise_if_stopped: Callable[[], None]
) -> RemoteLock:
    """Take the lock of a run; wait where its holder is another machine and may still be at work.

    Args:
        objects: the run's.
        remote: how long to wait.
        found: what lies under LOCK now; None where nothing does.
        token: of the new hold.
        say: tells a person why it waits.
        raise_if_stopped: raises where a stop is asked for meanwhile.

    Raises:
        RefusedError: another process has the run.
        ConfigError: the store cannot compare before it writes.
        RemoteError: the store is in trouble.
    """
    hold = Hold(identify_process(token))
    if found is None:
        # Once in the life of a run, before its first lock: a store may say yes to whatever it is asked.
        probe_store(objects)
        try:
            return RemoteLock(objects, hold, objects.create(LOCK, hold.encode()), remote.renew_seconds)
        except OtherObjectError:
            # A moment later than somebody else; or it was this process, and the answer was lost.
            found = read_lock(objects)
            if found.hold is not None and found.hold.owner.token == token:
                return RemoteLock(objects, hold, found.tag, remote.renew_seconds)
    if found.hold is not None and found.hold.held:
        found = _wait_until_free(objects, remote, found, say, raise_if_stopped)
    hold = replace(hold, previous=found.token)
    try:
        tag = objects.swap(LOCK, hold.encode(), found.tag)
    except OtherObjectError:
        again = read_lock(objects)
        if again.hold is None or again.hold.owner.token != token:
            raise _refuse(objects, again.hold) from None
        tag = again.tag
    return RemoteLock(objects, hold, tag, remote.renew_seconds)


def _wait_until_free(
    objects: Objects, remote: Remote, found: Found, say: Say, raise_if_stopped: Callable[[], None]
) -> Found:
    """Return what lies under LOCK once its holder is gone. Raises RefusedError where it is not."""
    hold = found.hold
    assert hold is not None
    if hold.owner.is_alive_here():
        raise _refuse(objects, hold)
    # A process of this machine that has ended will not renew it.
    if hold.owner.has_ended_here():
        return found
    say(
        f"{objects.url}: was held by {hold.owner} until a moment ago; waiting up to {remote.lost_seconds:.0f} s to be "
        "sure it is gone"
    )
    began = time.monotonic()
    next_look = began
    while time.monotonic() - began < remote.lost_seconds:
        raise_if_stopped()
        time.sleep(min(POLL_SECONDS, remote.renew_seconds / 4))
        # Each look is a request: a few in the time in which a live holder renews it once.
        if time.monotonic() < next_look:
            continue
        next_look = time.monotonic() + remote.renew_seconds / 4
        again = read_lock(objects)
        if again.hold is None or not again.hold.held:
            return again
        if again.tag != found.tag:
            raise _refuse(objects, again.hold)
    return found


def probe_store(objects: Objects) -> None:
    """Raise ConfigError where a store does not compare before it writes, so that two could hold one run."""
    key = f"{LOCK}.probe-{secrets.token_hex(4)}"
    try:
        try:
            tag = objects.create(key, b"1")
            for attempt in (lambda: objects.create(key, b"2"), lambda: objects.swap(key, b"3", _spoil(tag))):
                try:
                    attempt()
                except OtherObjectError:
                    continue
                raise _refuse_store(objects, "writes without the comparison it was asked for")
            objects.swap(key, b"4", tag)
        except OtherObjectError:
            raise _refuse_store(objects, "finds no object to be what it was") from None
        except CannotCompareError:
            raise _refuse_store(objects, "cannot compare before it writes") from None
    finally:
        with suppress(RemoteError):
            objects.delete([key])


def _spoil(tag: Tag) -> Tag:
    """Return a tag of the same form that no content has."""
    version = None if tag.version is None else ("1" if tag.version != "1" else "2")
    return Tag(None if tag.e_tag is None else '"00000000000000000000000000000000"', version)


def _refuse_store(objects: Objects, what: str) -> ConfigError:
    return ConfigError(
        f"remote.url={objects.url}: this store {what}, so two machines could work on one run; use another store, or "
        "remote.lock=off and see to it yourself that one command works on the run at a time"
    )


def _refuse(objects: Objects, hold: Hold | None) -> RefusedError:
    owner = "another process" if hold is None else str(hold.owner)
    return RefusedError(f"{objects.url}: in use by {owner}; wait for it or stop it")


def _read_or_none(objects: Objects) -> Found | None:
    try:
        return read_lock(objects)
    except NoSuchObjectError:
        return None


def _parse_hold(content: bytes) -> Hold | None:
    """Return the hold that bytes describe; None where they name nobody."""
    try:
        document = parse_json(content)
    except ValueError:
        return None
    owner = Owner.parse(document) if isinstance(document, dict) else None
    if owner is None or not is_count(document.get("beat")) or not isinstance(document.get("held"), bool):
        return None
    previous = document.get("previous")
    return Hold(owner, previous if isinstance(previous, str) else "", document["beat"], document["held"])


def new_token() -> str:
    """Return a token for a new hold."""
    return secrets.token_hex(16)


class NoLock:
    """Stand in the place of a lock with `remote.lock=off`: it says who works on the run, and keeps nobody out."""

    # It has signed already.
    has_worked = True

    def __init__(self, token: str, previous: str):
        self.token, self.previous = token, previous

    def check(self) -> None:
        """Do nothing: nobody is kept out."""

    def prove(self) -> None:
        """Do nothing: nobody is kept out."""

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Do nothing while the context lasts."""
        yield


def sign_without_lock(objects: Objects, found: Found | None, token: str) -> NoLock:
    """Put this process's name on a run, whoever else works on it. Raises RemoteError."""
    hold = Hold(identify_process(token), "" if found is None else found.token, held=False)
    objects.write(LOCK, hold.encode())
    return NoLock(token, hold.previous)
