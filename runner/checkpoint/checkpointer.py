"""The order of things in saving: strategy → store → prove → publish → prune.

Training hands a state over and goes on. One background thread writes it under `.writing/`, seals it, and only then
gives it its name; and only then deletes what retention lets go, by renaming it into a trash first: a kill at any point
leaves nothing that looks like a checkpoint and is not one. What there is to choose from is read from disk each time it
changes, never remembered.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from runner.checkpoint.record import PROGRESS, STATE, TRASH, WRITING, Mark, Record, Score, find_best, list_records
from runner.checkpoint.retention import DiskBudget, RetentionRule, max_kept, select_survivors
from runner.checkpoint.seal import seal_checkpoint
from runner.checkpoint.strategy import Failures, History, OnError, SaveRule, find_save_reason
from runner.errors import StorageError
from runner.files import sync_path
from runner.text import format_size
from runner.values import StepInfo

Items = Mapping[str, Any]  # STATE: a tree of arrays; PROGRESS: a JSON value
Verify = Literal["bytes", "values", "off"]


class Store(Protocol):
    """What the checkpointer asks of store.py."""

    def copy_to_host(self, state: Any) -> Any: ...
    def write_checkpoint(self, directory: Path, state: Any, progress: Any) -> None: ...
    def find_differing_leaf(self, directory: Path, state: Any) -> str | None: ...


@dataclass(frozen=True)
class SavedCheckpoint:
    """One durable checkpoint, and what it cost."""

    record: Record
    stall_seconds: float  # training waited
    durable_seconds: float  # until every byte was on disk under its name
    bytes: int
    trouble: str | None  # what went wrong afterwards, while old checkpoints were deleted


Written = tuple[SavedCheckpoint, list[Record]]  # what a background save gives: itself, and what is on disk after it


@dataclass(frozen=True)
class SavePolicy:
    """What was chosen: rules for when and for which, what best means, whether training waits, how a save is proven."""

    save: Mapping[str, SaveRule]
    keep: Mapping[str, RetentionRule]
    score: Score
    background: bool
    verify: Verify = "bytes"


class Checkpointer:
    """Saves and prunes the checkpoints of one run. Every method is called from the training thread.

    In the background a save that falls due while another is being written is made as soon as that one is durable:
    training waits for the disk only where a rule wants exactly this step, after an evaluation.
    """

    def __init__(
        self,
        checkpoints: Path,
        policy: SavePolicy,
        store: Store,
        tell: Callable[[str], None],
        told: Callable[[SavedCheckpoint], None],
        failures: Failures,
        doing: Callable[[str], None] = lambda phase: None,
    ):
        self._checkpoints, self._policy, self._store = checkpoints, policy, store
        self._tell, self._told, self._failures, self._doing = tell, told, failures, doing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[Written] | None = None
        self._failing = False
        self._tried_step, self._since = 0, time.monotonic()
        self._records: list[Record] = list_records(checkpoints)
        self._cleaning = self._thread.submit(_clean, checkpoints, policy, self.newest)

    @property
    def newest(self) -> int | None:
        """The newest durable step that a restart would use."""
        return next((record.step for record in reversed(self._records) if not record.mark), None)

    def due(self, moment: StepInfo) -> str | None:
        """Why to save now, or None. Also notices here, once a step, how the last background save ended."""
        if self._pending is not None:
            if not moment.metrics and not self._pending.done():
                return None
            self._settle()  # after an evaluation a rule looks at history, and the pending save may be the best one
        waited = time.monotonic() - self._since
        return find_save_reason(
            self._policy.save, moment, History(self._records, self._tried_step, waited, self._failures)
        )

    def save(self, reason: str, moment: StepInfo, items: Items, mark: Mark = "") -> None:
        """Save. Waits for the disk if the policy says so; a failure is told once and tried again when next due."""
        start = time.perf_counter()
        self._cleaning.result()  # a new checkpoint is written under a name that is cleaned up
        self._settle()
        self._tried_step, self._since = moment.step, time.monotonic()
        record = Record(moment.step, reason, dict(moment.metrics), time.time(), mark=mark)
        state, background = items[STATE], self._policy.background
        held = self._store.copy_to_host(state) if background else state
        stall = time.perf_counter() - start if background else None
        self._pending = self._thread.submit(self._write, record, held, items[PROGRESS], start, stall)
        if not background:
            self._settle()

    def rescue(self, error: Exception, moment: StepInfo, items: Callable[[], Items]) -> None:
        """Leave what there is, marked, after an exception in training; if a rule asks for it, and if it can be done."""
        if not any(isinstance(rule, OnError) for rule in self._policy.save.values()) or self.holds(moment.step):
            return
        reason = f"error after step {moment.step}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        try:
            self.save(reason, moment, items(), mark="error")
            self._settle()
            saved = any(record.step == moment.step for record in self._records)
        except RuntimeError as trouble:  # the step that failed had taken the arrays with it
            self._tell(f"warning: nothing could be left to look at ({str(trouble).splitlines()[0]})")
            return
        if saved:
            self._tell(f"left checkpoint {moment.step} to look at, marked; step={moment.step} restores it")

    def holds(self, step: int) -> bool:
        """Whether a restart would find this step, by a look at the disk; waits for a save that is under way."""
        self._settle()
        return any(record.step == step and not record.mark for record in self._records)

    def close(self) -> None:
        """Settle and let go of the thread."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()

    def _write(self, record: Record, state: Any, progress: Any, start: float, stall: float | None) -> Written:
        """In the background: written, proven, published, and only then pruned. Raises StorageError."""
        fresh = self._checkpoints / WRITING / str(record.step)
        self._doing("write")
        try:
            fresh.parent.mkdir(parents=True, exist_ok=True)
            self._store.write_checkpoint(fresh, state, progress)
            if self._policy.verify == "values" and (leaf := self._store.find_differing_leaf(fresh, state)):
                raise StorageError(f"{leaf} reads back differently from what was to be saved")
            spent = time.perf_counter() - start
            record = replace(record, stall_seconds=spent if stall is None else stall, write_seconds=spent)
            self._doing("seal")
            seal_checkpoint(fresh, record, checksums=self._policy.verify != "off")
            self._doing("publish")
            _publish(fresh, self._checkpoints / str(record.step))
        except (OSError, StorageError) as error:
            shutil.rmtree(fresh.parent, ignore_errors=True)  # a disk that is full needs its space back at once
            self._doing("")
            raise StorageError(_plain(error)) from error
        self._doing("prune")
        durable = time.perf_counter() - start
        records, trouble = _prune(self._checkpoints, self._policy, record.step)
        self._doing("")
        num_bytes = next((known.num_bytes for known in records if known.step == record.step), 0)
        return SavedCheckpoint(record, durable if stall is None else stall, durable, num_bytes, trouble), records

    def _settle(self) -> None:
        """Wait for the pending save and learn how it ended."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            saved, self._records = pending.result()
        except StorageError as error:
            if not self._failing:
                self._tell(
                    f"warning: a checkpoint could not be written: {error}; training goes on, the next due save retries"
                )
            self._failing, self._records = True, list_records(self._checkpoints)
            return
        if self._failing:
            self._tell(f"checkpoints are written again: step {saved.record.step} is durable")
        self._failing = False
        self._told(saved)
        if saved.trouble:
            self._tell(f"warning: old checkpoints could not be deleted: {saved.trouble}")


def warn_of_little_space(
    checkpoints: Path, num_bytes: int, keep: Mapping[str, RetentionRule], steps: int
) -> str | None:
    """A warning where what will be kept, and one more that is being written, does not fit on the volume; else None.

    `num_bytes` is the size of one state, `steps` the length of the run.
    """
    volume = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    there = [record.num_bytes for record in list_records(checkpoints)]
    free = shutil.disk_usage(volume).free + sum(there)
    most, budgets = max_kept(keep, steps), [rule.limit for rule in keep.values() if isinstance(rule, DiskBudget)]
    kept = [num_bytes * most] if most else [] if budgets else [num_bytes * 2]
    needed = min([*kept, *budgets]) + num_bytes
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
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or link.readlink() != Path(str(best.step)):
        fresh = checkpoints / ".best"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(str(best.step))
        fresh.replace(link)


def delete_checkpoint(directory: Path) -> None:
    """Delete a checkpoint: first out of sight in one move, for good only then."""
    away = _out_of_sight(directory)
    sync_path(directory.parent)
    shutil.rmtree(away, ignore_errors=True)


def _out_of_sight(directory: Path) -> Path:
    trash = directory.parent / TRASH
    trash.mkdir(exist_ok=True)
    away = trash / f"{directory.name}-{time.time_ns()}"
    directory.rename(away)
    return away


def _prune(checkpoints: Path, policy: SavePolicy, step: int) -> tuple[list[Record], str | None]:
    """Link the best and delete what retention lets go. Gives what is left, and what went wrong if anything did.

    Only what is not newer than the step just proven is judged: the rest is not from this training. A deletion that
    fails must not kill a run.
    """
    records = [record for record in list_records(checkpoints) if record.step <= step]
    kept = select_survivors(policy.keep, records, policy.score)
    try:
        link_best(checkpoints, records, policy.score)
        for record in records:
            if record.step not in kept:
                delete_checkpoint(checkpoints / str(record.step))
    except OSError as error:
        return list_records(checkpoints), str(error)
    return [record for record in records if record.step in kept], None


def _publish(fresh: Path, final: Path) -> None:
    """Give a sealed checkpoint its name, durably; what is under that name goes, and only then is it deleted."""
    if final.is_symlink():
        final.unlink()
    old = _out_of_sight(final) if final.exists() else None
    fresh.rename(final)
    sync_path(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _clean(checkpoints: Path, policy: SavePolicy, newest: int | None) -> None:
    """Finish what a killed process had begun: drop half a checkpoint, link the best, delete what was let go.

    The newest one has been proven by now: the run goes on from it.
    """
    with suppress(OSError):  # what cannot be done here is told when a save meets it
        checkpoints.mkdir(parents=True, exist_ok=True)
    for path in [*checkpoints.glob(f"{TRASH}/*"), checkpoints / WRITING, *checkpoints.glob("*.orbax-checkpoint-tmp")]:
        shutil.rmtree(path, ignore_errors=True)
    for folder in (checkpoints, *list(checkpoints.parents)[:3]):  # the names above: the run, its name, the root
        with suppress(OSError):
            sync_path(folder)
    if newest is not None:
        _prune(checkpoints, policy, newest)  # what cannot be deleted is told after the next save


def _plain(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
