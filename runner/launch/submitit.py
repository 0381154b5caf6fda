"""A sweep through hydra-submitit-launcher: it takes one errand a run to a worker, and we wait for what came of each.

An errand starts the run's own command there, a process of its own: what is pickled is a few words, and the run is the
same as alone. The worker hears the signals, and hands them on; when the run has saved and stopped, it calls the handler
that submitit had put there, which requeues the job as submitit does, with its own count of timeouts.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig

from runner.errors import CRASHED, STOPPED, ConfigError, RefusedError
from runner.launch.local import code_of, last_line
from runner.launch.members import Member, Result, ending
from runner.launch.process import hearing, spawn
from runner.launch.slurm_queue import ask
from runner.preempt import slurm
from runner.rundir.layout import is_in_use
from runner.text import display_path

NAMES = HERE, SLURM = ("submitit_local", "submitit_slurm")
INSTALL = 'pip install -c constraints.txt -e ".[submitit]"'
BEING_ENDED = ("COMPLETING", "CANCELLED", "PREEMPTED")  # Slurm has decided already whether it comes back

# Has a worker do the errand for the jobs with these numbers, each called so; gives what each returned.
Carry = Callable[["Errand", Mapping[int, str]], Sequence[Any]]


@dataclass(frozen=True)
class Submitit:
    """What was chosen: the launcher, its options, and how to have it carry an errand."""

    name: str
    options: Mapping[str, Any]
    carry: Carry

    def __post_init__(self) -> None:
        for option in ("nodes", "tasks_per_node"):
            if self.options.get(option, 1) != 1:
                raise ConfigError(f"hydra.launcher.{option}: got {self.options[option]}; a run is one process; say 1")


@dataclass(frozen=True)
class Errand:
    """What a worker does for one run. `command` is what its words are added to; `flags` are those of every run."""

    command: tuple[str, ...]
    flags: tuple[str, ...]
    outputs: Path

    def __call__(self, _: Any) -> int:
        """The exit code of the run. Where the job is requeued it does not return."""
        hydra, heard, going = HydraConfig.get(), list[int](), list["subprocess.Popen[bytes]"]()
        words = [word.removeprefix("++") for word in hydra.overrides.task]

        def hear(number: int, frame: FrameType | None) -> None:
            heard.append(number)
            if going and len(heard) == 1:  # a second one would have it leave without saving
                going[0].send_signal(number)

        with hearing(hear), _output(self.outputs, hydra.job.name).open("ab") as output:
            command = [sys.executable, *self.command, *self.flags, *words]
            going.append(spawn(command, {}, stdin=subprocess.DEVNULL, output=output))
            if heard:  # it came between
                going[0].send_signal(heard[0])
            code = going[0].wait()
        if code != STOPPED and -code not in heard:  # of a signal dies who did not listen yet: nothing was lost
            return code
        _requeue(heard)
        return STOPPED


def run(members: Sequence[Member], option: Submitit, errand: Errand) -> tuple[list[Result], int]:
    """Have every member worked on that is not finished, and wait.

    Gives how each stands at the end, and the exit code of the sweep.
    """
    results = [_standing(member) for member in members]
    left = {number: members[number] for number, result in enumerate(results) if result.state == "waiting"}
    if left:
        print(f"{len(left)} to hydra/launcher={option.name}; what they say: {display_path(errand.outputs)}", flush=True)
        names = {number: re.sub(r"[^A-Za-z0-9.-]", "_", member.place.path.name) for number, member in left.items()}
        try:
            returned = option.carry(errand, names)
        except RuntimeError as error:  # as submitit's are: of one job, and the others it does not wait for
            returned = [error] * len(left)
        except KeyboardInterrupt:
            print(f"{option.name}: jobs that were submitted go on; the same command tells how they stand")
            raise
        for (number, member), came in zip(left.items(), returned, strict=True):
            results[number] = _ended(member, came, _output(errand.outputs, names[number]))
    return results, code_of(results)


def _standing(member: Member) -> Result:
    if member.is_finished:
        return Result("finished")
    if is_in_use(member.place):
        return Result("in use", why="left out: a process works on it")
    return Result("waiting")


def _ended(member: Member, came: Any, output: Path) -> Result:
    """How it stands, from its exit code; where there is none, from what is on disk."""
    if isinstance(came, int):
        state, why = ending(member, came, last_line(output) if output.exists() else "")
        return Result(state, 1, code=came, why=why)
    if member.is_finished:
        return Result("finished", 1)
    if is_in_use(member.place):
        return Result("running", 1, why="goes on; the same command tells how it stands then")
    job = re.match(r"Job (\S+) .*\(state: (\w+)", str(came), re.DOTALL)
    why = f"job {job[1]} is {job[2].lower()}, with no result" if job else str(came).strip().splitlines()[0]
    if member.status().get("state") == "preempted":
        return Result("stopped", 1, code=STOPPED, why=why)
    return Result("failed", 1, code=CRASHED, why=why)


def _output(outputs: Path, name: str) -> Path:
    """What a run says, as in a sweep on this machine."""
    outputs.mkdir(parents=True, exist_ok=True)
    return outputs / f"{name}.txt"


def _requeue(heard: Sequence[int]) -> None:
    """Have submitit start this job again, where that is to be; does not return then.

    In a Slurm job whatever made the run stop, as our own recipe does; elsewhere only what submitit itself asks for.
    """
    asks = [number for number in (signal.SIGUSR2, signal.SIGUSR1) if callable(signal.getsignal(number))]
    name = slurm.job(os.environ)
    if not asks or (name is None and asks[0] not in heard):
        return
    if name is not None:
        known = ""
        with suppress(RefusedError):
            known = ask("scontrol", "-o", "show", "job", name)
        if re.search(rf"\bJobState=({'|'.join(BEING_ENDED)})\b", known):
            sys.exit(STOPPED)  # with no result: its client goes by what Slurm says
    handler: Any = signal.getsignal(asks[0])
    try:
        handler(asks[0], None)
    except (RuntimeError, subprocess.SubprocessError, OSError) as error:  # too many timeouts, or Slurm refused
        print(f"it is not requeued: {error}; the same command goes on where it stopped")
