"""The end of a Slurm job: its time limit, or earlier, where another job takes its place (PreemptMode with GraceTime).

Slurm tells only some processes, and those late; the end it has in its books is true for all, and moves at once when the
job is preempted or its limit is changed. So it is read again now and then, but seldom: a poll goes to the one
controller that a whole cluster shares.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runner.preempt.metadata import NoAnswer, Notice, Poll, cancel_nothing

if TYPE_CHECKING:
    from runner.preempt.options import SlurmJobEnd


END = "SLURM_JOB_END_TIME"
MOST_OF_THE_JOB = 0.5  # a job shorter than its lead would stop as it begins, be requeued, and stop again, for ever
THIS_CENTURY, NEXT_CENTURY = 10**9, 4 * 10**9


def own_job_id(environment: Mapping[str, str]) -> str | None:
    """This job as Slurm names it: `17`, or `17_3` in an array, whose members a bare number may mean all together."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID") or None


def parse_job_end(text: str, now: float, lead_seconds: float) -> Notice | None:
    """The end of the job, from what squeue says: seconds since 1970; None for N/A, nothing, several jobs or junk.

    An end that has passed is one as well: Slurm kills a little later than it says, nobody knows when.
    """
    said = text.strip()
    if not (said.isascii() and said.isdecimal() and THIS_CENTURY < int(said) < NEXT_CENTURY):
        return None
    ends = float(said)
    return Notice("the end of the Slurm job", ends if ends > now else None, ends - lead_seconds)


def poll_slurm(option: SlurmJobEnd) -> list[Poll]:
    """One poll, inside a job; none elsewhere."""
    name = own_job_id(os.environ)
    if name is None:
        return []

    leads: list[float] = []  # one, from the first answer on

    def ask() -> Notice | None:
        said, now = _said(name, option.timeout_seconds), time.time()
        if not leads and (first := parse_job_end(said, now, 0.0)) and first.ends_at:
            leads.append(min(option.lead_seconds, (first.ends_at - now) * MOST_OF_THE_JOB))
        return parse_job_end(said, now, leads[0] if leads else option.lead_seconds)

    return [Poll(ask, cancel_nothing, option.poll_seconds)]


def _said(name: str, timeout_seconds: float) -> str:
    """The end of the job as squeue knows it, or as it was at its beginning where squeue is of no help."""
    try:
        return _squeue(name, timeout_seconds)
    except NoAnswer:
        if END not in os.environ:  # older than Slurm 23
            raise
        return os.environ[END]


def _squeue(name: str, timeout_seconds: float) -> str:
    """What squeue says about the end of the job. Raises Silence."""
    command = ["squeue", "--noheader", f"--jobs={name}", "--format=%e"]
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}  # else local time, without a zone, as the user likes it
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise NoAnswer(str(error)) from None
    return done.stdout
