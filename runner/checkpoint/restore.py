"""Find the checkpoint that a run goes on from: newest first, proven or set aside. No jax: the reader is handed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from runner.checkpoint.record import TRASH, WRITING, Record, list_steps, read_sidecar
from runner.checkpoint.seal import find_problem
from runner.errors import RefusedError
from runner.text import display_path
from runner.values import Say

T = TypeVar("T")
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


def iter_verdicts(checkpoints: Path, *, checksums: bool = True) -> Iterator[Verdict]:
    """Yield a verdict on every directory that is named like a step, newest first; each is read only when asked for."""
    for step in reversed(list_steps(checkpoints)):
        directory = checkpoints / str(step)
        problem = find_problem(directory, checksums=checksums)
        yield Verdict(step, read_sidecar(directory)[0] if problem is None else None, problem)


def list_ignored_names(checkpoints: Path) -> list[str]:
    """Return the names in `checkpoints/` that are neither a step nor ours: leftovers of copying, editors, people."""
    if not checkpoints.is_dir():
        return []
    known = {"best", ".best", TRASH, WRITING, *(str(step) for step in list_steps(checkpoints))}
    return sorted(path.name for path in checkpoints.iterdir() if path.name not in known)


def restore_newest(
    checkpoints: Path, quarantine: Path, read: ReadState[T], say: Say, *, checksums: bool = True
) -> tuple[Record, T] | None:
    """Return the newest checkpoint whose every byte is proven, and what `read` makes of it; None where there is none.

    What is not good is set aside, and said; what is marked is passed over, and said. Without `checksums` only names
    and sizes are compared.

    Raises RefusedError where there are checkpoints and none is good, and what `read` refuses where the bytes are good:
    then nothing older would fit either.
    """
    if names := list_ignored_names(checkpoints):
        say(f"ignored in {display_path(checkpoints)}: {', '.join(names)} (not a directory named like a step)")
    tried = []
    # By names and sizes first, which costs nothing; the checksums of one are taken while it is read.
    for verdict in iter_verdicts(checkpoints, checksums=False):
        directory = checkpoints / str(verdict.step)
        if verdict.record is not None and verdict.record.mark:
            say(f"checkpoint {verdict.step} is passed over ({verdict.record.reason}); step={verdict.step} restores it")
            continue
        problem, value = verdict.problem, None
        if problem is None:
            problem, value = _read_and_prove(directory, read, checksums=checksums)
        if problem is None:
            assert verdict.record is not None
            return verdict.record, value  # type: ignore[return-value]
        tried.append(f"{verdict.step} ({problem})")
        aside = quarantine_checkpoint(directory, quarantine, problem)
        say(f"warning: checkpoint {verdict.step} is not good: {problem}; moved to {display_path(aside)}")
    if tried:
        raise RefusedError(
            f"{display_path(checkpoints)}: no good checkpoint is left; tried {', '.join(tried)}; "
            f"they are in {quarantine.name}/; resume=never overwrite=true starts afresh"
        )
    return None


def restore_exactly(directory: Path, read: ReadState[T], *, checksums: bool = True) -> tuple[Record, T]:
    """Return this checkpoint, marked or not, and what `read` makes of it. Raises RefusedError where it is not good."""
    problem, value = find_problem(directory, checksums=False), None
    if problem is None:
        problem, value = _read_and_prove(directory, read, checksums=checksums)
    if problem is not None:
        raise RefusedError(
            f"{display_path(directory)}: is not good: {problem}; choose another step, or leave it out for the newest"
        )
    return read_sidecar(directory)[0], value  # type: ignore[return-value]


def set_newer_aside(checkpoints: Path, quarantine: Path, step: int, say: Say) -> None:
    """Set aside what is newer than a step, so that training can go on from it: a step is saved once in a run."""
    newer = [other for other in list_steps(checkpoints) if other > step]
    for other in newer:
        quarantine_checkpoint(
            checkpoints / str(other), quarantine, f"newer than step {step}, to which the run was taken back"
        )
    if newer:
        say(f"taken back to step {step}: {', '.join(map(str, newer))} moved to {display_path(quarantine)}")


def quarantine_checkpoint(directory: Path, quarantine: Path, problem: str) -> Path:
    """Rename a checkpoint out of sight, with the reason beside it; never delete it. Returns where it is now."""
    quarantine.mkdir(parents=True, exist_ok=True)
    # The same step may be set aside more than once.
    aside = quarantine / f"{directory.name}-{time.time_ns()}"
    directory.rename(aside)
    (aside / "reason.txt").write_text(problem + "\n")
    return aside


def _read_and_prove(directory: Path, read: ReadState[T], *, checksums: bool) -> tuple[str | None, T | None]:
    """Return what is wrong with a checkpoint, or what `read` makes of it.

    It is read while its checksums are taken, and used after. Raises what `read` refuses where the bytes are good.
    """
    # Imported here: `python -m runner ls` answers sooner without it.
    from concurrent.futures import ThreadPoolExecutor

    value, refused, failed = None, None, None
    with ThreadPoolExecutor(1) as pool:
        proof = pool.submit(find_problem, directory, checksums=checksums)
        try:
            value = read(directory)
        except RefusedError as error:
            refused = error
        # Bytes that are not what was written may fail in any way.
        except Exception as error:
            failed = error
        problem = proof.result()
    # Only good bytes may be refused: of damaged ones nobody knows which configuration they were of.
    if problem is None and refused is not None:
        raise refused
    if problem is None and failed is not None:
        problem = f"cannot be read ({type(failed).__name__}: {str(failed).splitlines()[0] if str(failed) else ''})"
    return problem, value
