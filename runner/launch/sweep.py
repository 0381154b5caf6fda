"""Work on a sweep from beginning to end: which runs there are → all admitted → what is left → what came of each."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from runner.config.schema import Config
from runner.errors import CRASHED, STOPPED, ConfigError, RefusedError
from runner.installation import find_typed_program
from runner.launch import local_sweep, slurm_array, status_table, submitit_sweep, sweep_members
from runner.launch.command_line import RunRequest, SearchRequest, SweepRequest
from runner.launch.local_sweep import LocalOptions
from runner.launch.parent_report import ParentReport
from runner.launch.slurm_job import SlurmOptions
from runner.launch.slurm_queue import require_sbatch
from runner.launch.study import Study
from runner.launch.submitit_sweep import SubmititOptions, WorkerTask
from runner.launch.sweep_members import RESULTS_CSV, SWEEP_JSON, MemberResult, SweepMember
from runner.rundir import run_lock
from runner.rundir.layout import RunDir
from runner.session.standing import find_run, inspect_run
from runner.text import display_path


def launch_sweep(request: SweepRequest, report: ParentReport) -> int:
    """Have every run worked on that is not finished, by the launcher that was chosen. Return the exit code.

    `report` is told of every run: which there are before anything is started, and how they stand at the end.

    Raises before anything is started: ConfigError where two are one run, RefusedError where one may not be worked on
    or the same sweep goes already.
    """
    refuse_one_of_several(request.runs[0].config, "-m", "a sweep")
    members = _admit_members(request.runs)
    sweep_members.refuse_duplicates(members)
    if isinstance(request.launcher, SubmititOptions):
        return _run_on_workers(members, request.launcher, request.runs[0], report)
    if isinstance(request.launcher, SlurmOptions):
        report.refuse_jobs("hydra/launcher=slurm")
        return _submit_to_slurm(members, request.launcher)
    return _run_here(members, request.launcher, report)


def launch_search(request: SearchRequest, report: ParentReport) -> int:
    """Work on one batch of trials after the other until the search is done. Return the exit code."""
    codes: list[int] = []
    studies: list[Study] = []

    def work_on_batch(batch: SweepRequest, study: Study) -> Sequence[float | None]:
        assert isinstance(batch.launcher, LocalOptions), "a search with another launcher is refused before"
        refuse_one_of_several(batch.runs[0].config, "-m", "a search")
        members = _admit_members(batch.runs)
        report.tell_members(members)
        code, scores = study.work_on_batch(members, batch.launcher, [sys.executable, *find_typed_program()])
        report.tell_members(study.members, study.results)
        codes.append(code)
        studies.append(study)
        if code == STOPPED:
            # The only way to have a sweeper of Hydra's ask for no more runs.
            raise SystemExit(STOPPED)
        return scores

    try:
        request.search(work_on_batch)
    except SystemExit:
        if STOPPED not in codes:
            raise
    if STOPPED in codes:
        return STOPPED
    # Not a success: there is nothing to choose by, which the last lines say.
    none = CRASHED if studies and studies[-1].optimizes_nothing else 0
    return next((code for code in codes if code), none)


def refuse_one_of_several(config: Config, word: str, what: str) -> None:
    """Raise ConfigError where this process is one of several: what starts other processes is done once.

    Args:
        config: of a run.
        word: of the command line, that asks for it.
        what: is started by one process.
    """
    if place := config.hosts.find_place(os.environ):
        raise ConfigError(
            f"{word}: this is process {place.index} of {place.count}, and {what} is started by one; type it outside of "
            "srun and mpirun, without HOLDFAST_HOSTS and hosts=env"
        )


def _run_here(members: Sequence[SweepMember], options: LocalOptions, report: ParentReport) -> int:
    """Work on the runs in processes of this machine."""
    folder = sweep_members.sweep_folder(members)
    report.tell_members(members)
    with run_lock.lock_run(RunDir(folder)):
        display = status_table.choose_display(members)
        command = [sys.executable, *find_typed_program()]
        try:
            results, code = local_sweep.run_members(members, options, command, folder / "output", display)
        finally:
            display.close()
        sweep_members.write_results(folder, members, results)
    report.tell_members(members, results)
    _print_results(members, results, folder)
    return code


def _run_on_workers(
    members: Sequence[SweepMember], options: SubmititOptions, first: RunRequest, report: ParentReport
) -> int:
    """Have submitit's workers work on the runs, and wait for them."""
    folder = sweep_members.sweep_folder(members)
    report.tell_members(members)
    flags = tuple(word for word in first.command.words if word.startswith("-") or word not in first.command.overrides)
    if options.name == submitit_sweep.SUBMITIT_SLURM and not all(member.is_finished for member in members):
        require_sbatch(options.name)
    # An absolute path: a worker need not start in this directory.
    task = WorkerTask(find_typed_program(), flags, (folder / "output").resolve())
    with run_lock.lock_run(RunDir(folder)):
        results, code = submitit_sweep.run_members_on_workers(members, options, task)
        sweep_members.write_results(folder, members, results)
    report.tell_members(members, results)
    _print_results(members, results, folder)
    return code


def _submit_to_slurm(members: Sequence[SweepMember], options: SlurmOptions) -> int:
    """Leave the runs to Slurm job arrays, and say which job has which."""
    if any(member.config.train.steps == 0 for member in members):
        raise ConfigError("train.steps=0: evaluates here and now; leave hydra/launcher=slurm out")
    for member in members:
        options.check_hosts(member.config)
    folder = sweep_members.sweep_folder(members)
    results, jobs = slurm_array.submit_array(members, folder, options)
    _print_results(members, results, folder)
    if jobs:
        print(f"look: squeue -r -j {','.join(jobs)}  save and stop for good: scancel {' '.join(jobs)}")
        print("the same command says how each stands, and submits what is left")
    left = [result for result in results if result.state == "waiting"]
    return RefusedError.exit_code if left else 0


def _admit_members(runs: Sequence[RunRequest]) -> list[SweepMember]:
    """Return the runs, each where it lives. Raises ConfigError or RefusedError where one may not be worked on so."""
    distinguishing = sweep_members.find_distinguishing_overrides([run.command.words for run in runs])
    members = []
    for run, own in zip(runs, distinguishing, strict=True):
        members.append(SweepMember(run.config, run.command.words, _admit_run(run), own))
    if any(member.config.resume == "never" for member in members):
        raise ConfigError("resume=never: a sweep goes on with its runs when it is typed again; leave it out")
    return members


def _admit_run(run: RunRequest) -> RunDir:
    """Return the directory of a run. Raises RefusedError where it may not be worked on like this."""
    run_dir = find_run(run.config, run.command.overrides)
    inspect_run(run_dir, run.config)
    return run_dir


def _print_results(members: Sequence[SweepMember], results: Sequence[MemberResult], folder: Path) -> None:
    print("\n".join(status_table.format_status_table(members, results)))
    print(f"{display_path(folder / SWEEP_JSON)}  {display_path(folder / RESULTS_CSV)}")
    print(f"one page about them: python -m runner report {shlex.quote(display_path(folder.parent.parent))}")
