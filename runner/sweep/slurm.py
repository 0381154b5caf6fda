"""A run as one Slurm job: `python run.py hydra/launcher=slurm …` writes the script and submits it, once.

The script is the recipe that people copy, with the command filled in. One run has one script, at one path: by that
path a job in the queue is known again, so that typing the command twice does not submit it twice.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from runner import rundir
from runner.errors import RefusedError
from runner.rundir import Run, shown

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "slurm.sbatch"
COMMAND = "\nrun=("  # what the recipe runs; the rest of it is the same for everyone
ASK_SECONDS = 120  # a controller that answers nothing for so long is not there
FOLDER = ".slurm"  # beside the runs: a run that turns out wrong takes its directory back, and what it said must stay

Count = Annotated[int, Ge(1)]
Word = str | int | None
OURS = ("--chdir", "--job-name", "--output", "--open-mode", "--signal", "--requeue", "--nodes", "--ntasks", "--array")


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What the job asks for; None leaves it to the cluster. `time` in minutes.

    `signal_seconds`: so long before the time limit the run saves and is requeued. `sbatch`: more options, one a word.
    `setup`: shell lines before the run, such as `module load …`. `python`: what to run it with, instead of this one.
    """

    partition: Word = None
    account: Word = None
    qos: Word = None
    time: Count | None = None
    cpus: Count | None = None
    gpus: Word = None
    mem: Word = None
    signal_seconds: Count = 120
    sbatch: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    python: str | None = None

    def __post_init__(self) -> None:
        if self.time is not None and self.time * 60 <= self.signal_seconds:
            raise ValueError(
                f"signal_seconds: got {self.signal_seconds}; expected less than the job's time of {self.time} min "
                f"({self.time * 60} s), or it would be stopped as soon as it begins"
            )
        for name, word in self._asked().items():
            if len(str(word).split()) != 1:
                raise ValueError(f"{name.removeprefix('--')}: got {word!r}; expected one word")
        for line in self.sbatch:
            if not line.startswith("--") or "\n" in line:
                raise ValueError(f"sbatch: got {line!r}; expected a long option, such as '--constraint=h100'")
            if line.split("=")[0] in OURS:
                raise ValueError(f"sbatch: {line.split('=')[0]} is set by the launcher; leave it out")
        if any("\n" in line for line in self.setup):
            raise ValueError("setup: a line has a line break; write two lines")

    def options(self) -> list[str]:
        """As sbatch reads them."""
        return [*(f"{name}={word}" for name, word in self._asked().items()), *self.sbatch]

    def _asked(self) -> dict[str, Any]:
        words = {"--partition": self.partition, "--account": self.account, "--qos": self.qos, "--time": self.time}
        words |= {"--cpus-per-task": self.cpus, "--mem": self.mem}
        words |= {"--gres": None if self.gpus is None else f"gpu:{self.gpus}"}
        return {name: word for name, word in words.items() if word is not None}


def submit(place: Run, words: Sequence[str], options: Slurm) -> None:
    """Have the run worked on by one job, and say by which; `words` is what to type after `python run.py`.

    Raises RefusedError where Slurm cannot be asked or does not take it, and where a process outside Slurm has the run.
    """
    if not shutil.which("sbatch"):
        raise RefusedError(
            "hydra/launcher=slurm: there is no sbatch here; type this where jobs are submitted, "
            "or leave hydra/launcher out to run it here"
        )
    desk = Run(place.path.parent / FOLDER / place.path.name)
    fresh = not desk.path.exists()
    try:
        with rundir.locked(desk):  # typed in two places at once, it is submitted once
            job, said = _in_queue(place, desk) or _submitted(place, desk, words, options)
    except RefusedError:
        if fresh:
            _unmake(desk.path)
        raise
    output = shown(desk.path / f"{job}.out")
    print(f"{shown(place.path)}: job {job} {said}\nits output: {output}\nsave and stop for good: scancel {job}")


def script(place: Run, desk: Run, words: Sequence[str], options: Slurm) -> str:
    """The job of one run. It can be read, and submitted again by hand."""
    recipe = RECIPE.read_text()
    body = recipe.split(COMMAND, 1)[1].split("\n", 1)[1]
    where = str(desk.path).replace("%", "%%")
    header = [
        f"--job-name={place.path.name}",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(f'{where}/%j.out')}",
        *("--nodes=1 --ntasks=1", "--requeue --open-mode=append", f"--signal=B:USR1@{options.signal_seconds}"),
        *options.options(),
    ]
    command = shlex.join([options.python or sys.executable, str(Path(sys.argv[0]).resolve()), *words])
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in header), "", *options.setup, f"run=({command})"]
    return "\n".join([*lines, body])


def _in_queue(place: Run, desk: Run) -> tuple[str, str] | None:
    """The job that has this run already, and how it stands."""
    answer = _ask("squeue", "-h", f"--name={place.path.name}", "-o", "%i|%T|%r|%o")
    for line in answer.splitlines():
        job, state, reason, command = line.split("|", 3)
        if command.strip() == str(_script_of(desk)):
            why = f" ({reason})" if reason != "None" else ""
            return job, f"has it already: {state.lower()}{why}; nothing was submitted"
    return None


def _submitted(place: Run, desk: Run, words: Sequence[str], options: Slurm) -> tuple[str, str]:
    if place.path.exists():
        with rundir.locked(place):  # raises, naming who works on it
            pass
    path = _script_of(desk)
    rundir.replace(path, script(place, desk, words, options))
    job = _ask("sbatch", "--parsable", str(path)).split(";")[0]
    return job, f"submitted; {shown(path)}"


def _script_of(desk: Run) -> Path:
    return desk.path / "job.sbatch"


def _ask(*command: str) -> str:
    """What a Slurm command prints. Raises RefusedError with its own words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RefusedError(f"{command[0]}: {error}; nothing was submitted") from None
    if done.returncode:
        complaint = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RefusedError(f"{complaint.removeprefix(f'{command[0]}: error: ')}; nothing was submitted")
    return done.stdout.strip()


def _unmake(folder: Path) -> None:
    """Refused at the first try: nothing was written."""
    shutil.rmtree(folder)
    with suppress(OSError):  # not empty: something was there before
        for parent in list(folder.parents)[:3]:
            parent.rmdir()
