"""Leave a sweep to Slurm job arrays: what no job has and nobody works on is submitted, one task for each run.

Nothing waits: this process may die at any moment, and the command typed again attaches to what is queued or running.
What is left to do is decided from the queue, the run locks and the run directories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from runner import files
from runner.errors import RefusedError
from runner.launch import sweep_members
from runner.launch.handover import describe_checked
from runner.launch.slurm_job import SlurmOptions, remove_new_folders, render_script, shell_command
from runner.launch.slurm_queue import (
    JOBS_FOLDER,
    NOTHING_SUBMITTED,
    SUBMITTED,
    SlurmJob,
    call_slurm,
    list_queued_runs,
    read_max_array_size,
    require_sbatch,
    run_key,
)
from runner.launch.sweep_members import MemberResult, SweepMember
from runner.rundir import run_lock
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import RunLock, is_in_use


def submit_array(
    members: Sequence[SweepMember], folder: Path, options: SlurmOptions
) -> tuple[list[MemberResult], list[str]]:
    """Submit what is left of a sweep.

    Args:
        members: its runs.
        folder: the sweep's own.
        options: what each job asks for.

    Returns:
        How each run stands, and the names of the jobs to cancel for all of them.

    Raises:
        RefusedError: Slurm cannot be asked or does not take it, or the same is done at this moment.
    """
    jobs_dir = RunDir(folder.parent.parent / JOBS_FOLDER)
    new_folders = [each for each in (folder, jobs_dir.path) if not each.exists()]
    # Two sweeps that share runs are submitted one after the other; sbatch keeps the lock where we die before it ends.
    with run_lock.lock_run(jobs_dir) as lock, run_lock.lock_run(RunDir(folder)):
        try:
            results, jobs = _submit_under_lock(members, folder, options, lock)
        except RefusedError:
            remove_new_folders(*new_folders)
            raise
        sweep_members.write_results(folder, members, results)
    return results, _names_to_cancel(jobs, folder)


def render_array(tasks: Mapping[int, SweepMember], folder: Path, options: SlurmOptions) -> str:
    """Return the script of the array of these members, from task → member."""
    numbers = ",".join(_compress_numbers(list(tasks))) + (f"%{options.parallel}" if options.parallel else "")
    commands = {
        number: shell_command(member.words, options, describe_checked(member.config, member.run_dir))
        for number, member in tasks.items()
    }
    cases = [f"    {number}) run=({command}) ;;" for number, command in commands.items()]
    return render_script(
        {str(number): member.run_dir.path for number, member in tasks.items()},
        folder.parent.parent.name,
        folder / "slurm/%A_%a.out",
        [f"--array={numbers}"],
        options,
        ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"],
    )


def _submit_under_lock(
    members: Sequence[SweepMember], folder: Path, options: SlurmOptions, lock: RunLock
) -> tuple[list[MemberResult], list[SlurmJob]]:
    if all(member.is_finished for member in members):
        return [MemberResult("finished")] * len(members), []
    require_sbatch()
    queued = list_queued_runs()
    results = [_judge_member(member, queued) for member in members]
    jobs = [queued[run_key(each.run_dir.path)] for each, result in zip(members, results, strict=True) if result.job]
    tasks = {number: members[number] for number, result in enumerate(results) if result.state == "waiting"}
    try:
        for number, job in _submit_arrays(tasks, folder, options, lock):
            jobs.append(job)
            results[number] = MemberResult("queued", job=str(job), why=_last_failure(members[number]))
    except RefusedError as error:
        # A limit of the cluster: where it has taken some arrays, those go on, and the rest is said to be left.
        if not any(job.state == SUBMITTED for job in jobs):
            raise
        why = str(error).removesuffix(NOTHING_SUBMITTED)
        results = [replace(result, why=why) if result.state == "waiting" else result for result in results]
    return results, jobs


def _submit_arrays(
    tasks: Mapping[int, SweepMember], folder: Path, options: SlurmOptions, lock: RunLock
) -> Iterator[tuple[int, SlurmJob]]:
    """Submit tasks in as many arrays as the cluster makes of them; yield who is in which job, array after array."""
    max_size, previous = read_max_array_size() if tasks else 1, ""
    # MaxArraySize also bounds the task's number: those of each array begin at 0 again.
    for first, numbers in groupby(tasks, key=lambda number: number // max_size * max_size):
        part = {number - first: tasks[number] for number in numbers}
        content = render_array(part, folder, options)
        # Named by its content, so that what a job in the queue was made from is never written over.
        script = folder / "slurm" / f"{hashlib.sha256(content.encode()).hexdigest()[:8]}.sbatch"
        files.make_folder(script.parent)
        files.replace_file(script, content)
        # `parallel` is counted within an array: the next begins when the one before it is through.
        later = [f"--dependency=afterany:{previous}"] if previous and options.parallel else []
        previous = call_slurm("sbatch", "--parsable", *later, str(script), holding=[lock.handle]).split(";")[0]
        for number in part:
            yield first + number, SlurmJob(f"{previous}_{number}", SUBMITTED, "", script)


def _judge_member(member: SweepMember, queued: Mapping[Path, SlurmJob]) -> MemberResult:
    """Return how a member stands: `waiting` where it is to be submitted.

    The queue was asked before: a job that has left it since has written how the run ended.
    """
    job = queued.get(run_key(member.run_dir.path))
    if job is None and is_in_use(member.run_dir):
        return MemberResult("in use", why="left out: a process that is no job works on it")
    if member.is_finished:
        return MemberResult("finished")
    if job is None:
        return MemberResult("waiting")
    return MemberResult("running" if job.state == "running" else "queued", job=str(job))


def _last_failure(member: SweepMember) -> str:
    """Return why the last attempt ended badly; nothing where it did not."""
    status = member.read_status()
    return f"{status['state']} before: {status.get('why', '')}" if status.get("state") in ("failed", "diverged") else ""


def _names_to_cancel(jobs: Sequence[SlurmJob], folder: Path) -> list[str]:
    """Return the array as a whole where it is this sweep's, else single tasks: the others of that array go on."""
    own = folder / "slurm"
    return list(dict.fromkeys(job.name.partition("_")[0] if job.script.parent == own else job.name for job in jobs))


def _compress_numbers(numbers: Sequence[int]) -> list[str]:
    """Return ascending numbers as Slurm writes them: `0-2`, `5`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return [str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges]
