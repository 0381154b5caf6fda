"""Leave a run to one Slurm job: `python run.py hydra/launcher=slurm …` writes the script and submits it, once.

The script is the recipe that people copy, with the command filled in. It names its run, so that a job in the queue is
known again (slurm_queue.py): typing the command twice does not submit it twice.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from runner import files
from runner.config.schema import Config
from runner.errors import ConfigError, RefusedError
from runner.installation import find_typed_program
from runner.launch.slurm_queue import (
    JOBS_FOLDER,
    NO_TASK,
    NOTHING_SUBMITTED,
    SUBMITTED,
    SlurmJob,
    call_slurm,
    list_queued_runs,
    render_marks,
    require_sbatch,
    run_key,
)
from runner.rundir import run_lock
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import RunLock
from runner.text import display_path

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "slurm.sbatch"
NO_VARIABLES: Mapping[str, str] = {}
# Begins the line of the recipe that says what it runs; what follows that line is the same for everyone.
COMMAND_LINE = "\nrun=("

Count = Annotated[int, Ge(1)]
Word = str | int | None
OPTIONS_OF_OURS = (
    "--chdir",
    "--job-name",
    "--output",
    "--open-mode",
    "--signal",
    "--requeue",
    "--nodes",
    "--ntasks",
    "--ntasks-per-node",
    "--array",
)


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What a job asks for; None leaves it to the cluster.

    Attributes:
        partition: as sbatch takes it, like the next two.
        account: who pays.
        qos: quality of service.
        nodes: so many machines work on a run together.
        tasks_per_node: so many processes of the run on each.
        time: minutes.
        cpus: CPU cores of a process.
        gpus: of a node, `1`, or with their type `h100:1`.
        mem: memory of a node, as `32G`.
        signal_seconds: so long before the time limit the run saves and is requeued.
        parallel: so many runs of a sweep at once.
        sbatch: more options, one a word.
        setup: shell lines before the run, such as `module load …`.
        python: what to run it with, instead of this one.
    """

    partition: Word = None
    account: Word = None
    qos: Word = None
    nodes: Count = 1
    tasks_per_node: Count = 1
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
        # These become lines of a script: a space or a line break would be another option, or another line.
        for name, word in self._asked().items():
            if len(str(word).split()) != 1:
                raise ValueError(f"{name.removeprefix('--')}: got {word!r}; expected one word")
        for line in self.sbatch:
            asked = _name_option(line)
            if asked is None:
                raise ValueError(
                    f"sbatch: got {line!r}; expected a long option, one a line, such as '--constraint=h100'"
                )
            # As sbatch reads it: the beginning of a name stands for the whole.
            if ours := next((option for option in OPTIONS_OF_OURS if option.startswith(asked)), None):
                raise ValueError(f"sbatch: {ours} is set by the launcher; leave it out")
        if any("\n" in line for line in self.setup):
            raise ValueError("setup: a line has a line break; write two lines")

    @property
    def tasks(self) -> int:
        """The number of processes of a run."""
        return self.nodes * self.tasks_per_node

    def check_hosts(self, config: Config) -> None:
        """Raise ConfigError where the tasks of a job would not find each other."""
        if self.tasks > 1 and config.hosts.kind != "auto":
            raise ConfigError(
                f"hydra.launcher.nodes={self.nodes} hydra.launcher.tasks_per_node={self.tasks_per_node}: with "
                f"hosts={config.hosts.kind} they would not be one run; leave hosts out, for Slurm says who is there"
            )

    def sbatch_options(self) -> list[str]:
        """Return them as sbatch reads them: `--partition=gpu`."""
        return [*(f"{name}={word}" for name, word in self._asked().items()), *self.sbatch]

    def _asked(self) -> dict[str, Word]:
        words = {
            "--partition": self.partition,
            "--account": self.account,
            "--qos": self.qos,
            "--time": self.time,
            "--cpus-per-task": self.cpus,
            "--mem": self.mem,
            "--gres": None if self.gpus is None else f"gpu:{self.gpus}",
        }
        return {name: word for name, word in words.items() if word is not None}


def _name_option(line: str) -> str | None:
    """Return the name of the one long option in a line; None where it is something else, or where there are more."""
    try:
        first, *others = shlex.split(line) if line.isprintable() else ["", ""]
    # Of quotes that are not closed, and of an empty line.
    except ValueError:
        return None
    name, sign, _ = first.partition("=")
    # A value may also follow after a space. Anything more would be another option.
    is_one = not others or (not sign and len(others) == 1 and not others[0].startswith("-"))
    return name if is_one and len(name) > 2 and name.startswith("--") else None


def submit_job(
    run_dir: RunDir, words: Sequence[str], options: SlurmOptions, environment: Mapping[str, str] = NO_VARIABLES
) -> None:
    """Have the run worked on by one job, and say by which.

    Args:
        run_dir: where the run lives.
        words: what to type after `python run.py`.
        options: what the job asks for.
        environment: variables that the run's process has beside its own.

    Raises:
        RefusedError: Slurm cannot be asked or does not take it, or a process outside Slurm has the run.
    """
    require_sbatch()
    # Beside the runs: one that turns out wrong takes its directory back, and what it printed must stay.
    job_dir = RunDir(run_dir.path.parent / JOBS_FOLDER / run_dir.path.name)
    is_new = not job_dir.path.exists()
    try:
        # Typed in two places at once, it is submitted once.
        with run_lock.lock_run(job_dir) as lock:
            if job := list_queued_runs().get(run_key(run_dir.path)):
                reason = f" ({job.reason})" if job.reason else ""
                what = f"has it already: {job.state}{reason}{NOTHING_SUBMITTED}"
            else:
                script = render_job(run_dir, job_dir, words, options, environment)
                job = _submit_under_lock(run_dir, job_dir, script, lock)
                what = f"submitted; {display_path(job.script)}"
    except RefusedError:
        if is_new:
            remove_new_folders(job_dir.path)
        raise
    print(f"{display_path(run_dir.path)}: job {job.name} {what}\nits output: {display_path(job.output)}")
    print(f"save and stop for good: scancel {job.name}")


def render_script(
    runs: Mapping[str, Path],
    name: str,
    output: Path,
    header: Sequence[str],
    options: SlurmOptions,
    choice: Sequence[str],
) -> str:
    """Return the script of a job or an array. It can be read, and submitted again by hand.

    Args:
        runs: task → its run; of a job that is no array, NO_TASK → the run.
        name: of the job.
        output: where it prints to; the last part is a pattern of Slurm's.
        header: options of sbatch beside those that every job of ours has.
        options: what the job asks for.
        choice: the shell lines that set `run`, an array of words, to the command.

    Raises ConfigError where a folder has a name that would become another line of the script.
    """
    for path in (Path.cwd(), output.parent, *runs.values()):
        if not str(path).isprintable():
            raise ConfigError(f"{str(path)!r}: would be more than one line of the script; use folders with other names")
    body = RECIPE.read_text().split(COMMAND_LINE, 1)[1].split("\n", 1)[1]
    # In the folder a % is meant as it is; only the file's name is a pattern.
    folder = str(output.parent).replace("%", "%%")
    header = [
        f"--job-name={shlex.quote(name)}",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(f'{folder}/{output.name}')}",
        f"--nodes={options.nodes} --ntasks={options.tasks} --ntasks-per-node={options.tasks_per_node}",
        "--requeue --open-mode=append",
        f"--signal=B:USR1@{options.signal_seconds}",
        *header,
        *options.sbatch_options(),
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in header), *render_marks(runs), "", *options.setup, *choice]
    return "\n".join([*lines, body])


def shell_command(words: Sequence[str], options: SlurmOptions, environment: Mapping[str, str] = NO_VARIABLES) -> str:
    """Return what the shell of a job runs; `words` is what to type after `python run.py`."""
    variables = ["env", *(f"{name}={value}" for name, value in environment.items())] if environment else []
    return shlex.join([*variables, options.python or sys.executable, *find_typed_program(), *words])


def render_job(
    run_dir: RunDir,
    job_dir: RunDir,
    words: Sequence[str],
    options: SlurmOptions,
    environment: Mapping[str, str] = NO_VARIABLES,
) -> str:
    """Return the script of the job of one run."""
    choice = [f"run=({shell_command(words, options, environment)})"]
    return render_script({NO_TASK: run_dir.path}, run_dir.path.name, job_dir.path / "%j.out", [], options, choice)


def _submit_under_lock(run_dir: RunDir, job_dir: RunDir, content: str, lock: RunLock) -> SlurmJob:
    if run_dir.path.exists():
        # Raises where a process works on it, naming that process.
        with run_lock.lock_run(run_dir):
            pass
    script = job_dir.path / "job.sbatch"
    files.replace_file(script, content)
    # `--parsable` prints JOB, or JOB;CLUSTER.
    number = call_slurm("sbatch", "--parsable", str(script), holding=[lock.handle]).split(";")[0]
    return SlurmJob(number, SUBMITTED, "", script)


def remove_new_folders(*folders: Path) -> None:
    """Delete folders that were made for something that was refused, and parents of the first that are empty then."""
    for folder in folders:
        files.remove_tree(folder)
    # A parent that is not empty was there before, or is somebody else's by now.
    with suppress(OSError):
        for parent in list(folders[0].parents)[:3] if folders else ():
            parent.rmdir()
