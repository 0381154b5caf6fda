"""A sweep from beginning to end: which runs there are → all admitted → those that are left → what came of each."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.errors import STOPPED, ConfigError, RefusedError
from runner.launch import local, members, slurm_array, status_table, submitit
from runner.launch.command_line import RunRequest, SearchRequest, SweepRequest
from runner.launch.local import Local
from runner.launch.members import Member, Result
from runner.launch.slurm_job import Slurm
from runner.launch.slurm_queue import look_for_sbatch
from runner.launch.study import Study
from runner.launch.submitit import Errand, Submitit
from runner.rundir import layout
from runner.rundir.layout import RunDir
from runner.session.standing import find_run, inspect_run
from runner.text import display_path


def launch_sweep(request: SweepRequest) -> int:
    """Have every run worked on that is not finished, by the launcher that was chosen. Return the exit code.

    Raises before anything is started: ConfigError where two are one run, RefusedError where one may not be worked on
    or the same sweep goes already.
    """
    sweep = _admitted(request.runs)
    members.admit(sweep)
    if isinstance(request.launcher, Submitit):
        return _hand_on(sweep, request.launcher, request.runs[0])
    if isinstance(request.launcher, Slurm):
        return _submit_array(sweep, request.launcher)
    return _run_here(sweep, request.launcher)


def launch_search(request: SearchRequest) -> int:
    """Work on one batch of trials after the other until the search is done. Return the exit code."""
    codes: list[int] = []

    def work_on_batch(batch: SweepRequest, study: Study) -> Sequence[float | None]:
        assert isinstance(batch.launcher, Local), "a search with another launcher is refused before"
        code, scores = study.work(_admitted(batch.runs), batch.launcher, [sys.executable, _script()])
        codes.append(code)
        if code == STOPPED:
            # The only way to have a sweeper of Hydra's ask for no more runs.
            raise SystemExit(STOPPED)
        return scores

    try:
        request.search(work_on_batch)
    except SystemExit:
        if STOPPED not in codes:
            raise
    return STOPPED if STOPPED in codes else next((code for code in codes if code), 0)


def _run_here(sweep: Sequence[Member], option: Local) -> int:
    """Work on the runs in processes of this machine."""
    place = members.folder(sweep)
    with layout.lock_run(RunDir(place)):
        board = status_table.choose(sweep)
        try:
            results, code = local.run(sweep, option, [sys.executable, _script()], place / "output", board)
        finally:
            board.close()
        members.write(place, sweep, results)
    _tell(sweep, results, place)
    return code


def _hand_on(sweep: Sequence[Member], option: Submitit, first: RunRequest) -> int:
    """Have submitit's workers work on the runs, and wait for them."""
    place = members.folder(sweep)
    flags = tuple(word for word in first.command.words if word.startswith("-") or word not in first.command.overrides)
    if option.name == submitit.SLURM and not all(member.is_finished for member in sweep):
        look_for_sbatch(option.name)
    errand = Errand((_script(),), flags, (place / "output").resolve())
    with layout.lock_run(RunDir(place)):
        results, code = submitit.run(sweep, option, errand)
        members.write(place, sweep, results)
    _tell(sweep, results, place)
    return code


def _submit_array(sweep: Sequence[Member], option: Slurm) -> int:
    """Leave the runs to a Slurm job array, and say which job has which."""
    if any(member.config.train.steps == 0 for member in sweep):
        raise ConfigError("train.steps=0: evaluates here and now; leave hydra/launcher=slurm out")
    place = members.folder(sweep)
    results, jobs = slurm_array.submit(sweep, place, option)
    _tell(sweep, results, place)
    if jobs:
        print(f"look: squeue -r -j {','.join(jobs)}  save and stop for good: scancel {' '.join(jobs)}")
        print("the same command says how each stands, and submits what is left")
    left = [result for result in results if result.state == "waiting"]
    return RefusedError.exit_code if left else 0


def _script() -> str:
    return str(Path(sys.argv[0]).resolve())


def _admitted(runs: Sequence[RunRequest]) -> list[Member]:
    """The runs, each where it lives. Raises ConfigError or RefusedError where one may not be worked on so."""
    named = members.distinct([run.command.words for run in runs])
    sweep = [Member(run.config, run.command.words, _admit_run(run), own) for run, own in zip(runs, named, strict=True)]
    if any(member.config.resume == "never" for member in sweep):
        raise ConfigError("resume=never: a sweep goes on with its runs when it is typed again; leave it out")
    return sweep


def _admit_run(run: RunRequest) -> RunDir:
    """Return the directory of a run. Raises RefusedError where it may not be worked on like this."""
    run_dir = find_run(run.config, run.command.overrides)
    inspect_run(run_dir, run.config)
    return run_dir


def _tell(sweep: Sequence[Member], results: Sequence[Result], place: Path) -> None:
    print("\n".join(status_table.drawn(sweep, results)))
    print(f"{display_path(place / members.SWEEP)}  {display_path(place / members.TABLE)}")
    print(f"one page about them: python -m runner report {shlex.quote(display_path(place.parent.parent))}")
