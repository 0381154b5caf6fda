"""Leave a sweep to hydra-submitit-launcher: it takes one task a run to a worker, and we wait for what came of each.

A task starts the run's own command on its worker, a process of its own: what is pickled is a few words, and the run is
the same as alone. The worker hears the signals, and forwards them; when the run has saved and stopped, it calls the
handler that submitit had put there, which requeues the job as submitit does, with its own count of timeouts.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from hydra.core.hydra_config import HydraConfig

from runner import files
from runner.errors import CRASHED, STOPPED, ConfigError, RefusedError
from runner.launch.child_process import handle_signals, spawn_child
from runner.launch.handover import describe_checked
from runner.launch.local_sweep import read_last_line, sweep_exit_code
from runner.launch.slurm_queue import call_slurm
from runner.launch.sweep_members import MemberResult, SweepMember, classify_exit
from runner.preempt import slurm
from runner.rundir.run_lock import is_in_use
from runner.text import display_path

SUBMITIT_SLURM = "submitit_slurm"
SUBMITIT_LAUNCHERS = ("submitit_local", SUBMITIT_SLURM)
INSTALL_SUBMITIT = 'pip install -c constraints.txt -e ".[submitit]"'
# In these states Slurm has decided already whether a job comes back.
ENDING_STATES = ("COMPLETING", "CANCELLED", "PREEMPTED")

# Has a worker do the task for each of these jobs, number → name; returns what came of each, in their order.
RunOnWorkers = Callable[["WorkerTask", Mapping[int, str]], Sequence[object]]


@dataclass(frozen=True)
class SubmititOptions:
    """What was chosen.

    Attributes:
        name: the launcher, one of SUBMITIT_LAUNCHERS.
        options: its options, as the plugin has them.
        run_on_workers: how to have it take tasks to workers.
    """

    name: str
    options: Mapping[str, object]
    run_on_workers: RunOnWorkers

    def __post_init__(self) -> None:
        for option in ("nodes", "tasks_per_node"):
            if self.options.get(option, 1) != 1:
                raise ConfigError(
                    f"hydra.launcher.{option}: got {self.options[option]}; with submitit a run is one process; say 1"
                )


@dataclass(frozen=True)
class WorkerTask:
    """What a worker does for one run; it is pickled and called there.

    Attributes:
        command: what the words of the run are added to, after the interpreter.
        flags: the words that every run has.
        outputs: the folder for what the runs print.
        checked: the variables that say what was checked, by the name of a run's job.
    """

    command: tuple[str, ...]
    flags: tuple[str, ...]
    outputs: Path
    checked: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __call__(self, _: object) -> int:
        """Run it, and return its exit code. Where the job is requeued this does not return."""
        hydra, received, processes = HydraConfig.get(), list[int](), list["subprocess.Popen[bytes]"]()
        words = [word.removeprefix("++") for word in hydra.overrides.task]

        def on_signal(number: int, frame: FrameType | None) -> None:
            received.append(number)
            # The first one alone: a second one would have the run leave without saving.
            if processes and len(received) == 1:
                processes[0].send_signal(number)

        with handle_signals(on_signal), _open_output(self.outputs, hydra.job.name) as output:
            command = [sys.executable, *self.command, *self.flags, *words]
            processes.append(
                spawn_child(command, self.checked.get(hydra.job.name, {}), stdin=subprocess.DEVNULL, output=output)
            )
            # A signal that came while the process was started did not reach it.
            if received:
                processes[0].send_signal(received[0])
            code = processes[0].wait()
        # Killed by a signal that was forwarded, it did not listen yet: nothing was lost, and it is a stop as well.
        if code != STOPPED and -code not in received:
            return code
        _requeue_job(received)
        return STOPPED


def run_members_on_workers(
    members: Sequence[SweepMember], options: SubmititOptions, task: WorkerTask
) -> tuple[list[MemberResult], int]:
    """Have every member worked on that is not finished, and wait.

    Return how each stands at the end, and the exit code of the sweep.
    """
    results = [_judge_before(member) for member in members]
    left = {number: members[number] for number, result in enumerate(results) if result.state == "waiting"}
    if left:
        where = display_path(task.outputs)
        print(f"{len(left)} to hydra/launcher={options.name}; what they say: {where}", flush=True)
        # A name of a job becomes one of a file: what is odd in it is replaced.
        names = {number: re.sub(r"[^A-Za-z0-9.-]", "_", member.run_dir.path.name) for number, member in left.items()}
        checked = {names[number]: describe_checked(member.config, member.run_dir) for number, member in left.items()}
        try:
            returned = options.run_on_workers(replace(task, checked=checked), names)
        # submitit raises for one job, and waits for no other: how those stand is read from disk.
        except RuntimeError as error:
            returned = [error] * len(left)
        except KeyboardInterrupt:
            print(f"{options.name}: jobs that were submitted go on; the same command tells how they stand")
            raise
        for (number, member), what_came in zip(left.items(), returned, strict=True):
            results[number] = _judge_after(member, what_came, _output_file(task.outputs, names[number]))
    return results, sweep_exit_code(results)


def _judge_before(member: SweepMember) -> MemberResult:
    if member.is_finished:
        return MemberResult("finished")
    if is_in_use(member.run_dir):
        return MemberResult("in use", why="left out: a process works on it")
    return MemberResult("waiting")


def _judge_after(member: SweepMember, what_came: object, output: Path) -> MemberResult:
    """Return how a member stands, from its exit code; where an exception came instead, from what is on disk."""
    if isinstance(what_came, int):
        state, why = classify_exit(member, what_came, read_last_line(output) if output.exists() else "")
        return MemberResult(state, 1, code=what_came, why=why)
    if member.is_finished:
        return MemberResult("finished", 1)
    if is_in_use(member.run_dir):
        return MemberResult("running", 1, why="goes on; the same command tells how it stands then")
    job = re.match(r"Job (\S+) .*\(state: (\w+)", str(what_came), re.DOTALL)
    why = f"job {job[1]} is {job[2].lower()}, with no result" if job else str(what_came).strip().splitlines()[0]
    if member.read_status().get("state") == "preempted":
        return MemberResult("stopped", 1, code=STOPPED, why=why)
    return MemberResult("failed", 1, code=CRASHED, why=why)


def _output_file(outputs: Path, name: str) -> Path:
    """Return the file for what a run prints, as in a sweep on this machine."""
    return outputs / f"{name}.txt"


def _open_output(outputs: Path, name: str) -> BinaryIO:
    files.make_folder(outputs)
    return os.fdopen(files.open_file(_output_file(outputs, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab")


def _requeue_job(received: Sequence[int]) -> None:
    """Have submitit start this job again, where that is to be; does not return then.

    In a Slurm job whatever made the run stop, as our own recipe does; elsewhere only for the signal by which submitit
    itself asks for it.
    """
    # The handlers that submitit has put there for its own signal, which an environment variable may choose.
    asks = [number for number in (signal.SIGUSR2, signal.SIGUSR1) if callable(signal.getsignal(number))]
    name = slurm.own_job_id(os.environ)
    if not asks or (name is None and asks[0] not in received):
        return
    if name is not None:
        shown = ""
        with suppress(RefusedError):
            shown = call_slurm("scontrol", "-o", "show", "job", name)
        if re.search(rf"\bJobState=({'|'.join(ENDING_STATES)})\b", shown):
            # Without a result: whoever waits for it goes by what Slurm says.
            sys.exit(STOPPED)
    handler = signal.getsignal(asks[0])
    assert callable(handler)
    try:
        handler(asks[0], None)
    # There were too many timeouts for submitit, or Slurm refused.
    except (RuntimeError, subprocess.SubprocessError, OSError) as error:
        print(f"it is not requeued: {error}; the same command goes on where it stopped")
