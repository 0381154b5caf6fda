"""A search: what was suggested for each trial, and the run that each became. It is a folder beside the runs.

`study.json` holds the suggestions alone. What came of them is read from the runs, so nothing can contradict them:
a search that goes on is told what was suggested before, finds those runs finished, and computes only what is left.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le

from runner import files
from runner.config.schema import validate_options
from runner.errors import STOPPED, ConfigError, HoldfastError, RefusedError
from runner.launch import local_sweep, status_table, sweep_members
from runner.launch.local_sweep import LocalOptions, SweepDisplay
from runner.launch.sweep_members import RESULTS_CSV, SWEEP_JSON, MemberResult, SweepMember
from runner.rundir import run_lock
from runner.rundir.layout import RunDir
from runner.text import display_path, format_count

STUDY_JSON = "study.json"
# What score.mode says → Optuna's word for it.
DIRECTIONS = {"min": "minimize", "max": "maximize"}


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a search goes.

    Attributes:
        n_trials: so many in all, with those of earlier starts.
        n_jobs: so many are suggested at once; null: as many as go at once.
        direction: what score.mode says, or null.
        max_failure_rate: a larger part of failures among those suggested at once ends it.
    """

    n_trials: Annotated[int, Ge(1)] = 20
    n_jobs: Annotated[int, Ge(1)] | None = None
    direction: Literal["minimize", "maximize"] | None = None
    max_failure_rate: Annotated[float, Ge(0), Le(1)] = 1.0


OPTIONS = tuple(field.name for field in fields(SearchOptions))


class Study:
    """The trials of a search, by their numbers: first those that were recorded, then those that come.

    Attributes:
        folder: where it is kept.
        options: how the search goes.
        direction: `minimize` or `maximize`.
        typed: the overrides of the command line, ranges included.
        lock: holds the folder for this process from the first batch on; to be entered by whoever searches.
    """

    def __init__(self, folder: Path, options: SearchOptions, direction: str, typed: Sequence[str]):
        self.folder, self.options, self.direction = folder, options, direction
        self.typed = [word.removeprefix("++") for word in typed]
        self._forced = {override_key(word) for word in typed if word.startswith("++")}
        self.lock = ExitStack()
        self._searched_keys: set[str] = set()
        self._known: dict[Path, tuple[SweepMember, MemberResult]] = {}
        self._trials = _read_trials(folder / STUDY_JSON)

    def recall_or_record(self, trial: int, key: str, value: object) -> object:
        """Return what this trial has for this key: what it had when the search went before, else this value."""
        self._searched_keys.add(key)
        while len(self._trials) <= trial:
            self._trials.append({})
        return self._trials[trial].setdefault(key, value)

    def respell(self, overrides: Sequence[str]) -> list[str]:
        """Return the overrides of a trial as they were handed to Hydra: `++` before those it must not judge."""
        return [f"++{word}" if override_key(word) in self._forced else word for word in overrides]

    def work_on_batch(
        self, batch: Sequence[SweepMember], options: LocalOptions, command: Sequence[str]
    ) -> tuple[int, list[float | None]]:
        """Work on the trials of a batch, and write down how all trials stand. Return the exit code and their scores.

        Two trials that are one run are that run.

        Raises:
            RefusedError: the same search goes already.
            HoldfastError: too many of the batch failed.
        """
        batch = [replace(member, distinguishing=self._searched_overrides(member)) for member in batch]
        # A sampler may suggest the same twice: each run is worked on once, and shown once.
        fresh = {member.run_dir.path: member for member in batch if member.run_dir.path not in self._known}
        if not self._known:
            self.lock.enter_context(run_lock.lock_run(RunDir(self.folder)))
        # Before anything is started: what was suggested is never lost, however this process dies.
        files.replace_file(self.folder / STUDY_JSON, json.dumps(self._document(), indent=1) + "\n")
        members = list(fresh.values())
        display = status_table.choose_display([*self.members, *members], self.options.n_trials)
        try:
            shown = OffsetDisplay(display, self.results)
            results, code = local_sweep.run_members(members, options, command, self.folder / "output", shown)
        finally:
            display.close()
        for member, result in zip(members, results, strict=True):
            self._known[member.run_dir.path] = member, result
        sweep_members.write_results(self.folder, self.members, self.results)
        scores = [read_score(member) for member in batch]
        failed = sum(value is None for value in scores)
        if code != STOPPED and failed > self.options.max_failure_rate * len(scores):
            rate = f"hydra.sweeper.max_failure_rate={self.options.max_failure_rate:g}"
            raise HoldfastError(f"{failed} of the last {len(scores)} trials failed; {rate} allows no more")
        return code, scores

    def summary_lines(self) -> list[str]:
        """Return how the search stands, for a person."""
        lines = status_table.format_status_table(self.members, self.results)
        scored = [(value, member) for member in self.members if (value := read_score(member)) is not None]
        if scored:
            best = max if self.direction == "maximize" else min
            value, member = best(scored, key=lambda each: each[0])
            where = display_path(member.run_dir.path)
            lines.append(f"best: {member.name}  {member.config.score.metric} {value:.4f}  {where}")
        if lacking := self.finished_without_score:
            metric, count = lacking[0].config.score.metric, format_count(len(lacking), "finished run")
            lines.append(f"warning: {count} measured no {metric} that is a number: the search learns nothing from that")
        lines.append("  ".join(display_path(self.folder / name) for name in (STUDY_JSON, SWEEP_JSON, RESULTS_CSV)))
        page = shlex.quote(display_path(self.folder.parent.parent))
        return [*lines, f"one page about them: python -m runner report {page}"]

    @property
    def finished_without_score(self) -> list[SweepMember]:
        """The runs that are finished and have no score to compare."""
        return [member for member in self.members if member.is_finished and read_score(member) is None]

    @property
    def optimizes_nothing(self) -> bool:
        """True where runs are finished and not one of them has a score."""
        return bool(self.finished_without_score) and all(read_score(member) is None for member in self.members)

    @property
    def members(self) -> list[SweepMember]:
        """The runs so far, each once."""
        return [member for member, _ in self._known.values()]

    @property
    def results(self) -> list[MemberResult]:
        """The standing of each of them."""
        return [result for _, result in self._known.values()]

    def _document(self) -> dict[str, object]:
        return {"search": self.typed, "direction": self.direction, "trials": self._trials}

    def _searched_overrides(self, member: SweepMember) -> tuple[str, ...]:
        return tuple(word for word in member.words if override_key(word) in self._searched_keys)


def _read_trials(path: Path) -> list[dict[str, object]]:
    """Return what was suggested for each trial before; nothing where the search is new.

    Raises RefusedError where the file is there and is not what a search writes: to begin anew would be to suggest other
    trials beside those that were paid for.
    """
    try:
        content = files.read_file(path)
        trials = files.parse_json(content)["trials"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError):
        trials = None
    if not isinstance(trials, list) or not all(isinstance(trial, dict) for trial in trials):
        what = "is not what a search writes; bring it back, or remove it to begin anew"
        raise RefusedError(f"{display_path(path)}: {what}")
    return trials


class OffsetDisplay:
    """A display of all trials, for a batch whose numbers begin after those of earlier batches."""

    def __init__(self, display: SweepDisplay, earlier: Sequence[MemberResult]):
        self._display, self._earlier = display, earlier

    def show_change(self, number: int, result: MemberResult) -> None:
        """Show that one run of the batch stands otherwise than before."""
        self._display.show_change(len(self._earlier) + number, result)

    def show(self, results: Sequence[MemberResult]) -> None:
        """Show how all trials stand."""
        self._display.show([*self._earlier, *results])


def override_key(word: str) -> str:
    """Return the key of an override: `optim.lr` of `++optim.lr=0.1`."""
    return word.lstrip("+").partition("=")[0]


def read_score(member: SweepMember) -> float | None:
    """Return the score of a run; None where it is not finished, or its score is no number to compare."""
    value = member.read_status().get("score") if member.is_finished else None
    return float(value) if value is not None and math.isfinite(value) else None


def read_search_options(options: Mapping[str, object]) -> SearchOptions:
    """Return the options of a search, checked. Raises ConfigError."""
    options = dict(options)
    if isinstance(directions := options.get("direction"), list):
        if len(directions) > 1:
            raise ConfigError(
                f"hydra.sweeper.direction: got {len(directions)}; a search has one score, score.metric; name one"
            )
        # As the plugin's manual writes it.
        options["direction"] = directions[0] if directions else None
    try:
        return validate_options(SearchOptions, options)
    except ConfigError as error:
        raise ConfigError(f"hydra.sweeper.{error}") from None


def study_folder(runs: Path, description: object) -> Path:
    """Return where the search with this description is kept: beside its runs, named by a hash.

    The number of its trials is no part of the description: a search that is given more of them goes on.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:8]
    return runs / ".sweep" / digest


def choose_direction(wanted: str | None, mode: str) -> str:
    """Return which way is better, as Optuna says it. Raises ConfigError where it was chosen against score.mode."""
    meant = DIRECTIONS[mode]
    if wanted not in (None, meant):
        raise ConfigError(
            f"hydra.sweeper.direction: got {wanted}; expected {meant}, as score.mode={mode} says; leave it out, or say "
            f"score.metric=… score.mode={'max' if mode == 'min' else 'min'}"
        )
    return meant
