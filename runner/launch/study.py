"""A search: what was suggested for each trial, and the run that each became. It is a folder beside the runs.

`study.json` holds the suggestions alone. What came of them is read from the runs, so nothing can contradict them:
a search that goes on is told what was suggested before, finds those runs finished, and computes only what is left.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from runner import files
from runner.config.schema import checked
from runner.errors import STOPPED, ConfigError, HoldfastError
from runner.launch import local, members, status_table
from runner.launch.local import Local
from runner.launch.members import Member, Result
from runner.rundir import layout
from runner.rundir.layout import RunDir
from runner.text import display_path

STUDY = "study.json"
DIRECTIONS = {"min": "minimize", "max": "maximize"}
UNIT = (Ge(0), Le(1))


@dataclass(frozen=True, kw_only=True)
class Search:
    """`n_trials`: in all, with those of earlier starts. `n_jobs`: so many are suggested at once; null: as go at once.

    `direction`: what score.mode says, or null. `max_failure_rate`: more failures among those suggested at once end it.
    """

    n_trials: Annotated[int, Ge(1)] = 20
    n_jobs: Annotated[int, Ge(1)] | None = None
    direction: Literal["minimize", "maximize"] | None = None
    max_failure_rate: Annotated[float, *UNIT] = 1.0


OPTIONS = tuple(field.name for field in fields(Search))


class Study:
    """The trials so far, by their numbers: first those that were recorded, then those that come."""

    def __init__(self, place: Path, option: Search, direction: str, typed: Sequence[str]):
        self.place, self.option, self.direction = place, option, direction
        self.typed = [word.removeprefix("++") for word in typed]
        self._forced = {key(word) for word in typed if word.startswith("++")}
        self.lock = ExitStack()
        self._trials: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._known: dict[Path, tuple[Member, Result]] = {}
        if (place / STUDY).exists():
            self._trials = json.loads((place / STUDY).read_text())["trials"]

    def suggested(self, number: int, name: str, value: Any) -> Any:
        """What this trial has for this key: what it had when the search went before, else this value."""
        self._keys.add(name)
        while len(self._trials) <= number:
            self._trials.append({})
        return self._trials[number].setdefault(name, value)

    def words(self, overrides: Sequence[str]) -> list[str]:
        """The overrides of a trial as they were typed: those that are ours to judge begin with `++`."""
        return [f"++{word}" if key(word) in self._forced else word for word in overrides]

    def work(self, batch: Sequence[Member], option: Local, command: Sequence[str]) -> tuple[int, list[float | None]]:
        """Work on the trials of a batch, and write down how all stand. Gives the exit code, and their scores.

        Two trials that are one run are that run. Raises RefusedError where the same search goes already, HoldfastError
        where too many failed.
        """
        batch = [replace(member, own=self._own(member)) for member in batch]
        fresh = list({member.place.path: member for member in batch if member.place.path not in self._known}.values())
        if not self._known:
            self.lock.enter_context(layout.lock_run(RunDir(self.place)))
        files.replace(self.place / STUDY, json.dumps(self._document(), indent=1) + "\n")
        board = status_table.choose([*self.members, *fresh], self.option.n_trials)
        try:
            later = Later(board, self.results)
            results, code = local.run(fresh, option, command, self.place / "output", later)
        finally:
            board.close()
        for member, result in zip(fresh, results, strict=True):
            self._known[member.place.path] = member, result
        members.write(self.place, self.members, self.results)
        scores = [score_of(member) for member in batch]
        failed = sum(value is None for value in scores)
        if code != STOPPED and failed > self.option.max_failure_rate * len(scores):
            rate = f"hydra.sweeper.max_failure_rate={self.option.max_failure_rate:g}"
            raise HoldfastError(f"{failed} of the last {len(scores)} trials failed; {rate} allows no more")
        return code, scores

    def story(self) -> list[str]:
        """How it stands, for a person."""
        scored = [(value, member) for member in self.members if (value := score_of(member)) is not None]
        lines = status_table.drawn(self.members, self.results)
        if scored:
            best = max if self.direction == "maximize" else min
            value, member = best(scored, key=lambda each: each[0])
            lines.append(
                f"best: {member.name}  {member.config.score.metric} {value:.4f}  {display_path(member.place.path)}"
            )
        lines.append("  ".join(display_path(self.place / name) for name in (STUDY, members.SWEEP, members.TABLE)))
        page = shlex.quote(display_path(self.place.parent.parent))
        return [*lines, f"one page about them: python -m runner report {page}"]

    @property
    def members(self) -> list[Member]:
        """The runs so far, each once."""
        return [member for member, _ in self._known.values()]

    @property
    def results(self) -> list[Result]:
        """How they stand."""
        return [result for _, result in self._known.values()]

    def _document(self) -> dict[str, Any]:
        return {"search": self.typed, "direction": self.direction, "trials": self._trials}

    def _own(self, member: Member) -> tuple[str, ...]:
        return tuple(word for word in member.words if key(word) in self._keys)


class Later:
    """A board of all trials, for a batch that comes after so many others."""

    def __init__(self, board: local.Board, earlier: Sequence[Result]):
        self._board, self._earlier = board, earlier

    def changed(self, number: int, result: Result) -> None:
        self._board.changed(len(self._earlier) + number, result)

    def show(self, results: Sequence[Result]) -> None:
        self._board.show([*self._earlier, *results])


def key(word: str) -> str:
    """What an override is about."""
    return word.lstrip("+").partition("=")[0]


def score_of(member: Member) -> float | None:
    """The score of a run that is finished; nothing where it is not, or is no number to compare."""
    value = member.status().get("score") if member.is_finished else None
    return float(value) if value is not None and math.isfinite(value) else None


def read_search_options(options: Any) -> Search:
    """What is chosen for a search. Raises ConfigError."""
    try:
        return checked(Search, options)
    except ConfigError as error:
        raise ConfigError(f"hydra.sweeper.{error}") from None


def study_folder(runs: Path, what: Any) -> Path:
    """Where the search for this is kept, beside the runs; the number of its trials is no part of that."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    return runs / ".sweep" / digest


def search_direction(wanted: str | None, mode: str) -> str:
    """Which way is better. Raises ConfigError where it was chosen against score.mode."""
    meant = DIRECTIONS[mode]
    if wanted not in (None, meant):
        raise ConfigError(
            f"hydra.sweeper.direction: got {wanted}; expected {meant}, as score.mode={mode} says; leave it out"
        )
    return meant
