"""A sweep from beginning to end: which runs there are → all admitted → those that are left → what came of each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.config.schema import Config
from runner.errors import ConfigError, RefusedError
from runner.launch import local, members, slurm_array, status_table, submitit
from runner.launch.command_line import Command
from runner.launch.local import Local
from runner.launch.members import Member, Result
from runner.launch.slurm_job import Slurm
from runner.launch.slurm_queue import look_for_sbatch
from runner.launch.study import Study
from runner.launch.submitit import Errand, Submitit
from runner.rundir import layout
from runner.rundir.layout import RunDir
from runner.session import experiment
from runner.text import display_path


def run(
    runs: Sequence[tuple[Config, Command]], option: Local, study: Study | None = None
) -> tuple[int, list[float | None]]:
    """Work on every run that is not finished. Gives the exit code, and the score of each run.

    With a `study` they are its next trials, and it keeps the books.

    Raises before anything is started: ConfigError where two are one run, RefusedError where one may not be worked on
    or the same sweep goes already.
    """
    sweep = _admitted(runs)
    command = [sys.executable, _script()]
    if study is not None:  # it may suggest the same twice
        return study.work(sweep, option, command)
    members.admit(sweep)
    place = members.folder(sweep)
    with layout.lock_run(RunDir(place)):
        board = status_table.choose(sweep)
        try:
            results, code = local.run(sweep, option, command, place / "output", board)
        finally:
            board.close()
        members.write(place, sweep, results)
    _tell(sweep, results, place)
    return code, _scores(sweep)


def hand_on(runs: Sequence[tuple[Config, Command]], option: Submitit) -> tuple[int, list[float | None]]:
    """Have submitit's workers work on every run that is not finished, and wait. Gives and raises as `run` does."""
    sweep = _admitted(runs)
    members.admit(sweep)
    place = members.folder(sweep)
    command = runs[0][1]
    flags = tuple(word for word in command.words if word.startswith("-") or word not in command.overrides)
    if option.name == submitit.SLURM and not all(member.is_finished for member in sweep):
        look_for_sbatch(option.name)
    errand = Errand((_script(),), flags, (place / "output").resolve())
    with layout.lock_run(RunDir(place)):
        results, code = submitit.run(sweep, option, errand)
        members.write(place, sweep, results)
    _tell(sweep, results, place)
    return code, _scores(sweep)


def submit(runs: Sequence[tuple[Config, Command]], option: Slurm) -> tuple[int, list[float | None]]:
    """Leave every run that is not finished to a job array, and say which job has which. Raises as `run` does."""
    sweep = _admitted(runs)
    members.admit(sweep)
    if any(member.config.train.steps == 0 for member in sweep):
        raise ConfigError("train.steps=0: evaluates here and now; leave hydra/launcher=slurm out")
    place = members.folder(sweep)
    results, jobs = slurm_array.submit(sweep, place, option)
    _tell(sweep, results, place)
    if jobs:
        print(f"look: squeue -r -j {','.join(jobs)}  save and stop for good: scancel {' '.join(jobs)}")
        print("the same command says how each stands, and submits what is left")
    left = [result for result in results if result.state == "waiting"]
    return RefusedError.exit_code if left else 0, _scores(sweep)


def _script() -> str:
    return str(Path(sys.argv[0]).resolve())


def _admitted(runs: Sequence[tuple[Config, Command]]) -> list[Member]:
    """The runs, each where it lives. Raises ConfigError or RefusedError where one may not be worked on so."""
    named = members.distinct([command.words for _, command in runs])
    sweep = [
        Member(config, command.words, experiment.admitted(config, command.overrides), own)
        for (config, command), own in zip(runs, named, strict=True)
    ]
    if any(member.config.resume == "never" for member in sweep):
        raise ConfigError("resume=never: a sweep goes on with its runs when it is typed again; leave it out")
    return sweep


def _tell(sweep: Sequence[Member], results: Sequence[Result], place: Path) -> None:
    print("\n".join(status_table.drawn(sweep, results)))
    print(f"{display_path(place / members.SWEEP)}  {display_path(place / members.TABLE)}")
    print(f"one page about them: python -m runner report {shlex.quote(display_path(place.parent.parent))}")


def _scores(sweep: Sequence[Member]) -> list[float | None]:
    return [member.status().get("score") if member.is_finished else None for member in sweep]
