"""The order of things in saving: strategy → store → prove → prune; in restoring: newest first, proven or set aside.

Training hands a state over and goes on. One background thread waits until it is durable, and only then deletes what
retention lets go, by renaming it into a trash first: a kill at any point leaves nothing that looks like a checkpoint
and is not one. What there is to choose from is read from disk each time it changes, never remembered.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runner.checkpoint.digest import problem_of, sync_directory
from runner.checkpoint.record import Record, Score, best_of, load, records_in, steps_in
from runner.checkpoint.retention import Keep, survivors
from runner.checkpoint.strategy import Rule, due
from runner.errors import RefusedError, StorageError
from runner.moment import Moment

TRASH = ".trash"
Items = Mapping[str, Any]


class Bytes(Protocol):
    """What the checkpointer asks of a store."""

    def hold(self, items: Items) -> Items: ...
    def save(self, record: Record, items: Items) -> None: ...
    def wait(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Saved:
    """One durable checkpoint, and what it cost."""

    record: Record
    stall_seconds: float  # training waited
    durable_seconds: float  # until every byte was on disk under its name
    trouble: str | None  # what went wrong afterwards, while old checkpoints were deleted


Written = tuple[Saved, list[Record]]  # what a background save gives: itself, and what is on disk after it


@dataclass(frozen=True)
class Policy:
    """What was chosen: rules for when, rules for which, what best means, and whether training waits for the disk."""

    save: Mapping[str, Rule]
    keep: Mapping[str, Keep]
    score: Score
    background: bool


def newest_good(checkpoints: Path, quarantine: Path, tell: Callable[[str], None]) -> Record | None:
    """The newest checkpoint whose every byte is proven; what is not is set aside, and said. None: nothing is there.

    Raises RefusedError where there are checkpoints and none is good.
    """
    problems = []
    for step in reversed(steps_in(checkpoints)):
        directory = checkpoints / str(step)
        problem = problem_of(directory)
        if problem is None:
            return load(directory)[0]
        problems.append(f"{step} ({problem})")
        tell(
            f"warning: checkpoint {step} is not good: {problem}; moved to {_set_aside(directory, quarantine, problem)}"
        )
    if problems:
        raise RefusedError(
            f"{checkpoints}: no good checkpoint is left; tried {', '.join(problems)}; they are in {quarantine}; "
            "resume=never overwrite=true starts afresh"
        )
    return None


class Checkpointer:
    """Saves and prunes the checkpoints of one run. Every method is called from the training thread.

    In the background a save that falls due while another is being written is made as soon as that one is durable:
    training waits for the disk only where a rule wants exactly this step, after an evaluation.
    """

    def __init__(
        self,
        checkpoints: Path,
        policy: Policy,
        open_store: Callable[[Path], Bytes],
        tell: Callable[[str], None],
        told: Callable[[Saved], None],
    ):
        self._checkpoints, self._policy = checkpoints, policy
        self._open_store, self._tell, self._told = open_store, tell, told
        self._store: Bytes | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._cleaning = self._thread.submit(_clean, checkpoints)
        self._pending: Future[Written] | None = None
        self._failing = False
        self._records: list[Record] = records_in(checkpoints)

    @property
    def newest(self) -> int | None:
        """The newest durable step."""
        return self._records[-1].step if self._records else None

    def due(self, moment: Moment) -> str | None:
        """Why to save now, or None. Also notices here, once a step, how the last background save ended."""
        if self._pending is not None:
            if not moment.metrics and not self._pending.done():
                return None
            self._settle()  # after an evaluation a rule looks at history, and the pending save may be the best one
        return due(self._policy.save, moment, self._records)

    def save(self, reason: str, moment: Moment, items: Items) -> None:
        """Save. Waits for the disk if the policy says so; a failure is told once and tried again when next due."""
        start = time.perf_counter()
        self._cleaning.result()  # a new checkpoint is written under a name that is cleaned up
        self._settle()
        record = Record(moment.step, reason, dict(moment.metrics), time.time())
        store = self._opened()
        held = store.hold(items) if self._policy.background else items
        stall = time.perf_counter() - start
        self._pending = self._thread.submit(self._write, store, record, held, start, stall)
        if not self._policy.background:
            self._settle()

    def holds(self, step: int) -> bool:
        """Whether this step is durable, by a look at the disk; waits for a save that is under way."""
        self._settle()
        return any(record.step == step for record in self._records)

    def close(self) -> None:
        """Settle and let go of threads."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()
            if self._store is not None:
                self._store.close()

    def _opened(self) -> Bytes:
        if self._store is None:
            self._store = self._open_store(self._checkpoints)
        return self._store

    def _write(self, store: Bytes, record: Record, items: Items, start: float, stall: float) -> Written:
        """In the background: written, durable, then known, then pruned."""
        store.save(record, items)
        store.wait()
        durable = time.perf_counter() - start
        records, trouble = _prune(self._checkpoints, self._policy)
        return Saved(record, stall if self._policy.background else durable, durable, trouble), records

    def _settle(self) -> None:
        """Wait for the pending save and learn how it ended."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            saved, self._records = pending.result()
        except StorageError as error:
            self._failed(error)
            self._records = records_in(self._checkpoints)
            return
        self._failing = False
        self._told(saved)
        if saved.trouble:
            self._tell(f"warning: old checkpoints could not be deleted: {saved.trouble}")

    def _failed(self, error: StorageError) -> None:
        if not self._failing:
            self._tell(
                f"warning: a checkpoint could not be written: {error}; training goes on, the next due save retries"
            )
        self._failing = True
        if self._store is not None:  # its memory of what is on disk is not to be believed after a failure
            with suppress(StorageError):  # the same failure, once more
                self._store.close()
            self._store = None


def _prune(checkpoints: Path, policy: Policy) -> tuple[list[Record], str | None]:
    """Link the best and delete what retention lets go. Gives what is left, and what went wrong if anything did.

    A deletion that fails must not kill a run.
    """
    records = records_in(checkpoints)
    kept = survivors(policy.keep, records, policy.score)
    try:
        link_best(checkpoints, records, policy.score)
        for record in records:
            if record.step not in kept:
                _discard(checkpoints / str(record.step))
    except OSError as error:
        return records_in(checkpoints), str(error)
    return [record for record in records if record.step in kept], None


def link_best(checkpoints: Path, records: list[Record], score: Score) -> None:
    """Point `checkpoints/best` at the best step there is, in one move; no link where nothing ranks."""
    link, best = checkpoints / "best", best_of(records, score)
    if best is None:
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or link.readlink() != Path(str(best.step)):
        fresh = checkpoints / ".best"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(str(best.step))
        fresh.replace(link)


def _discard(directory: Path) -> None:
    trash = directory.parent / TRASH
    trash.mkdir(exist_ok=True)
    away = trash / f"{directory.name}-{time.time_ns()}"
    directory.rename(away)
    sync_directory(directory.parent)
    shutil.rmtree(away, ignore_errors=True)


def _clean(checkpoints: Path) -> None:
    """Remove what a killed process left behind: half-written and half-deleted checkpoints."""
    for path in [*checkpoints.glob(f"{TRASH}/*"), *checkpoints.glob("*.orbax-checkpoint-tmp")]:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed is told when a save meets it


def _set_aside(directory: Path, quarantine: Path, problem: str) -> Path:
    """Rename a bad checkpoint out of sight, with the reason; never delete it."""
    quarantine.mkdir(parents=True, exist_ok=True)
    aside = quarantine / f"{directory.name}-{time.time_ns()}"
    directory.rename(aside)
    (aside / "reason.txt").write_text(problem + "\n")
    return aside
