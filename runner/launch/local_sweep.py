"""Work on the runs of a sweep on this machine: a fresh process each, some beside each other, with retries.

A fresh process, because jax keeps state between the runs of one: settings, caches, memory (measured). What is finished
is not started; what was interrupted goes on by itself, for a run's own command resumes it. One that fails stops no
other. A request to stop is forwarded to every run that goes; they save, and the sweep ends as a stopped run does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Protocol, TypeVar

from annotated_types import Ge

from runner import files
from runner.errors import CRASHED, STOPPED, ConfigError
from runner.launch.child_process import handle_signals, spawn_child
from runner.launch.handover import describe_checked
from runner.launch.restart_policy import is_crash
from runner.launch.sweep_members import MemberResult, SweepMember, classify_exit
from runner.preempt.preempt_options import STOP_FILE

Item = TypeVar("Item")
# The driver lists its GPUs here. CUDA itself would open a context on each of them to answer.
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

# The time between two looks whether a run has ended.
POLL_SECONDS = 0.05
# A run whose sweep was killed saves first and lets go then: for a minute it is tried again.
IN_USE_TRIES, IN_USE_SECONDS = 30, 2.0
# The end of what a run printed, in which its last line is looked for.
TAIL_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How a sweep goes on this machine.

    Attributes:
        parallel: so many runs beside each other, which share cores and GPUs.
        retries: so often a run that crashed is tried again.
    """

    parallel: Annotated[int, Ge(1)] = 1
    retries: Annotated[int, Ge(0)] = 1


class SweepDisplay(Protocol):
    """What shows a person how a sweep stands."""

    def show(self, results: Sequence[MemberResult]) -> None:
        """Show how all runs stand. Called every time around the loop."""
        ...

    def show_change(self, number: int, result: MemberResult) -> None:
        """Show that one run stands otherwise than before."""
        ...


@dataclass(frozen=True)
class MachineShare:
    """What one of several runs beside each other may use.

    Attributes:
        cores: CPU cores; none: all of ours.
        environment: the variables that say which GPUs.
    """

    cores: frozenset[int] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MemberProcess:
    """The process of the run with this number, on its share of the machine; `began`: on the monotonic clock."""

    number: int
    share: MachineShare
    handle: subprocess.Popen[bytes]
    output: Path
    began: float


class RunningProcesses:
    """The processes that go, and the signals that are forwarded to them."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.processes: list[MemberProcess] = []

    def ask_to_stop(self, number: int) -> None:
        """Send a signal to every process that goes. No other is started after it."""
        self.asked = number
        for process in self.processes:
            if process.handle.poll() is None:
                process.handle.send_signal(number)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal that came."""
        self.ask_to_stop(number)


def run_members(
    members: Sequence[SweepMember],
    options: LocalOptions,
    command: Sequence[str],
    outputs: Path,
    display: SweepDisplay,
) -> tuple[list[MemberResult], int]:
    """Work on every member that is not finished, until each has ended or a stop is asked for.

    Args:
        members: the runs.
        options: how many at once, and how many retries.
        command: what the words of a member are added to.
        outputs: the folder for what the runs print.
        display: shown how they stand.

    Returns:
        How each stands at the end, and the exit code of the sweep.
    """
    results = [MemberResult("finished" if member.is_finished else "waiting") for member in members]
    running, free = RunningProcesses(), share_machine(options.parallel)
    not_before = [0.0] * len(members)
    with handle_signals(running.on_signal):
        while running.processes or (running.asked is None and any(each.state == "waiting" for each in results)):
            now = time.monotonic()
            ready = [i for i, result in enumerate(results) if result.state == "waiting" and not_before[i] <= now]
            while ready and free and running.asked is None:
                number = ready.pop(0)
                running.processes.append(_start_member(members[number], number, free.pop(0), command, outputs))
                results[number] = replace(results[number], state="running", tries=results[number].tries + 1, why="")
                display.show_change(number, results[number])
                # A signal that came while the process was started did not reach it: it was not in the list yet.
                if running.asked is not None:
                    running.ask_to_stop(running.asked)
            for process in [each for each in running.processes if each.handle.poll() is not None]:
                running.processes.remove(process)
                free.insert(0, process.share)
                number = process.number
                results[number] = _judge_end(members[number], results[number], process, options, running.asked)
                not_before[number] = time.monotonic() + (IN_USE_SECONDS if results[number].code else 0.0)
                display.show_change(number, results[number])
                # A run that stopped by itself was told that the machine goes away, or that its time is over: so it is
                # for the others. A STOP file is meant for that run alone.
                result = results[number]
                if result.state == "stopped" and result.why != STOP_FILE and running.asked is None:
                    running.ask_to_stop(signal.SIGTERM)
            display.show(results)
            time.sleep(POLL_SECONDS)
    display.show(results)
    return results, STOPPED if running.asked is not None else sweep_exit_code(results)


def sweep_exit_code(results: Sequence[MemberResult]) -> int:
    """Return the exit code of a sweep whose runs stand so."""
    if any(result.state == "stopped" for result in results):
        return STOPPED
    return CRASHED if any(result.state != "finished" for result in results) else 0


def _start_member(
    member: SweepMember, number: int, share: MachineShare, command: Sequence[str], outputs: Path
) -> MemberProcess:
    output = outputs / f"{member.run_dir.path.name}.txt"
    files.make_folder(output.parent)
    words = [*command, *member.words]
    with os.fdopen(files.open_file(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as out:
        environment = {**share.environment, **describe_checked(member.config, member.run_dir)}
        handle = spawn_child(words, environment, cores=share.cores, stdin=subprocess.DEVNULL, output=out)
    return MemberProcess(number, share, handle, output, time.monotonic())


def _judge_end(
    member: SweepMember, result: MemberResult, process: MemberProcess, options: LocalOptions, asked: int | None
) -> MemberResult:
    """Return how a run stands after the end of its process: `waiting` where it is to be tried again."""
    code = process.handle.returncode
    state, why = classify_exit(member, code, read_last_line(process.output))
    # Killed by the signal that was forwarded, it was not listening yet: nothing was done that could have been lost.
    if asked is not None and code == -asked:
        state, why = "stopped", "stopped before it began"
    seconds = result.seconds + time.monotonic() - process.began
    result = replace(result, state=state, seconds=seconds, code=code, why=why)
    # 75 where it failed: one of its processes has gone.
    crashed = state == "failed" and (is_crash(code) or code < 0 or code == STOPPED)
    again = (crashed and result.tries <= options.retries) or (state == "in use" and result.tries < IN_USE_TRIES)
    return replace(result, state="waiting") if again and asked is None else result


def read_last_line(output: Path) -> str:
    """Return the last line that is not empty, of the last few kilobytes."""
    with os.fdopen(files.open_file(output, os.O_RDONLY), "rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def share_machine(parallel: int) -> list[MachineShare]:
    """Return as many shares as runs go beside each other. Raises ConfigError where there are fewer GPUs than that."""
    if parallel == 1:
        return [MachineShare()]
    # macOS has no affinity: there, all runs share all cores.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = share_gpus(parallel, "hydra.launcher.parallel")
    dealt = zip(deal_equally(cores, parallel), gpus, strict=True)
    return [MachineShare(frozenset(own_cores), environment) for own_cores, environment in dealt]


def share_gpus(parts: int, key: str) -> list[dict[str, str]]:
    """Return the variables by which each of several processes sees its GPUs; empty where there are none to share.

    Raises ConfigError, naming the key that asks for so many processes, where there are fewer GPUs than that.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    gpus = [] if on_cpu else list_gpus(os.environ.get(VISIBLE_DEVICES), NVIDIA_GPUS)
    if not gpus:
        return [{}] * parts
    if len(gpus) < parts:
        raise ConfigError(
            f"{key}={parts}: this machine has {len(gpus)} GPU(s), and a GPU takes one process; say {key}={len(gpus)}"
        )
    return [{VISIBLE_DEVICES: ",".join(own)} for own in deal_equally(gpus, parts)]


def deal_equally(items: Sequence[Item], parts: int) -> list[list[Item]]:
    """Split into equal parts.

    What is left over is nobody's: how many cores a run has decides the last bits of its results.
    """
    size = len(items) // parts
    return [list(items[part * size : (part + 1) * size]) for part in range(parts)]


def list_gpus(visible: str | None, folder: Path) -> list[str]:
    """Return the GPUs a process may use, as CUDA names them: what the environment says, else what the driver lists."""
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        return [str(number) for number in range(len(list(folder.iterdir())))]
    except OSError:
        return []
