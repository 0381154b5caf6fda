"""The runs of a sweep here and now: one fresh process each, some beside each other, tried again where that may help.

A fresh process, because jax keeps state between runs of one: settings, caches, memory (measured). What is finished is
not started; what was interrupted goes on by itself, for a run's own command resumes it. One that fails stops no other.
A request to stop is handed on to every run that goes; they save, and the sweep ends as a stopped run does.
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

from runner.errors import CRASHED, STOPPED, ConfigError
from runner.launch.members import Member, Result, ending
from runner.launch.process import hearing, spawn
from runner.preempt.options import STOP_FILE

Thing = TypeVar("Thing")
GPUS = Path("/proc/driver/nvidia/gpus")
VISIBLE = "CUDA_VISIBLE_DEVICES"


LOOK_SECONDS = 0.05  # so often it is looked whether a run has ended
IN_USE_TRIES, IN_USE_SECONDS = 30, 2.0  # a run whose sweep was killed saves first, and lets go then


@dataclass(frozen=True, kw_only=True)
class Local:
    """`parallel`: so many runs beside each other, which share cores and GPUs. `retries`: so often after a crash."""

    parallel: Annotated[int, Ge(1)] = 1
    retries: Annotated[int, Ge(0)] = 1


class Board(Protocol):
    """Who is shown how the sweep stands."""

    def show(self, results: Sequence[Result]) -> None: ...
    def changed(self, number: int, result: Result) -> None: ...


@dataclass(frozen=True)
class Process:
    """A run that goes, on one share of the machine."""

    number: int
    share: Share
    handle: subprocess.Popen[bytes]
    output: Path
    began: float


class Crew:
    """The processes that go, and the signals that are handed on to them."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.going: list[Process] = []

    def ask(self, number: int) -> None:
        """Have every process that goes hear it, and start no other."""
        self.asked = number
        for process in self.going:
            if process.handle.poll() is None:
                process.handle.send_signal(number)

    def hear(self, number: int, frame: FrameType | None) -> None:
        """A signal came."""
        self.ask(number)


def run(
    members: Sequence[Member], option: Local, command: Sequence[str], outputs: Path, board: Board
) -> tuple[list[Result], int]:
    """Work on every member that is not finished; `command` is what its words are added to.

    Gives how each stands at the end, and the exit code of the sweep.
    """
    results = [Result("finished" if member.is_finished else "waiting") for member in members]
    crew, free = Crew(), shares(option.parallel)
    not_before = [0.0] * len(members)
    with hearing(crew.hear):
        while crew.going or (crew.asked is None and any(result.state == "waiting" for result in results)):
            now = time.monotonic()
            ready = [i for i, result in enumerate(results) if result.state == "waiting" and not_before[i] <= now]
            while ready and free and crew.asked is None:
                number = ready.pop(0)
                crew.going.append(_begun(members[number], number, free.pop(0), command, outputs))
                results[number] = replace(results[number], state="running", tries=results[number].tries + 1, why="")
                board.changed(number, results[number])
                if crew.asked is not None:  # it came between: the process was not among those that heard it
                    crew.ask(crew.asked)
            for process in [each for each in crew.going if each.handle.poll() is not None]:
                crew.going.remove(process)
                free.insert(0, process.share)
                number, member = process.number, members[process.number]
                results[number] = _ended(member, results[number], process, option, crew.asked)
                not_before[number] = time.monotonic() + (IN_USE_SECONDS if results[number].code else 0.0)
                board.changed(number, results[number])
                if results[number].state == "stopped" and results[number].why != STOP_FILE and crew.asked is None:
                    crew.ask(signal.SIGTERM)  # the machine goes away, or its time is over: so it is for the others
            board.show(results)
            time.sleep(LOOK_SECONDS)
    board.show(results)
    return results, STOPPED if crew.asked is not None else code_of(results)


def code_of(results: Sequence[Result]) -> int:
    """The exit code of a sweep whose runs stand so."""
    if any(result.state == "stopped" for result in results):
        return STOPPED
    return CRASHED if any(result.state != "finished" for result in results) else 0


def _begun(member: Member, number: int, share: Share, command: Sequence[str], outputs: Path) -> Process:
    output = outputs / f"{member.place.path.name}.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as out:
        handle = spawn(
            [*command, *member.words], share.environment, cores=share.cores, stdin=subprocess.DEVNULL, output=out
        )
    return Process(number, share, handle, output, time.monotonic())


def _ended(member: Member, result: Result, process: Process, option: Local, asked: int | None) -> Result:
    """How it stands now: `waiting` where it is to be tried again."""
    code = process.handle.returncode
    state, why = ending(member, code, last_line(process.output))
    if asked is not None and code == -asked:  # it was not listening yet: nothing was done that could have been lost
        state, why = "stopped", "stopped before it began"
    seconds = result.seconds + time.monotonic() - process.began
    result = replace(result, state=state, seconds=seconds, code=code, why=why)
    again = (state == "failed" and (code == CRASHED or code < 0) and result.tries <= option.retries) or (
        state == "in use" and result.tries < IN_USE_TRIES
    )
    return replace(result, state="waiting") if again and asked is None else result


def last_line(output: Path) -> str:
    """The last line that is not empty, of the last few kilobytes."""
    with output.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 8192, 0))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


@dataclass(frozen=True)
class Share:
    """The cores a process may use (none: all), and what its environment has beside ours."""

    cores: frozenset[int] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)


def shares(parallel: int) -> list[Share]:
    """As many shares as runs go beside each other. Raises ConfigError where there are fewer GPUs than that."""
    if parallel == 1:
        return [Share()]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    devices = [] if os.environ.get("JAX_PLATFORMS") == "cpu" else gpus(os.environ.get(VISIBLE), GPUS)
    if devices and len(devices) < parallel:
        raise ConfigError(
            f"hydra.launcher.parallel={parallel}: this machine has {len(devices)} GPU(s), and a GPU takes one run; "
            f"say parallel={len(devices)}"
        )
    return [
        Share(frozenset(mine), {VISIBLE: ",".join(own)} if devices else {})
        for mine, own in zip(dealt(cores, parallel), dealt(devices, parallel), strict=True)
    ]


def dealt(things: Sequence[Thing], parts: int) -> list[list[Thing]]:
    """Equal parts; what is left over is nobody's: how many cores a run has decides the last bits of its results."""
    size = len(things) // parts
    return [list(things[place * size : (place + 1) * size]) for place in range(parts)]


def gpus(visible: str | None, folder: Path) -> list[str]:
    """The GPUs that a process may use, as CUDA names them: what the environment says, else what the driver lists."""
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        return [str(number) for number in range(len(list(folder.iterdir())))]
    except OSError:
        return []
