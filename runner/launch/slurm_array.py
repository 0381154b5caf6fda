"""A sweep as a Slurm job array: what no job has and nobody works on is submitted, one task for each run.

Nothing waits: the client may die at any moment, and typed again it attaches to what is queued or running. What is left
to do is decided from the queue, the run locks and the run directories.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from runner import files
from runner.errors import RefusedError
from runner.launch import members
from runner.launch.members import Member, Result
from runner.launch.slurm_job import Slurm, command_line, script, unmake
from runner.launch.slurm_queue import FOLDER, NOTHING, SUBMITTED, Job, ask, look_for_sbatch, most_tasks, queued, same
from runner.rundir import layout
from runner.rundir.layout import RunDir, is_in_use


def submit(sweep: Sequence[Member], place: Path, options: Slurm) -> tuple[list[Result], list[str]]:
    """Submit what is left; `place` is the sweep's folder. Gives how each run stands, and the jobs to cancel for all.

    Raises RefusedError where Slurm cannot be asked or does not take it, and where the same is done at this moment.
    """
    desk = RunDir(place.parent.parent / FOLDER)
    fresh = [folder for folder in (place, desk.path) if not folder.exists()]
    # Two sweeps that share runs are submitted one after the other; sbatch keeps the lock where we die before it ends.
    with layout.lock_run(desk) as held, layout.lock_run(RunDir(place)):
        try:
            results, jobs = _submitted(sweep, place, options, held)
        except RefusedError:
            unmake(*fresh)
            raise
        members.write(place, sweep, results)
    return results, _to_cancel(jobs, place)


def text(tasks: Mapping[int, Member], place: Path, options: Slurm) -> str:
    """The array of these members: number → member. It can be read, and submitted again by hand."""
    numbers = ",".join(_ranges(list(tasks))) + (f"%{options.parallel}" if options.parallel else "")
    cases = [f"    {number}) run=({command_line(member.words, options)}) ;;" for number, member in tasks.items()]
    return script(
        {str(number): member.place.path for number, member in tasks.items()},
        place.parent.parent.name,
        place / "slurm/%A_%a.out",
        [f"--array={numbers}"],
        options,
        ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"],
    )


def _submitted(sweep: Sequence[Member], place: Path, options: Slurm, held: int) -> tuple[list[Result], list[Job]]:
    if all(member.is_finished for member in sweep):
        return [Result("finished")] * len(sweep), []
    look_for_sbatch()
    known = queued()
    results = [_standing(member, known) for member in sweep]
    jobs = [known[same(m.place.path)] for m, result in zip(sweep, results, strict=True) if result.job]
    tasks = {number: sweep[number] for number, result in enumerate(results) if result.state == "waiting"}
    try:
        for number, job in _arrays(tasks, place, options, held):
            jobs.append(job)
            results[number] = Result("queued", job=str(job), why=_before(sweep[number]))
    except RefusedError as error:
        if not any(job.state == SUBMITTED for job in jobs):
            raise
        why = str(error).removesuffix(NOTHING)
        results = [replace(result, why=why) if result.state == "waiting" else result for result in results]
    return results, jobs


def _arrays(tasks: Mapping[int, Member], place: Path, options: Slurm, held: int) -> Iterator[tuple[int, Job]]:
    """Submit them in as many arrays as the cluster makes of them. Gives who is in which job, array after array."""
    most, before = most_tasks() if tasks else 1, ""
    for first, numbers in groupby(tasks, key=lambda number: number // most * most):
        part = {number - first: tasks[number] for number in numbers}
        content = text(part, place, options)
        # Named by its content, so that what a job in the queue was made from is never written over.
        path = place / "slurm" / f"{hashlib.sha256(content.encode()).hexdigest()[:8]}.sbatch"
        files.replace(path, content)
        # `parallel` is counted within an array: the next begins when the one before it is through.
        later = [f"--dependency=afterany:{before}"] if before and options.parallel else []
        before = ask("sbatch", "--parsable", *later, str(path), holding=[held]).split(";")[0]
        for number in part:
            yield first + number, Job(f"{before}_{number}", SUBMITTED, "", path)


def _standing(member: Member, known: Mapping[Path, Job]) -> Result:
    """How a member stands: `waiting` where it is to be submitted.

    The queue was asked before: a job that has left it since has written how the run ended.
    """
    job = known.get(same(member.place.path))
    if job is None and is_in_use(member.place):
        return Result("in use", why="left out: a process that is no job works on it")
    if member.is_finished:
        return Result("finished")
    if job is None:
        return Result("waiting")
    return Result("running" if job.state == "running" else "queued", job=str(job))


def _before(member: Member) -> str:
    """Why the last attempt ended badly."""
    status = member.status()
    return f"{status['state']} before: {status.get('why', '')}" if status.get("state") in ("failed", "diverged") else ""


def _to_cancel(jobs: Sequence[Job], place: Path) -> list[str]:
    """The array as a whole where it is this sweep's, else single tasks: others go on."""
    own = place / "slurm"
    return list(dict.fromkeys(job.name.partition("_")[0] if job.script.parent == own else job.name for job in jobs))


def _ranges(numbers: Sequence[int]) -> list[str]:
    """`0-2`, `5`: ascending numbers as Slurm writes them."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
