"""The bucket of a run while a command works on it: who has it, what comes onto this disk, what goes there.

Three holds can be met in LOCK. The one of this machine's own files (remote.json names it): nobody has worked on the run
since, and what is here goes on, however far behind the bucket is. Another one: somebody has worked on it elsewhere, so
the bucket has the run, and what is here is set aside. None: the run is not there yet, and all of it goes up.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from runner import files
from runner.checkpoint.record import SIDECAR, Record, Score, find_best, newest_durable_step
from runner.checkpoint.user_rules import ask_user_rules
from runner.errors import ConfigError, HoldfastError, RefusedError, StorageError
from runner.remote.base_copies import NOT_THERE, download_base, name_base_file
from runner.remote.checkpoint_copies import (
    download_checkpoint,
    list_checkpoint_files,
    quarantine_remote_checkpoint,
    read_remote_record,
)
from runner.remote.contact import as_wrong_command
from runner.remote.leftover_parts import abort_leftover_parts
from runner.remote.local_note import LocalNote, read_note, write_note
from runner.remote.objects import PART_BYTES, NoSuchObjectError, Objects, open_objects, run_side_by_side
from runner.remote.other_place import Choices
from runner.remote.remote_layout import Listing, sort_listing
from runner.remote.remote_lock import (
    LOCK,
    Found,
    Hold,
    NoLock,
    RemoteLock,
    new_token,
    read_lock,
    sign_without_lock,
    take_lock,
)
from runner.remote.run_files import FileMirror, fetch_files
from runner.remote.uploader import RemoteRules, Uploader
from runner.rundir.decisions import read_decisions, write_decisions
from runner.rundir.layout import RunDir
from runner.screen import print_line
from runner.text import display_path, format_count, format_duration, format_size
from runner.values import Say

# What is left of a notice when everything has to be there: to write down how it ended, and to give the lock back.
MARGIN_SECONDS = 0.5
# After an error there is something to send as well, but nobody waits long for it.
ERROR_SECONDS = 15.0
RATE_SECONDS = 600.0


class Bucket:
    """The run in a bucket, held for this process: an `OtherPlace`."""

    def __init__(
        self, objects: Objects, run_dir: RunDir, lock: RemoteLock | NoLock, listing: Listing, choices: Choices, say: Say
    ):
        self._objects, self._run_dir, self._lock, self._choices, self._say = objects, run_dir, lock, choices, say
        self._present: dict[int, Mapping[str, int]] = {step: listing.checkpoints[step] for step in listing.sealed_steps}
        # Until the uploader knows better.
        self._found: dict[int, Record] = {}
        self._mirror = FileMirror(objects, run_dir, listing)
        self._uploader: Uploader | None = None
        self._began = time.monotonic()

    def check(self) -> None:
        """Raise LostRunError where it is known that somebody else has the run."""
        self._lock.check()

    def prepare(self, fetched: list[str]) -> None:
        """Read the seal of every checkpoint that has one; those that cannot be believed are set aside.

        `fetched` are the files of the run that are here as they are there. Raises RemoteError, OSError.
        """
        self._mirror.note_as_sent(fetched)
        with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
            broken: dict[int, str] = {}

            def read(step: int) -> None:
                try:
                    self._found[step] = read_remote_record(self._objects, step, Path(scratch))
                except NoSuchObjectError:
                    return
                except ValueError as error:
                    broken[step] = str(error)

            run_side_by_side(read, list(self._present))
        for step, problem in broken.items():
            self._quarantine(step, problem)

    def list_steps(self) -> Collection[int]:
        """Return the checkpoints that are whole there and that a restart would use."""
        return [step for step, record in self._records.items() if not record.mark]

    @property
    def _records(self) -> dict[int, Record]:
        if self._uploader is None:
            return self._found
        return {record.step: record for record in self._uploader.records}

    def bring_newer(self, than: int) -> bool:
        """Bring the newest checkpoint that is newer than a step onto this disk; return whether there was a good one."""
        newer = sorted((step for step in self.list_steps() if step > than), reverse=True)
        return any(self.bring(step) for step in newer)

    def bring(self, step: int) -> bool:
        """Bring a checkpoint onto this disk, proven, where it is not here; return whether it is here then.

        One that is not what was written is set aside there. Raises RemoteError, StorageError.
        """
        if (self._run_dir.checkpoints / str(step)).is_dir():
            return True
        if step not in self._records:
            return False
        began, present = time.monotonic(), list_checkpoint_files(self._objects, step)
        with _as_disk_trouble(self._run_dir):
            problem = download_checkpoint(self._objects, step, present, self._run_dir.checkpoints)
            if problem is not None:
                # Once more: what is damaged on its way is not damaged there.
                problem = download_checkpoint(self._objects, step, present, self._run_dir.checkpoints)
        if problem is not None:
            self._quarantine(step, problem)
            return False
        took = time.monotonic() - began
        size = format_size(sum(present.values()))
        self._say(f"fetched step {step} from {self._objects.url}: {size} in {format_duration(took)}")
        return True

    def bring_base(self, digest: str) -> bool:
        """Bring the frozen weights of this digest onto this disk, proven; return whether they are here then."""
        with _as_disk_trouble(self._run_dir):
            problem = download_base(self._objects, digest, self._run_dir.path)
        if problem is not None and problem != NOT_THERE:
            # Without its seal it is sent again, once it is here.
            self._objects.delete([name_base_file(digest, SIDECAR)])
            self._say(f"warning: {self._objects.url}: the frozen weights there are not good: {problem}")
        return problem is None

    def bring_best(self, scores: Collection[Score]) -> None:
        """Bring the best checkpoints onto this disk: rules that compare with them see what they saw before."""
        for score in scores:
            best = find_best(self._records.values(), score)
            if best is not None:
                self.bring(best.step)

    def set_newer_aside(self, step: int) -> None:
        """Set aside there what is newer than a step, for the run is taken back to it. Raises RemoteError."""
        for newer in sorted((other for other in self._records if other > step), reverse=True):
            self._quarantine(newer, f"newer than step {step}, to which the run was taken back")

    def _quarantine(self, step: int, problem: str) -> None:
        self._lock.prove()
        self._lock.has_worked = True
        aside = quarantine_remote_checkpoint(self._objects, step, list_checkpoint_files(self._objects, step), problem)
        self._found.pop(step, None)
        if self._uploader is not None:
            self._uploader.forget(step)
        self._say(f"warning: {self._objects.url}: checkpoint {step}: {problem}; moved to {aside} there")

    def tell(self, say: Say) -> None:
        """Take note of who tells a person a line from now on."""
        self._say = say

    def begin(self) -> None:
        """Begin to send, once it is known what this run goes on from."""
        if self._uploader is None:
            self._lock.has_worked = True
            self._uploader = self._start_uploader()

    def _start_uploader(self) -> Uploader:
        note = read_note(self._run_dir)
        assert note is not None, "it was written when the lock was taken"
        _, keep = ask_user_rules({}, self._choices.keep, self._say)
        rules = RemoteRules(keep, self._choices.score, self._choices.remote.sync_seconds)
        uploader = Uploader(self._objects, self._run_dir, self._lock, self._mirror, rules, self._say, note)
        present = {step: self._present.get(step, {}) for step in self._found}
        if any(size > PART_BYTES for sizes in present.values() for size in sizes.values()):
            # Nobody else sends anything there now, and this process has not begun.
            abort_leftover_parts(self._objects.url, self._choices.remote.endpoint)
        uploader.start(self._found, present)
        return uploader

    def note_saved(self) -> None:
        """Take note that a checkpoint is durable here."""
        if self._uploader is not None:
            self._uploader.wake()

    def list_held_steps(self) -> frozenset[int]:
        """Return the checkpoints that must stay on this disk for now."""
        return frozenset() if self._uploader is None else self._uploader.list_held_steps()

    @property
    def newest(self) -> int | None:
        """Return the newest checkpoint that is whole there; None where there is none."""
        return max(self.list_steps(), default=None) if self._uploader is None else self._uploader.newest

    @property
    def upload_seconds(self) -> float | None:
        """Return what it takes to send a checkpoint; None where that is not known."""
        return None if self._uploader is None else self._uploader.upload_seconds

    def finish(self, deadline: float | None) -> None:
        """Wait until everything is there. Raises StorageError where it cannot be, LostRunError."""
        self.begin()
        assert self._uploader is not None, "it was begun"
        until = time.monotonic() + self._choices.remote.patience_seconds
        if deadline is not None:
            until = min(until, deadline - MARGIN_SECONDS)
            self._uploader.prefer_newest(until - time.monotonic())
        # A machine that is about to go sends what a restart needs; one that has time sends what the rules keep.
        self._uploader.finish(until, all_steps=deadline is None)
        self._tell_requests()

    def _tell_requests(self) -> None:
        """Say what the store was asked for: each request costs money."""
        assert self._uploader is not None, "only after it was used"
        counts, saves = self._objects.requests, self._uploader.num_uploads
        total, seconds = sum(counts.values()), time.monotonic() - self._began
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count)
        there = f"step {self.newest} and every log" if self.newest else "every log"
        rates = [f"{total / saves:.0f} a checkpoint"] if saves else []
        # Of a shorter time it says how the run began, and not what an hour costs.
        rates += [f"{total * 3600 / seconds:,.0f} an hour"] if seconds >= RATE_SECONDS else []
        each = f", {', '.join(rates)}" if rates else ""
        self._say(f"{self._objects.url}: has {there}; {format_count(total, 'request')} ({kinds}){each}")

    def send_what_there_is(self) -> None:
        """Send what there is after an error, for a short while; nothing is raised."""
        with suppress(HoldfastError, OSError):
            self.begin()
            if self._uploader is not None:
                self._uploader.finish(time.monotonic() + ERROR_SECONDS, all_steps=False)

    def close(self) -> None:
        """Leave off sending."""
        if self._uploader is not None:
            self._uploader.close()


@contextmanager
def hold_in_bucket(
    choices: Choices, key: str, run_dir: RunDir, raise_if_stopped: Callable[[], None]
) -> Iterator[Bucket]:
    """Hold a run in its bucket as well, while the context lasts; its files are on this disk then.

    Where nothing of the run is here, or what is here is of a branch that was left, it comes from there, but for
    checkpoints: those are brought when they are needed. Its directory must be locked. Raises as `hold_other_place`.
    """
    remote = choices.remote
    assert remote.url is not None, "only where there is one"
    objects = open_objects(remote, remote.url).below(key)
    _refuse_own_folder(remote.url, key, run_dir)
    with as_wrong_command(), _as_disk_trouble(run_dir):
        found, note, token = _look(objects), read_note(run_dir), new_token()
        note = note if note is not None and note.url == objects.url else LocalNote(objects.url)
        if is_own := found is not None and _is_own_branch(note, found.hold):
            # A kill may come when the lock is taken and nothing has said so: then LOCK names what is written here now.
            write_note(run_dir, replace(note, token=found.token if found else "", next_token=token), durable=True)
        lock: RemoteLock | NoLock
        if remote.lock == "on":
            lock = take_lock(objects, remote, found, token, print_line, raise_if_stopped)
        else:
            lock = sign_without_lock(objects, found, token)
        # Somebody may have come and gone while this one waited.
        is_own = is_own and found is not None and lock.previous == found.token
    fresh: LocalNote | None = None
    try:
        with lock.keep():
            with as_wrong_command(), _as_disk_trouble(run_dir):
                listing = sort_listing(objects.list_sizes(), LOCK)
                if choices.overwrite and (run_dir.config.name in listing.files or listing.has_newest):
                    lock.has_worked = True
                    aside = _set_remote_run_aside(open_objects(remote, remote.url), key)
                    print_line(f"{objects.url} was set aside as {aside}")
                    listing, is_own = Listing(), True
                there = tuple(listing.sealed_steps)
                known = replace(note, token=token, next_token="", steps=there, uploading=None, trouble="")
                keep_note = partial(write_note, run_dir, known, durable=True)
                fetched: list[str] = []
                # A kill may have left a machine that has only begun to fetch.
                if not is_own or not run_dir.config.exists():
                    fetched = _take_over_files(objects, run_dir, listing, keep_note)
                keep_note()
                fresh = known
                bucket = Bucket(objects, run_dir, lock, listing, choices, print_line)
                bucket.prepare(fetched)
            try:
                yield bucket
            finally:
                bucket.close()
    finally:
        # Given back as it was found, once what is here was seen to go on from what is there: so it still does.
        if fresh is not None and lock.token == lock.previous:
            with suppress(OSError):
                write_note(run_dir, replace(fresh, token=lock.token), durable=False)


def _refuse_own_folder(url: str, key: str, run_dir: RunDir) -> None:
    """Raise ConfigError where a `file://` place is the run's own directory, or one lies in the other."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return
    there, here = Path(os.path.realpath(Path(unquote(parts.path)) / key)), Path(os.path.realpath(run_dir.path))
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise ConfigError(
            f"remote.url={url}: is where the run lives already ({run_dir}); name a folder on another disk"
        )


def _is_own_branch(note: LocalNote, last: Hold | None) -> bool:
    """Tell whether the hold that was the last on a run is the one under which the files of this disk were made."""
    if last is None or not note.token:
        return False
    if last.owner.token == note.token:
        return True
    return last.owner.token == note.next_token and last.previous == note.token


def _look(objects: Objects) -> Found | None:
    try:
        return read_lock(objects)
    except NoSuchObjectError:
        return None


def _take_over_files(objects: Objects, run_dir: RunDir, listing: Listing, keep_note: Callable[[], None]) -> list[str]:
    """Put the files of a run on this disk in the place of what is here; return their names.

    Nothing is done where the run is not there yet. `keep_note` writes down that what is here goes on from what is
    there: before the configuration is here, without which there is no run.
    """
    if run_dir.config.name not in listing.files:
        # It goes up before the first seal does: somebody has taken it away.
        if listing.has_newest or listing.sealed_steps:
            raise RefusedError(
                f"{objects.url}: has checkpoints and no {run_dir.config.name}, so nobody knows whose they are; bring "
                "it back, choose another prefix, or start afresh with resume=never overwrite=true"
            )
        return []
    if run_dir.config.exists() or run_dir.holds_checkpoints():
        newest, there = newest_durable_step(run_dir.checkpoints), max(listing.sealed_steps, default=0)
        aside = _set_files_aside(run_dir)
        print_line(
            f"{run_dir}: another machine has worked on this run since; going on from step {there} of {objects.url}; "
            f"what was here (up to step {newest}) was set aside as {display_path(aside)}"
        )

    def complete() -> None:
        # Before the configuration as well: what a kill leaves with it is gone on from as it is.
        _decide_whether_durable(run_dir, was_durable=listing.has_newest or bool(listing.sealed_steps))
        keep_note()

    return fetch_files(objects, listing, run_dir, complete)


def _set_remote_run_aside(objects: Objects, key: str) -> str:
    """Move a run in a bucket out of the way, next to its siblings, and return where it is. Its lock stays.

    Nothing is deleted before all of it is copied. Raises RemoteError.
    """
    name, _, run = key.rpartition("/")
    aside = f"{name}/.overwritten/{run}-{time.time_ns()}"
    keys = [own for own in objects.list_sizes(f"{key}/") if own != f"{key}/{LOCK}"]
    run_side_by_side(lambda own: objects.copy(own, f"{aside}{own.removeprefix(key)}"), keys)
    # The configuration last: what a kill leaves of this is a run that is set aside once more.
    keys.sort(key=lambda own: own == f"{key}/config.yaml")
    objects.delete(keys[:-1])
    objects.delete(keys[-1:])
    return f"{objects.url}/{aside}"


def _set_files_aside(run_dir: RunDir) -> Path:
    """Move everything in a run's directory to beside it, but for what holds it for this process; nothing is deleted."""
    aside = run_dir.path.parent / ".overwritten" / f"{run_dir.path.name}-{time.time_ns()}"
    files.make_folder(aside)
    held = {path.name for path in (run_dir.lock, run_dir.lease, run_dir.remote_note)}
    # The configuration first: what a kill leaves here then is no run, and is fetched again.
    names = sorted(set(os.listdir(run_dir.path)) - held, key=lambda name: name != run_dir.config.name)
    for name in names:
        files.rename_path(run_dir.path / name, aside / name)
    for folder in (aside, run_dir.path):
        files.sync_path(folder)
    return aside


def _decide_whether_durable(run_dir: RunDir, *, was_durable: bool) -> None:
    """Write down of a run that came from a bucket whether something was ever whole there. Raises OSError.

    Where nothing was, the machine that had its checkpoints has gone before the first was sent: the run begins anew, and
    nothing that could be gone on from was lost. Where something was, the run never starts over by itself.
    """
    found = read_decisions(run_dir, run_dir.read_status(), []).decisions
    taken_back_to = found.taken_back_to if was_durable else None
    write_decisions(run_dir, replace(found, was_durable=was_durable, taken_back_to=taken_back_to))


@contextmanager
def _as_disk_trouble(run_dir: RunDir) -> Iterator[None]:
    """Turn an OSError into a StorageError: files of the run are touched here, so it is this machine's trouble."""
    try:
        yield
    except OSError as error:
        where = f" ({Path(error.filename).name})" if isinstance(error.filename, str) else ""
        raise StorageError(
            f"{run_dir}: {error.strerror or error}{where}; mend that, then run the same command"
        ) from error
