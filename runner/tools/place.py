"""Runs and checkpoints by the names people type, and a look at what is there. Reads files only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner.checkpoint.digest import problem_of
from runner.checkpoint.record import Record, is_step, load, locate
from runner.errors import RefusedError
from runner.rundir import Run

Proof = Literal["ok", "sizes ok", "not good"]


@dataclass(frozen=True)
class Checkpoint:
    """One step of one run."""

    run: Run
    step: int

    @property
    def directory(self) -> Path:
        return self.run.checkpoints / str(self.step)

    def __str__(self) -> str:
        """As a person would type it."""
        return f"{self.run}@{self.step}"


@dataclass(frozen=True)
class Look:
    """What a directory that is named like a step holds; `record` is None where its sidecar cannot be believed."""

    step: int
    record: Record | None
    problem: str | None
    num_files: int
    proof: Proof


def new_folder(verb: str, to: str | None) -> Path:
    """Where a verb leaves what it made; not there yet, or empty. Raises RefusedError where there is something in it."""
    default = Path("outputs") / f".{verb}" / time.strftime("%Y-%m-%d_%H-%M-%S")
    place = Path(to).expanduser() if to else default
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RefusedError(f"{verb}: {place} is there already; name a new folder with --to")
    return place.resolve()


def run_at(path: str) -> Run:
    """The run in this directory. Raises RefusedError where none is."""
    run = Run(Path(path).expanduser())
    if not is_run(run):
        what = "no run is there" if run.path.is_dir() else "there is no such directory"
        raise RefusedError(f"{path}: {what}; python -m runner ls outputs lists the runs")
    return run


def is_run(run: Run) -> bool:
    """Whether a directory was made by a run."""
    return run.config.is_file() or run.checkpoints.is_dir()


def checkpoint_at(reference: str) -> Checkpoint:
    """What `RUN`, `RUN@STEP`, `RUN@best` or `RUN@newest` names. Raises RefusedError where there is none."""
    directory = locate(reference)
    if not is_step(directory.name):
        raise RefusedError(f"{directory}: is no link to a step (copied without its links?); say {reference[:-4]}STEP")
    return Checkpoint(Run(directory.parent.parent), int(directory.name))


def proven_at(reference: str) -> tuple[Checkpoint, Record]:
    """A checkpoint whose every byte is what was written. Raises RefusedError where it is not."""
    checkpoint = checkpoint_at(reference)
    if problem := problem_of(checkpoint.directory):
        raise RefusedError(f"{checkpoint}: is not good: {problem}; choose another step")
    return checkpoint, load(checkpoint.directory)[0]


def look(directory: Path, *, checksums: bool) -> Look | None:
    """What is in a checkpoint's directory; None where it was deleted while it was looked at: a run may be training."""
    try:
        problem = problem_of(directory, checksums=checksums)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    try:
        record, files = load(directory)
    except (OSError, ValueError, TypeError, KeyError):
        record, files = None, {}
    if not directory.is_dir():
        return None
    proof: Proof = "ok" if checksums and all("xxh3" in file for file in files.values()) else "sizes ok"
    return Look(int(directory.name), record, problem, len(files), "not good" if problem else proof)


def maker_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The attempt that made a checkpoint, as attempts.jsonl or, while it works, status.json describes it."""
    from runner.ledger import attempts

    status = checkpoint.run.read_status()
    current = {**status.get("attempt", {}), "to_step": status.get("step", 0)}
    known = [line for line in (*attempts(checkpoint.run), current) if line.get("from_step") is not None]
    began = [attempt for attempt in known if attempt["from_step"] < checkpoint.step]
    reached = [attempt for attempt in began if checkpoint.step <= attempt.get("to_step", 0)]
    return (reached or began or [{}])[-1]  # one that was killed may have come further than it had time to note
