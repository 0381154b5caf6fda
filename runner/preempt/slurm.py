"""The end of a Slurm job: its time limit, or earlier, where another job takes its place (PreemptMode with GraceTime).

Slurm signals only some processes, and those late. The end that it has in its books holds for all of them, and moves at
once when the job is preempted or its limit is changed; so it is read again from time to time. Seldom, because every
question goes to the one controller that a whole cluster shares.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from runner.preempt.notice import NoAnswer, Notice, Poll

if TYPE_CHECKING:
    from runner.preempt.preempt_options import SlurmJobEnd

END = "SLURM_JOB_END_TIME"
# A job that is shorter than the wished lead would stop as it begins, be requeued, and stop again, for ever.
LARGEST_LEAD = 0.5
THIS_CENTURY, NEXT_CENTURY = 10**9, 4 * 10**9


def own_job_id(environment: Mapping[str, str]) -> str | None:
    """Return this job as Slurm names it, None outside a job: `17`, or `17_3` for a member of an array.

    The bare number of an array would mean all of its members.
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID") or None


def parse_job_end(text: str, now: float, lead_seconds: float) -> Notice | None:
    """Return the end of a job from what squeue printed, seconds since 1970; None for N/A, several jobs, or junk.

    An end that has passed is a notice as well: Slurm kills a little later than it says, nobody knows when.
    """
    printed = text.strip()
    if not (printed.isascii() and printed.isdecimal() and THIS_CENTURY < int(printed) < NEXT_CENTURY):
        return None
    ends_at = float(printed)
    return Notice("the end of the Slurm job", ends_at if ends_at > now else None, ends_at - lead_seconds)


def poll_slurm(option: SlurmJobEnd) -> list[Poll]:
    """Return one poll for the end of the job that this process is in; none outside a job."""
    job_id = own_job_id(os.environ)
    if job_id is None:
        return []
    # Fixed at the first answer: later ones come when less of the job is left, and would shorten it again and again.
    lead_seconds: float | None = None

    def ask() -> Notice | None:
        nonlocal lead_seconds
        printed, now = _read_end(job_id, option.timeout_seconds), time.time()
        first = parse_job_end(printed, now, 0.0)
        if lead_seconds is None and first and first.ends_at:
            lead_seconds = min(option.lead_seconds, (first.ends_at - now) * LARGEST_LEAD)
        return parse_job_end(printed, now, option.lead_seconds if lead_seconds is None else lead_seconds)

    return [Poll(ask, option.poll_seconds)]


def _read_end(job_id: str, timeout_seconds: float) -> str:
    """Return the end of the job as squeue knows it, or as it was at the start of the job where squeue cannot say."""
    try:
        return _run_squeue(job_id, timeout_seconds)
    except NoAnswer:
        # Slurm before 23 does not set it.
        if END not in os.environ:
            raise
        return os.environ[END]


def _run_squeue(job_id: str, timeout_seconds: float) -> str:
    """Return what squeue prints about the end of the job. Raises NoAnswer."""
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%e"]
    # Otherwise it prints local time, without a zone, in the format that the user has set.
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
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
    # ValueError: what was printed is no text.
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise NoAnswer(str(error)) from None
    return done.stdout
