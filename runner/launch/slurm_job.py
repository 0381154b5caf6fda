"""A run as one Slurm job: `python run.py hydra/launcher=slurm …` writes the script and submits it, once.

The script is the recipe that people copy, with the command filled in. It names its run: so a job in the queue is known
again (jobs.py), and typing the command twice does not submit it twice.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from runner import files
from runner.errors import RefusedError
from runner.launch.slurm_queue import ALONE, FOLDER, NOTHING, SUBMITTED, Job, ask, look_for_sbatch, marks, queued, same
from runner.rundir import layout
from runner.rundir.layout import RunDir
from runner.text import display_path

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "slurm.sbatch"
COMMAND = "\nrun=("  # what the recipe runs; the rest of it is the same for everyone

Count = Annotated[int, Ge(1)]
Word = str | int | None
OURS = ("--chdir", "--job-name", "--output", "--open-mode", "--signal", "--requeue", "--nodes", "--ntasks", "--array")


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What the job asks for; None leaves it to the cluster. `time` in minutes.

    `signal_seconds`: so long before the time limit the run saves and is requeued. `sbatch`: more options, one a word.
    `setup`: shell lines before the run, such as `module load …`. `python`: what to run it with, instead of this one.
    `parallel`: so many runs of a sweep at once.
    """

    partition: Word = None
    account: Word = None
    qos: Word = None
    time: Count | None = None
    cpus: Count | None = None
    gpus: Word = None
    mem: Word = None
    signal_seconds: Count = 120
    parallel: Count | None = None
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


def submit(place: RunDir, words: Sequence[str], options: Slurm) -> None:
    """Have the run worked on by one job, and say by which; `words` is what to type after `python run.py`.

    Raises RefusedError where Slurm cannot be asked or does not take it, and where a process outside Slurm has the run.
    """
    look_for_sbatch()
    # Beside the runs: one that turns out wrong takes its directory back, and what it said must stay.
    desk = RunDir(place.path.parent / FOLDER / place.path.name)
    fresh = not desk.path.exists()
    try:
        with layout.lock_run(desk) as held:  # typed in two places at once, it is submitted once
            if job := queued().get(same(place.path)):
                reason = f" ({job.reason})" if job.reason else ""
                said = f"has it already: {job.state}{reason}{NOTHING}"
            else:
                job = _submitted(place, desk, words, options, held)
                said = f"submitted; {display_path(job.script)}"
    except RefusedError:
        if fresh:
            unmake(desk.path)
        raise
    print(f"{display_path(place.path)}: job {job.name} {said}\nits output: {display_path(job.output)}")
    print(f"save and stop for good: scancel {job.name}")


def script(
    runs: Mapping[str, Path], name: str, output: Path, header: Sequence[str], options: Slurm, choice: Sequence[str]
) -> str:
    """A job, or an array: task → its run; `choice` are the shell lines that say what `run` is."""
    body = RECIPE.read_text().split(COMMAND, 1)[1].split("\n", 1)[1]
    folder = str(output.parent).replace("%", "%%")
    header = [
        f"--job-name={shlex.quote(name)}",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(f'{folder}/{output.name}')}",
        *("--nodes=1 --ntasks=1", "--requeue --open-mode=append", f"--signal=B:USR1@{options.signal_seconds}"),
        *header,
        *options.options(),
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in header), *marks(runs), "", *options.setup, *choice]
    return "\n".join([*lines, body])


def command_line(words: Sequence[str], options: Slurm) -> str:
    """What the shell runs; `words` is what to type after `python run.py`."""
    return shlex.join([options.python or sys.executable, str(Path(sys.argv[0]).resolve()), *words])


def job(place: RunDir, desk: RunDir, words: Sequence[str], options: Slurm) -> str:
    """The job of one run. It can be read, and submitted again by hand."""
    choice = [f"run=({command_line(words, options)})"]
    return script({ALONE: place.path}, place.path.name, desk.path / "%j.out", [], options, choice)


def _submitted(place: RunDir, desk: RunDir, words: Sequence[str], options: Slurm, held: int) -> Job:
    if place.path.exists():
        with layout.lock_run(place):  # raises, naming who works on it
            pass
    path = desk.path / "job.sbatch"
    files.replace(path, job(place, desk, words, options))
    return Job(ask("sbatch", "--parsable", str(path), holding=[held]).split(";")[0], SUBMITTED, "", path)


def unmake(*folders: Path) -> None:
    """Refused at the first try: nothing was written."""
    for folder in folders:
        shutil.rmtree(folder)
    with suppress(OSError):  # not empty: something was there before
        for parent in list(folders[0].parents)[:3] if folders else ():
            parent.rmdir()
