"""Find out which runs Slurm has already: a job in its queue is known again by the script that it was made from.

A script names its runs, an array's one for each task. So it does not matter which command, which sweep or whose client
submitted a run, nor whether that client lives: Slurm is asked, and nothing is remembered.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.errors import RefusedError
from runner.files import parse_json, read_file

# A controller that answers nothing for so long is not there.
COMMAND_TIMEOUT_SECONDS = 120
# A script of ours lives below one of these folders: of single jobs, and of sweeps.
JOBS_FOLDER, SWEEPS_FOLDER = ".slurm", ".sweep"
# Begins the lines of a script that name its runs; a comment to the shell, and no option of sbatch's.
RUN_MARK = "#HOLDFAST "
# Stands in such a line for the task of a job that is no array.
NO_TASK = "-"
# Slurm's default, for a cluster that does not say.
DEFAULT_MAX_ARRAY_SIZE = 1001
# An array has a line or two for each of its tasks, of which there are a million at most.
MAX_SCRIPT_BYTES = 1 << 28
# The state of a job that this process has submitted at this moment.
SUBMITTED = "submitted"
NOTHING_SUBMITTED = "; nothing was submitted"


@dataclass(frozen=True)
class SlurmJob:
    """A job, or a task of an array.

    Attributes:
        name: `17`, or `17_3` for a task.
        state: how it stands, in Slurm's words, in small letters.
        reason: why it waits, in Slurm's words; empty where it says none.
        script: what it was made from.
    """

    name: str
    state: str
    reason: str
    script: Path

    def __str__(self) -> str:
        return f"{self.name} {self.state}{f' ({self.reason})' if self.reason else ''}"

    @property
    def output(self) -> Path:
        """The file with what the run prints."""
        return self.script.parent / f"{self.name}.out"


def require_sbatch(launcher: str = "slurm") -> None:
    """Raise RefusedError where nothing can be submitted."""
    if not shutil.which("sbatch"):
        raise RefusedError(
            f"hydra/launcher={launcher}: there is no sbatch here; type this where jobs are submitted, "
            "or leave hydra/launcher out to run it here"
        )


def list_queued_runs() -> dict[Path, SlurmJob]:
    """Return every run of ours that a job waits for or works on, by its `run_key`.

    Raises RefusedError where Slurm cannot be asked.
    """
    runs_of: dict[str, dict[str, Path]] = {}
    found: dict[Path, SlurmJob] = {}
    # -r: a line for each task that waits, which Slurm else writes in one line as 17_[0-9].
    for line in call_slurm("squeue", "-h", "-r", "-o", "%i|%T|%r|%o").splitlines():
        name, state, reason, script = (line.split("|", 3) + [""] * 3)[:4]
        script = script.strip()
        if not script.endswith(".sbatch") or not {JOBS_FOLDER, SWEEPS_FOLDER} & set(Path(script).parts):
            continue
        if script not in runs_of:
            runs_of[script] = _read_marks(Path(script))
        key = runs_of[script].get(name.partition("_")[2] or NO_TASK)
        # Of two jobs that have a run (somebody submitted a script by hand), the one that works on it counts.
        if key is not None and (key not in found or state == "RUNNING"):
            found[key] = SlurmJob(name, state.lower(), "" if reason == "None" else reason, Path(script))
    return found


def read_max_array_size() -> int:
    """Return how many tasks an array may have on this cluster. Raises RefusedError where Slurm cannot be asked."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call_slurm("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


def run_key(run: Path) -> Path:
    """Return what is equal for two paths of one run: its digest says which it is, not what was typed."""
    digest = re.search(r"-([0-9a-f]{8})$", run.name)
    return run.parent / digest[1] if digest else run


def render_marks(runs: Mapping[str, Path]) -> list[str]:
    """Return the lines of a script by which its runs are known again, from task → run."""
    return [f"{RUN_MARK}{task} {json.dumps(str(run))}" for task, run in runs.items()]


def _read_marks(script: Path) -> dict[str, Path]:
    """Return task → `run_key` of what a script names; nothing where it is gone, or somebody else's."""
    try:
        # Where its folder lies is for the cluster to say, so links above it are followed; it is no link itself.
        content = read_file(script.parent.resolve() / script.name, limit=MAX_SCRIPT_BYTES).decode()
        lines = [line for line in content.splitlines() if line.startswith(RUN_MARK)]
        named = [line.removeprefix(RUN_MARK).split(" ", 1) for line in lines]
        return {task: run_key(Path(parse_json(run))) for task, run in named}
    # TypeError: it names what is no path.
    except (OSError, ValueError, TypeError):
        return {}


def call_slurm(*command: str, holding: Sequence[int] = ()) -> str:
    """Return what a command of Slurm's prints.

    It inherits the locks in `holding` (file descriptors), and so keeps them until it ends, even where we are killed.

    Raises:
        RefusedError: it failed; with its own words.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, pass_fds=holding
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RefusedError(f"{command[0]}: {error}{NOTHING_SUBMITTED}") from None
    if done.returncode:
        complaint = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RefusedError(f"{complaint.removeprefix(f'{command[0]}: error: ')}{NOTHING_SUBMITTED}")
    return done.stdout.strip()
