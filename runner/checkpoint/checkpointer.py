"""The order of things in saving: decide, write, prove, publish, prune.

Training hands a state over and goes on. One background thread writes it under `.writing/`, seals it, and only then
gives it its name; and only then deletes what retention lets go, by renaming it into a trash first. So a kill at any
point leaves nothing that looks like a checkpoint and is not one. What there is to choose from is what lies on disk
at that moment, never what this process remembers of it.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from runner import files, hosts
from runner.checkpoint.record import (
    PROGRESS,
    SAVE_CHANNEL,
    STATE,
    TRASH,
    WRITING,
    Mark,
    Record,
    Score,
    find_best,
    list_records,
)
from runner.checkpoint.record_cache import RecordCache
from runner.checkpoint.retention import DiskBudget, RetentionRule, max_kept, select_survivors
from runner.checkpoint.seal import WrittenArrays, seal_checkpoint
from runner.checkpoint.strategy import Failures, History, OnError, SaveRule, find_save_reason
from runner.checkpoint.trouble import may_pass, short_reason
from runner.checkpoint.user_rules import AskedSave, ask_user_rules
from runner.errors import StorageError
from runner.log.sinks import LogDigest
from runner.text import display_path, format_size
from runner.types import CheckpointItems, JsonObject, Tree
from runner.values import Say, StepInfo

# Training begins its next step first: the thread that writes would take Python's lock from it for milliseconds.
HEAD_START_SECONDS = 0.001
Verify = Literal["bytes", "values", "off"]


class Store(Protocol):
    """Put bytes on disk: what is asked of store.py, the only file that knows Orbax."""

    def copy_to_host(self, state: Tree) -> Tree:
        """Return a copy of a tree of arrays that stays as it is while training goes on; it may still be under way."""

    def wait_for_copy(self, held: Tree) -> bool:
        """Wait until a copy is complete; return whether it was not, by now."""

    def write_checkpoint(self, directory: Path, state: Tree, progress: JsonObject) -> WrittenArrays:
        """Write a tree of arrays and a JSON value; return what the tree has. Raises StorageError, OSError."""

    def find_differing_leaf(self, directory: Path, state: Tree) -> str | None:
        """Return the name of a leaf that is on disk other than in memory; None where there is none."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """Describe one durable checkpoint, and what it cost.

    Attributes:
        record: what its sidecar says.
        stall_seconds: how long training waited, or its next step, which is given the same arrays to reuse.
        durable_seconds: from the decision until every byte was on disk under its name.
        bytes: its size.
        trouble: what went wrong afterwards, while old checkpoints were deleted; None where nothing did.
    """

    record: Record
    stall_seconds: float
    durable_seconds: float
    bytes: int
    trouble: str | None


@dataclass(frozen=True)
class SavePolicy:
    """Hold what was chosen about checkpoints.

    Attributes:
        save: the rules that say when, by name.
        keep: the rules that say which stay, by name.
        score: what best means.
        background: whether training goes on while a checkpoint is written.
        verify: what is proven before one gets its name: that its files are as they were written ("bytes"), also that
            they read back as the state ("values"), or only their sizes ("off").
    """

    save: Mapping[str, SaveRule]
    keep: Mapping[str, RetentionRule]
    score: Score
    background: bool
    verify: Verify = "bytes"


@dataclass(frozen=True)
class SaveListeners:
    """Hold whom the checkpointer tells.

    Attributes:
        say: tells a person a line; from the training thread.
        on_saved: takes each checkpoint once it is durable; from the training thread, so a step or more later.
        on_phase: takes what the background thread does: write, seal, publish, prune, or "" for nothing.
        check_held: raises LostRunError where the run is no longer this process's; called before files are touched.
        list_held_steps: gives the steps that must not be deleted now, whatever retention says: they are being copied.
    """

    say: Say
    on_saved: Callable[[SavedCheckpoint], None]
    on_phase: Callable[[str], None] = lambda phase: None
    check_held: Callable[[], None] = lambda: None
    list_held_steps: Callable[[], Collection[int]] = frozenset


class Checkpointer:
    """Save and prune the checkpoints of one run. Every method is called from the training thread.

    In the background a save that falls due while another is being written is made as soon as that one is durable:
    training waits for the disk only where a rule wants exactly this step: after an evaluation, or one of the user's.
    """

    def __init__(
        self, checkpoints: Path, policy: SavePolicy, store: Store, listeners: SaveListeners, failures: Failures
    ):
        # What rules of the user's own have to tell: some are asked in the background, where nothing is said.
        self._untold: list[str] = []
        save, keep = ask_user_rules(policy.save, policy.keep, self._untold.append)
        policy = replace(policy, save=save, keep=keep)
        self._checkpoints, self._policy, self._store = checkpoints, policy, store
        self._asked = {name: rule for name, rule in save.items() if isinstance(rule, AskedSave)}
        self._listeners, self._say, self._failures = listeners, listeners.say, failures
        # One thread: what it is given is done in order, so that nothing is pruned while something is being written.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        # The save that is under way: itself once durable, and the records that are on disk after it.
        self._pending: Future[tuple[SavedCheckpoint, list[Record]]] | None = None
        self._trouble: str | None = None
        self._tried_step, self._since = 0, time.monotonic()
        self._copied_at: float | None = None
        self._token = secrets.token_hex(4)
        self._on_disk = RecordCache(checkpoints)
        self._records: list[Record] = self._on_disk.list_records()
        # The same, with the one that is under way.
        self._expected: list[Record] = self._records
        # While the first steps compile and run.
        self._cleaning = self._thread.submit(self._clean_up, self.newest)

    @property
    def newest(self) -> int | None:
        """Return the newest durable step that a restart would use; None where there is none."""
        return next((record.step for record in reversed(self._records) if not record.mark), None)

    @property
    def copied_at(self) -> float | None:
        """Return when the state of the newest save was copied, by `time.perf_counter`; None where it is not yet.

        A step that is given the same arrays to reuse begins then and no sooner, though `save` may have returned before.
        """
        return self._copied_at

    @property
    def trouble(self) -> str | None:
        """Return why the last save failed, as the operating system said it; None where it did not."""
        return self._trouble

    def due(self, info: StepInfo) -> str | None:
        """Return why to save now, or None. Call this after each step: it also notices how the last save ended."""
        if self._pending is not None:
            if not info.metrics and not self._pending.done() and not self._is_wanted(info):
                return None
            # After an evaluation this waits: a rule compares with history, and the pending save may be the best one.
            self._settle()
        reason = find_save_reason(self._policy.save, info, self._look_back(self._records))
        self._tell_rules()
        return reason

    def _is_wanted(self, info: StepInfo) -> bool:
        """Tell whether a rule of the user's own says yes while a save is under way.

        Ours ask whether their step has gone by, and can wait. One of the user's may look at this step and no other.
        """
        return find_save_reason(self._asked, info, self._look_back(self._expected)) is not None

    def _look_back(self, records: Sequence[Record]) -> History:
        return History(records, self._tried_step, time.monotonic() - self._since, self._failures)

    def save(
        self, reason: str, info: StepInfo, items: CheckpointItems, log: LogDigest | None = None, mark: Mark = ""
    ) -> None:
        """Save. Waits for the disk if the policy says so.

        A failure that may pass (a full disk) is told once, and tried again when next due. `log` is what metrics.jsonl
        is up to this step. Raises StorageError where the save before this one, or this one, can never work.
        """
        start = time.perf_counter()
        # Cleaning up deletes what lies under `.writing/`, where this checkpoint is about to be written.
        self._cleaning.result()
        self._settle()
        self._tried_step, self._since, self._copied_at = info.step, time.monotonic(), None
        record = Record(info.step, reason, dict(info.metrics), time.time(), mark=mark, log=log)
        self._expected = [*self._records, record]
        state, background = items[STATE], self._policy.background
        # The next step donates the arrays of this state to its own, so a thread needs a copy.
        held, trouble = copy_if_there_is_memory(self._store.copy_to_host, state) if background else (state, None)
        # A state that several processes hold is saved by all of them or by none.
        if not hosts.is_true_for_all("held", trouble is None):
            self._tell_failure(trouble or MemoryError("another process has no memory for a copy"))
            return
        stall = time.perf_counter() - start if background else None
        self._pending = self._thread.submit(self._write_and_tell, record, held, items[PROGRESS], start, stall)
        if not background:
            self._settle()

    def rescue(self, error: Exception, info: StepInfo, items: Callable[[], CheckpointItems]) -> None:
        """Leave what there is, marked, after an exception in training; if a rule asks for it, and if it can be done."""
        if not any(isinstance(rule, OnError) for rule in self._policy.save.values()) or self.holds(info.step):
            return
        reason = f"error after step {info.step}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        try:
            self.save(reason, info, items(), mark="error")
            self._settle()
            saved = any(record.step == info.step for record in self._records)
        # The step that failed had been given the arrays, and took them with it: jax says so with a RuntimeError.
        except (RuntimeError, StorageError) as trouble:
            self._say(f"warning: nothing could be left to look at ({str(trouble).splitlines()[0]})")
            return
        if saved:
            self._say(f"left checkpoint {info.step} to look at, marked; step={info.step} restores it")

    def holds(self, step: int) -> bool:
        """Tell whether a restart would find this step, by a look at the disk; waits for a save that is under way."""
        self._settle()
        return any(record.step == step and not record.mark for record in self._records)

    def close(self) -> None:
        """Wait for the save that is under way, and let go of the thread."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()
            self._tell_rules()

    def _tell_rules(self) -> None:
        """Say what rules of the user's own had to tell since this was last called."""
        while self._untold:
            self._say(self._untold.pop(0))

    def _write_and_tell(
        self, record: Record, held: Tree, progress: JsonObject, start: float, stall: float | None
    ) -> tuple[SavedCheckpoint, list[Record]]:
        """Write a checkpoint, and tell the other processes of the run how it went; in the background thread."""
        try:
            if stall is not None:
                stall = self._finish_copy(held, start + stall) - start
                time.sleep(HEAD_START_SECONDS)
            result = self._write(record, held, progress, start, stall)
        except BaseException as error:
            hosts.agree(SAVE_CHANNEL, {"over": short_reason(error)})
            raise
        hosts.agree(SAVE_CHANNEL, {"over": None})
        return result

    def _finish_copy(self, held: Tree, handed_over: float) -> float:
        """Wait until the copy of a state is complete; return since when it is, by `time.perf_counter`."""
        try:
            # On CPUs it is when it is handed over.
            copied_at = time.perf_counter() if self._store.wait_for_copy(held) else handed_over
        # A copy that failed on its way is told by the write, which reads it.
        except RuntimeError:
            copied_at = handed_over
        self._copied_at = copied_at
        return copied_at

    def _write(
        self, record: Record, state: Tree, progress: JsonObject, start: float, stall: float | None
    ) -> tuple[SavedCheckpoint, list[Record]]:
        """Write, prove and publish a checkpoint, and only then prune; in the background thread.

        Returns the checkpoint, and the records that are on disk after it. Raises OSError, StorageError.
        """
        # Under a name of this process's alone: one that has taken the run over meanwhile may be writing the same step.
        fresh = self._checkpoints / WRITING / f"{record.step}-{self._token}"
        on_phase = self._listeners.on_phase
        on_phase("write")
        self._listeners.check_held()
        try:
            # Not with its parents: a run whose directory is gone is not begun anew below that name.
            for folder in (self._checkpoints, fresh.parent):
                folder.mkdir(exist_ok=True)
            written = self._store.write_checkpoint(fresh, state, progress)
            if self._policy.verify == "values" and (leaf := self._store.find_differing_leaf(fresh, state)):
                # As a disk that does not give back what it was given: the next save may be good.
                raise OSError(errno.EIO, f"{leaf} reads back differently from what was to be saved")
            spent = time.perf_counter() - start
            record = replace(record, stall_seconds=spent if stall is None else stall, write_seconds=spent)
            on_phase("seal")
            seal_checkpoint(fresh, record, written, checksums=self._policy.verify != "off")
            on_phase("publish")
            # Writing took a while. Under this name the step becomes the run's, and what had the name goes.
            self._listeners.check_held()
            _publish(fresh, self._checkpoints / str(record.step))
        except (OSError, StorageError):
            # What went wrong may be that somebody else has the run: then nothing is touched any more.
            self._listeners.check_held()
            # A disk that is full needs its space back at once. Orbax writes under a longer name, up to its last move.
            for path in fresh.parent.glob(f"{fresh.name}*"):
                files.remove_tree(path)
            on_phase("")
            raise
        on_phase("prune")
        durable = time.perf_counter() - start
        records, trouble = self._prune(record.step)
        on_phase("")
        num_bytes = next((known.num_bytes for known in records if known.step == record.step), 0)
        return SavedCheckpoint(record, durable if stall is None else stall, durable, num_bytes, trouble), records

    def _prune(self, step: int) -> tuple[list[Record], str | None]:
        """Link the best and delete what retention lets go. Returns what is left, and what went wrong if any."""
        policy, checkpoints = self._policy, self._checkpoints
        # Only what is not newer than the step just proven is judged: the rest is not from this training.
        records = [record for record in self._on_disk.list_records() if record.step <= step]
        kept = {*select_survivors(policy.keep, records, policy.score), *self._listeners.list_held_steps()}
        try:
            link_best(checkpoints, records, policy.score)
            for record in records:
                if record.step not in kept:
                    delete_checkpoint(checkpoints / str(record.step))
        # A deletion that fails must not kill a run.
        except OSError as error:
            return self._on_disk.list_records(), str(error)
        return [record for record in records if record.step in kept], None

    def _clean_up(self, newest: int | None) -> None:
        """Finish what a killed process had begun: drop half a checkpoint, link the best, delete what was let go.

        The newest one has been proven by now: the run goes on from it.
        """
        checkpoints = self._checkpoints
        # What cannot be done here is told when a save meets it.
        with suppress(OSError):
            files.make_folder(checkpoints)
        for path in [
            *checkpoints.glob(f"{TRASH}/*"),
            checkpoints / WRITING,
            *checkpoints.glob("*.orbax-checkpoint-tmp"),
        ]:
            files.remove_tree(path)
        # The names above may be as new as the run: its own directory, the one of its name, the root of all runs.
        for folder in (checkpoints, *list(checkpoints.parents)[:3]):
            with suppress(OSError):
                files.sync_path(folder)
        if newest is not None:
            # What cannot be deleted is told after the next save, which tries again.
            self._prune(newest)

    def _settle(self) -> None:
        """Wait for the pending save, and tell how it ended. Raises StorageError where saving can never work."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            saved, self._records = pending.result()
        except (OSError, StorageError) as error:
            # What is no trouble of the machine is the same at every later save: training on would only lose more.
            if not may_pass(error):
                raise StorageError(
                    f"{display_path(self._checkpoints)}: step {self._tried_step} cannot be saved: "
                    f"{short_reason(error)}; no later step could be, so training ends here; put that right, then run "
                    "the same command"
                ) from error
            self._tell_failure(error)
            return
        if self._trouble is not None:
            self._say(f"checkpoints are written again: step {saved.record.step} is durable")
        self._trouble = None
        self._listeners.on_saved(saved)
        if saved.trouble:
            self._say(f"warning: old checkpoints could not be deleted: {saved.trouble}")

    def _tell_failure(self, error: BaseException) -> None:
        """Remember a failure that may pass, and tell it once: on a full disk every save would say the same."""
        reason = short_reason(error)
        if self._trouble is None:
            self._say(
                f"warning: a checkpoint could not be written: {reason}; training goes on, the next due save retries"
            )
        self._trouble = reason
        # The disk that did not take the checkpoint may not list its directory either; then what was known stands.
        with suppress(StorageError):
            self._records = self._on_disk.list_records()


def copy_if_there_is_memory(copy: Callable[[Tree], Tree], state: Tree) -> tuple[Tree, Exception | None]:
    """Return a copy of a state; or None, and the error that says that there is no memory for it now."""
    try:
        return copy(state), None
    # What else goes wrong here is none of the disk.
    except (RuntimeError, MemoryError) as error:
        if not may_pass(error):
            raise
        return None, error


def warn_of_little_space(
    checkpoints: Path, num_bytes: int, keep: Mapping[str, RetentionRule], steps: int
) -> str | None:
    """Return a warning where what will be kept, and one more that is being written, does not fit on the volume.

    Args:
        checkpoints: where they lie; it need not be there yet.
        num_bytes: the size of one state.
        keep: the rules of retention.
        steps: the length of the run.
    """
    volume = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    # What is there already counts as free: it is part of what will be kept, or it will go.
    free = shutil.disk_usage(volume).free + sum(record.num_bytes for record in list_records(checkpoints))
    # The least of what the rules allow, for a budget caps the others; without any limit at least two stay.
    limits = [rule.limit for rule in keep.values() if isinstance(rule, DiskBudget)]
    most = max_kept(keep, steps)
    if most is not None:
        limits.append(num_bytes * most)
    elif not limits:
        limits.append(num_bytes * 2)
    needed = min(limits) + num_bytes
    if needed <= free:
        return None
    count = f"up to {most}" if most else "at least 2"
    return (
        f"warning: {format_size(free)} free for checkpoints of {format_size(num_bytes)}: room for "
        f"{free // max(num_bytes, 1)}, but retention keeps {count} and one more is being written; free space, or "
        "keep fewer"
    )


def link_best(checkpoints: Path, records: Sequence[Record], score: Score) -> None:
    """Point `checkpoints/best` at the best step there is, in one move; no link where nothing ranks."""
    link, best = checkpoints / "best", find_best(records, score)
    if best is None:
        files.remove_file(link)
    elif not link.is_symlink() or link.readlink() != Path(str(best.step)):
        fresh = checkpoints / ".best"
        files.remove_file(fresh)
        with files.open_folder(checkpoints) as folder:
            os.symlink(str(best.step), fresh.name, dir_fd=folder)
            os.replace(fresh.name, link.name, src_dir_fd=folder, dst_dir_fd=folder)


def delete_checkpoint(directory: Path) -> None:
    """Delete a checkpoint: first out of sight in one move, for good only then."""
    # A kill while its files are being deleted would leave half a checkpoint under a name that says step.
    away = _move_to_trash(directory)
    files.sync_path(directory.parent)
    files.remove_tree(away)


def _move_to_trash(directory: Path) -> Path:
    trash = directory.parent / TRASH
    files.make_folder(trash)
    away = trash / f"{directory.name}-{time.time_ns()}"
    files.rename_path(directory, away)
    return away


def _publish(fresh: Path, final: Path) -> None:
    """Give a sealed checkpoint its name, durably; what is under that name goes, and only then is it deleted."""
    if final.is_symlink():
        files.remove_file(final)
    old = _move_to_trash(final) if final.exists() else None
    files.rename_path(fresh, final)
    files.sync_path(final.parent)
    if old is not None:
        files.remove_tree(old)
