"""Find the checkpoint that a run goes on from: newest first, proven or set aside. No jax: the reader is handed in.

Only bytes that were read and are wrong condemn a checkpoint. Trouble of the machine (a disk that does not answer, too
many open files, no memory) says nothing about them: then nothing is moved, and the run ends until that has passed.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from runner.checkpoint.quarantine import quarantine_checkpoint
from runner.checkpoint.record import TRASH, WRITING, Record, list_steps, read_sidecar
from runner.checkpoint.seal import MeasureFiles, find_problem
from runner.checkpoint.trouble import find_errno
from runner.errors import HoldfastError, RefusedError, StorageError
from runner.text import display_path
from runner.values import Say

T = TypeVar("T")
# So long after a failed try the next one is made. What is trouble for longer needs a person.
RETRY_SECONDS = (0.2, 1.0, 3.0)
# TensorStore raises ValueError for everything, with a code in front: `DATA_LOSS: Error decoding local file …`.
TENSORSTORE_CODE = re.compile(r"[A-Z_]{4,}: ")
# These codes say that what was read is no array. Others are about reading: `[OS error 24: EMFILE Too many open files]`.
NOT_AN_ARRAY = ("DATA_LOSS", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE")
# Turns the directory of a checkpoint into a state. Raises RefusedError where it is not one of this configuration.
ReadState = Callable[[Path], T]


@dataclass(frozen=True)
class Verdict:
    """Say what restoring would make of one directory that is named like a step.

    Attributes:
        step: the step it is named after.
        record: what its sidecar says; None where there is a problem.
        problem: why it cannot be used; None where every byte is proven.
    """

    step: int
    record: Record | None
    problem: str | None

    @property
    def usable(self) -> bool:
        """Tell whether a run would go on from it without being asked."""
        return self.problem is None and self.record is not None and not self.record.mark


def judge_checkpoint(directory: Path, *, checksums: bool = True) -> Verdict:
    """Return the verdict on a directory that is named like a step. Raises OSError where it cannot be read now."""
    problem = find_problem(directory, checksums=checksums)
    record = read_sidecar(directory)[0] if problem is None else None
    return Verdict(int(directory.name), record, problem)


def iter_verdicts(checkpoints: Path, *, checksums: bool = True) -> Iterator[Verdict]:
    """Yield a verdict on every directory that is named like a step, newest first; each is read only when asked for."""
    for step in reversed(list_steps(checkpoints)):
        yield judge_checkpoint(checkpoints / str(step), checksums=checksums)


def list_ignored_names(checkpoints: Path) -> list[str]:
    """Return the names in `checkpoints/` that are neither a step nor ours: leftovers of copying, editors, people."""
    if not checkpoints.is_dir():
        return []
    known = {"best", ".best", TRASH, WRITING, *(str(step) for step in list_steps(checkpoints))}
    return sorted(path.name for path in checkpoints.iterdir() if path.name not in known)


def restore_newest(
    checkpoints: Path,
    quarantine: Path,
    read: ReadState[T],
    say: Say,
    *,
    checksums: bool = True,
    measure: MeasureFiles | None = None,
) -> tuple[Record, T] | None:
    """Return the newest checkpoint whose every byte is proven, and what `read` makes of it; None where there is none.

    What is not good is set aside, and said; what is marked is passed over, and said. Without `checksums` only names
    and sizes are compared; `measure` takes them, after `read`, where whoever reads has taken some.

    Raises:
        RefusedError: there are checkpoints and none is good; or `read` refuses good bytes, and would refuse older ones.
        StorageError: one cannot be read now; nothing was moved.
        HoldfastError: there is not enough memory for it; nothing was moved.
    """
    if names := list_ignored_names(checkpoints):
        say(f"ignored in {display_path(checkpoints)}: {', '.join(names)} (not a directory named like a step)")
    tried = []
    # By names and sizes first, which costs nothing.
    for step in reversed(_retry_reading(checkpoints, partial(list_steps, checkpoints))):
        directory = checkpoints / str(step)
        verdict = _retry_reading(directory, partial(judge_checkpoint, directory, checksums=False))
        record, problem, value = verdict.record, verdict.problem, None
        if record is not None and record.mark:
            say(f"checkpoint {step} is passed over ({record.reason}); step={step} restores it")
            continue
        if record is not None:
            prove = partial(_read_and_prove, directory, read, measure, checksums=checksums)
            problem, value = _retry_reading(directory, prove)
        if record is not None and problem is None:
            return record, value  # type: ignore[return-value]
        assert problem is not None, "without a record there is a problem"
        tried.append(f"{step} ({problem})")
        try:
            aside = quarantine_checkpoint(directory, quarantine, problem)
            say(f"warning: checkpoint {step} is not good: {problem}; moved to {display_path(aside)}")
        except FileNotFoundError:
            say(f"warning: checkpoint {step} was removed while it was read ({problem})")
    if tried:
        raise RefusedError(
            f"{display_path(checkpoints)}: no good checkpoint is left; tried {', '.join(tried)}; "
            f"they are in {quarantine.name}/; bring a good one back, or start afresh with resume=never overwrite=true"
        )
    return None


def restore_exactly(
    directory: Path, read: ReadState[T], *, checksums: bool = True, measure: MeasureFiles | None = None
) -> tuple[Record, T]:
    """Return this checkpoint, marked or not, and what `read` makes of it.

    Raises RefusedError where it is not good, StorageError or HoldfastError where it cannot be read now.
    """
    verdict = _retry_reading(directory, partial(judge_checkpoint, directory, checksums=False))
    record, problem, value = verdict.record, verdict.problem, None
    if record is not None:
        prove = partial(_read_and_prove, directory, read, measure, checksums=checksums)
        problem, value = _retry_reading(directory, prove)
    if record is None or problem is not None:
        raise RefusedError(
            f"{display_path(directory)}: is not good: {problem}; choose another step, or leave it out for the newest"
        )
    return record, value  # type: ignore[return-value]


def _read_and_prove(
    directory: Path, read: ReadState[T], measure: MeasureFiles | None, *, checksums: bool
) -> tuple[str | None, T | None]:
    """Return what is wrong with a checkpoint, or what `read` makes of it.

    It is read first, for whoever reads may take the checksums (`measure`) at the same time, and used after. Raises what
    `read` refuses where the bytes are good, and whatever kept it from being read.
    """
    value, failed = None, None
    try:
        value = read(directory)
    # Bytes that are not what was written may fail in any way: what it means is known when they are proven.
    except Exception as error:
        failed = error
    problem = find_problem(directory, checksums=checksums, measure=measure)
    if problem is not None or failed is None:
        return problem, value
    # Names and sizes alone prove no content: what reads as no array is damage then.
    if not checksums and not isinstance(failed, OSError) and _mentions(failed, NOT_AN_ARRAY):
        return f"cannot be read ({_first_line(failed)})", None
    # Only good bytes may be refused: of damaged ones nobody knows which configuration they were of.
    raise failed


def _retry_reading(what: Path, read: Callable[[], T]) -> T:
    """Return what `read` returns, tried again where the machine is in trouble. Nothing is moved or changed.

    Raises StorageError where the trouble stays, HoldfastError where memory is not enough, and what is no trouble of the
    machine as it is.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return read()
        except HoldfastError:
            raise
        except Exception as error:
            if not isinstance(error, OSError) and find_errno(error) == errno.ENOMEM:
                raise HoldfastError(
                    f"{display_path(what)}: there is not enough memory to restore it ({_first_line(error)}); nothing "
                    "was changed; free memory, then run the same command"
                ) from error
            if not _is_trouble(error):
                raise
            if pause is None:
                raise StorageError(
                    f"{display_path(what)}: cannot be read now ({_first_line(error)}); nothing was changed; mend that, "
                    "then run the same command; step=N goes on from another checkpoint"
                ) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _is_trouble(error: Exception) -> bool:
    """Tell whether an error is about reading: of the operating system, or of TensorStore, which wraps those in text."""
    return isinstance(error, OSError) or (isinstance(error, ValueError) and bool(TENSORSTORE_CODE.match(str(error))))


def _mentions(error: Exception, words: Sequence[str]) -> bool:
    return any(word in str(error) for word in words)


def _first_line(error: Exception) -> str:
    lines = (error.strerror or str(error) if isinstance(error, OSError) else str(error)).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
