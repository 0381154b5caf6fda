"""Send checkpoints and logs to the run's other place, in a thread of its own: training waits for none of it.

What there is to send is read from disk, never remembered: the newest checkpoint first, then the best, then the others
that the rules keep there. Where the store is in trouble that is told once, and everything is tried again until it has
passed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from runner import files
from runner.checkpoint.record import PIN, SIDECAR, Record, Score, find_best
from runner.checkpoint.record_cache import RecordCache
from runner.checkpoint.retention import RetentionRule, select_survivors
from runner.errors import LostRunError, StorageError
from runner.remote.checkpoint_copies import (
    AbandonedError,
    delete_remote_checkpoints,
    list_checkpoint_files,
    upload_checkpoint,
)
from runner.remote.local_note import LocalNote, write_note
from runner.remote.objects import Objects, RemoteError
from runner.remote.remote_layout import BEST, NEWEST, name_checkpoint_file
from runner.remote.remote_lock import NoLock, RemoteLock
from runner.remote.run_files import FileMirror
from runner.rundir.layout import RunDir
from runner.text import format_duration
from runner.values import Say

# So long after a failed try the next one is made, the last of these again and again.
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
# While a command waits for its end, it does not wait long between tries.
FINAL_RETRY_SECONDS = 2.0
TICK_SECONDS = 0.5
# The logs of a step go up before its seal: whoever goes on from it finds the lines that it is proven by.
FIRST_FILES = ("decisions.json", "logs/metrics.jsonl")


@dataclass(frozen=True)
class RemoteRules:
    """Which checkpoints stay in the bucket, what "best" means, and how often logs go up between checkpoints."""

    keep: Mapping[str, RetentionRule]
    score: Score
    sync_seconds: float


class Uploader:
    """Keep a run's other place as its disk is. Every public method may be called from any thread.

    Attributes:
        say: tells a person a line.
        num_uploads: how many checkpoints were sent.
    """

    def __init__(
        self,
        objects: Objects,
        run_dir: RunDir,
        lock: RemoteLock | NoLock,
        mirror: FileMirror,
        rules: RemoteRules,
        say: Say,
        note: LocalNote,
    ):
        self._objects, self._run_dir, self._lock, self._mirror = objects, run_dir, lock, mirror
        self._rules, self.say, self._note = rules, say, note
        self.num_uploads = 0
        self._here = RecordCache(run_dir.checkpoints)
        self._records: dict[int, Record] = {}
        self._present: dict[int, set[str]] = {}
        self._changed = threading.Condition()
        self._began, self._upload_began = time.monotonic(), 0.0
        self._syncs_asked = self._syncs_done = 0
        self._is_finishing = self._is_closed = False
        self._abandoned: int | None = None
        # Steps that are not sent (again): they cannot be read here, or the rules have let them go there.
        self._passed_over: set[int] = set()
        self._crash: Exception | None = None
        self._failures, self._since_trouble = 0, 0.0
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def start(self, records: Mapping[int, Record], present: Mapping[int, Mapping[str, int]]) -> None:
        """Begin, with what is known to be there."""
        self._records, self._present = dict(records), {step: set(names) for step, names in present.items()}
        self._update_note()
        self._thread.start()

    @property
    def newest(self) -> int | None:
        """Return the newest step that is whole there and that a restart would use; None where none is."""
        with self._changed:
            return max((step for step, record in self._records.items() if not record.mark), default=None)

    @property
    def upload_seconds(self) -> float | None:
        """Return what the newest upload of a checkpoint took; None where none was made."""
        return self._note.upload_seconds or None

    @property
    def records(self) -> list[Record]:
        """Return the records of the checkpoints that are whole there, oldest first."""
        with self._changed:
            return [self._records[step] for step in sorted(self._records)]

    @property
    def trouble(self) -> str:
        """Return why the place is behind; empty where nothing is wrong."""
        return self._note.trouble

    def list_held_steps(self) -> frozenset[int]:
        """Return the checkpoints of this disk that must not be deleted now: they are on their way."""
        uploading = self._note.uploading
        return frozenset() if uploading is None else frozenset({uploading})

    def wake(self) -> None:
        """Take note that something is new on disk."""
        with self._changed:
            self._changed.notify_all()

    def forget(self, step: int) -> None:
        """Take note that a checkpoint is no longer there."""
        with self._changed:
            self._records.pop(step, None)
            self._present.pop(step, None)

    def prefer_newest(self, seconds_left: float) -> None:
        """Leave the upload off that is under way, where the newest checkpoint would not be in time after it."""
        with self._changed:
            uploading, takes = self._note.uploading, self._note.upload_seconds
            newest = self._find_newest_here()
            if uploading is None or newest is None or newest <= uploading or not takes:
                return
            left = max(takes - (time.monotonic() - self._upload_began), 0.0)
            if left + takes > seconds_left >= takes:
                self._abandoned = uploading

    def finish(self, deadline: float, *, all_steps: bool) -> None:
        """Wait until everything is there: the files as they are now, and the newest checkpoint, or all that stay there.

        `deadline` is in `time.monotonic()` seconds. Raises StorageError where it is not by then, LostRunError.
        """
        with self._changed:
            self._is_finishing = True
            self._syncs_asked += 1
            asked = self._syncs_asked
            self._changed.notify_all()
            while self._thread.is_alive():
                if self._syncs_done >= asked and not self._lacks(all_steps=all_steps):
                    return
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._changed.wait(min(left, TICK_SECONDS))
        self._lock.check()
        if self._crash is not None:
            raise self._crash
        raise StorageError(self._describe_lag())

    def _lacks(self, *, all_steps: bool) -> bool:
        """Tell whether a checkpoint is not there yet: the newest, or any that stays there."""
        newest = self._find_newest_here()
        # Also where it cannot be sent: then it is here alone, and that is no end to be proud of.
        if newest is not None and newest not in self._records:
            return True
        return all_steps and bool(self._list_behind())

    def close(self) -> None:
        """Leave off; what was not sent is sent by the next command."""
        with self._changed:
            self._is_closed = True
            self._abandoned = self._note.uploading
            self._changed.notify_all()
        # A request that is under way ends with the process.
        if self._thread.is_alive():
            self._thread.join(TICK_SECONDS)
        self._update_note(uploading=None)

    def _describe_lag(self) -> str:
        newest, here = self.newest, self._find_newest_here()
        there = f"it has step {newest}" if newest else "it has no checkpoint"
        why = f": {self.trouble}" if self.trouble else ""
        what = f"step {here} is on this machine's disk alone; " if here and here != newest else "its files are behind; "
        return (
            f"{self._objects.url}: not everything could be sent{why}; {what}{there}; the same command on this machine "
            "sends the rest"
        )

    def _run(self) -> None:
        """Send what is new, until closed. The thread ends early where the run is somebody else's."""
        next_sync = 0.0
        while True:
            with self._changed:
                behind = self._list_behind()
                wants_sync = self._syncs_done < self._syncs_asked or time.monotonic() >= next_sync
                if self._is_closed:
                    return
                if not behind and not wants_sync:
                    self._changed.wait(min(max(next_sync - time.monotonic(), 0.01), TICK_SECONDS))
                    continue
                asked = self._syncs_asked
            try:
                # First: where a checkpoint cannot be sent, the logs still can.
                if wants_sync:
                    self._lock.check()
                    self._mirror.send_changed(FIRST_FILES)
                    self._mirror_pins()
                    next_sync = time.monotonic() + self._rules.sync_seconds
                    with self._changed:
                        self._syncs_done = max(self._syncs_done, asked)
                        self._changed.notify_all()
                if behind:
                    self._upload(behind[0])
                self._heal()
            except AbandonedError:
                self._abandoned = None
            except LostRunError:
                # Told by the training thread, which finds it at its next line of a log.
                with self._changed:
                    self._changed.notify_all()
                return
            except RemoteError as error:
                self._tell_trouble(str(error).removeprefix(f"{self._objects.url}: "))
            except Exception as error:
                # A bug: whoever waits for the end hears of it, and nobody waits for ever.
                self._crash = error
                self.say(f"warning: {self._objects.url}: nothing more is sent: {type(error).__name__}: {error}")
                return
            finally:
                self._update_note(uploading=None)

    def _upload(self, step: int) -> None:
        """Send a checkpoint, and let go of those that the rules do not keep beside it."""
        directory = self._run_dir.checkpoints / str(step)
        self._upload_began = time.monotonic()
        self._abandoned = None
        self._update_note(uploading=step)
        names = list_checkpoint_files(self._objects, step)
        try:
            # Whatever is there is not known to be whole, or another process has put it there.
            if names:
                self._lock.prove()
            sidecar = upload_checkpoint(
                self._objects, directory, names, self._prepare_seal, lambda: self._abandoned != step
            )
        except ValueError as error:
            # Damaged: a restart will say so, and go on from another one.
            self._passed_over.add(step)
            self.say(f"warning: checkpoint {step} is not sent: {error}")
            return
        except OSError as error:
            # Deleted by retention in the moment before it was held.
            if not directory.is_dir():
                return
            # Trouble of this machine, which says nothing about the checkpoint, is waited out as that of the store is.
            why = f"checkpoint {step} cannot be read to be sent: {error.strerror or error}"
            raise RemoteError(f"{self._objects.url}: {why}") from error
        took = time.monotonic() - self._upload_began
        with self._changed:
            self._records[step] = sidecar.record
            self._present[step] = {*sidecar.files, SIDECAR}
            self._changed.notify_all()
        self.num_uploads += 1
        self._update_note(uploading=None, upload_seconds=round(took, 3))
        self._let_go()

    def _prepare_seal(self) -> None:
        """Send the logs, and see that the run is still this process's."""
        self._mirror.send_changed(FIRST_FILES)
        self._lock.prove()

    def _let_go(self) -> None:
        """Name the newest and the best, and delete what the rules do not keep."""
        records = self.records
        self._objects.write(NEWEST, _encode({"step": self.newest}))
        best = find_best(records, self._rules.score)
        if best is not None:
            metric = self._rules.score.metric
            self._objects.write(BEST, _encode({"step": best.step, "metric": metric, "value": best.metrics[metric]}))
        kept = select_survivors(self._rules.keep, self._with_pins(records), self._rules.score)
        if gone := {record.step: self._present[record.step] for record in records if record.step not in kept}:
            self._lock.prove()
            # First what is known, so that a kill of the request leaves nothing that is taken for whole.
            for step in gone:
                self.forget(step)
                self._passed_over.add(step)
            delete_remote_checkpoints(self._objects, gone)

    def _with_pins(self, records: list[Record]) -> list[Record]:
        """Return the records as they are pinned now: by somebody here, or there where nothing is here."""
        checkpoints = self._run_dir.checkpoints
        return [
            replace(record, pinned=(checkpoints / str(record.step) / PIN).exists())
            if (checkpoints / str(record.step)).is_dir()
            else replace(record, pinned=PIN in self._present[record.step])
            for record in records
        ]

    def _mirror_pins(self) -> None:
        for record in self._with_pins(self.records):
            names = self._present[record.step]
            key = name_checkpoint_file(record.step, PIN)
            if record.pinned and PIN not in names:
                self._objects.write(key, b"")
                names.add(PIN)
            elif not record.pinned and PIN in names:
                self._objects.delete([key])
                names.discard(PIN)

    def _list_behind(self) -> list[int]:
        """Return the checkpoints of this disk that are to be sent, in this order."""
        try:
            here = self._here.list_records()
        except StorageError:
            return []
        known = self._records.keys() | self._passed_over
        lacking = [record for record in here if record.step not in known]
        if not lacking:
            return []
        # What the rules would let go there is not sent: they judge what would be there then.
        together = {record.step: record for record in (*self._records.values(), *lacking)}
        kept = select_survivors(self._rules.keep, [together[step] for step in sorted(together)], self._rules.score)
        lacking = [record for record in lacking if record.step in kept]
        newest = max((record.step for record in here if not record.mark), default=None)
        best = find_best(here, self._rules.score)
        best_step = None if best is None else best.step
        return [
            record.step
            for record in sorted(lacking, key=lambda one: (one.step != newest, one.step != best_step, one.step))
        ]

    def _find_newest_here(self) -> int | None:
        try:
            here = self._here.list_records()
        except StorageError:
            return None
        return max((record.step for record in here if not record.mark), default=None)

    def _tell_trouble(self, why: str) -> None:
        """Tell trouble once, and wait a while, longer each time."""
        if not self._failures:
            self._since_trouble = time.monotonic()
            self.say(f"warning: {self._objects.url}: {why}; training goes on, and all is sent when that is over")
        self._update_note(trouble=why)
        pause = RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS) - 1)]
        self._failures += 1
        with self._changed:
            until = time.monotonic() + pause
            while not self._is_closed and (left := until - time.monotonic()) > 0:
                if self._is_finishing:
                    left = min(left, FINAL_RETRY_SECONDS - (pause - left))
                    if left <= 0:
                        break
                self._changed.wait(left)

    def _heal(self) -> None:
        if self._failures:
            took = format_duration(time.monotonic() - self._since_trouble)
            newest = self.newest
            there = f"step {newest} is there" if newest else "no checkpoint is there yet"
            self.say(f"{self._objects.url}: answers again, after {took}; {there}")
            self._failures = 0
            self._update_note(trouble="")

    def _update_note(self, **changes: object) -> None:
        with self._changed:
            steps = tuple(sorted(self._records))
            hours = round((time.monotonic() - self._began) / 3600, 4)
            requests = dict(self._objects.requests)
            note = replace(self._note, steps=steps, requests=requests, hours=hours, **changes)  # type: ignore[arg-type]
            if note == self._note:
                return
            self._note = note
            # It is for people, and written again soon.
            with suppress(OSError, LostRunError):
                write_note(self._run_dir, note, durable=False)


def _encode(document: object) -> bytes:
    return (files.format_json(document) + "\n").encode()
