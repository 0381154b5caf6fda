"""Which runs Slurm has already: every job in its queue is known again by the script that it was made from.

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

ASK_SECONDS = 120  # a controller that answers nothing for so long is not there
FOLDER, SWEEPS = ".slurm", ".sweep"  # a script of ours lives below one of these
MARK = "#HOLDFAST "
MAX_ARRAY_SIZE = 1001  # Slurm's default
SUBMITTED = "submitted"  # at this moment, by us
NOTHING = "; nothing was submitted"
ALONE = "-"  # the task of a job that is no array


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array: `17` or `17_3`; how it stands, in Slurm's words; from which script it was made."""

    name: str
    state: str
    reason: str
    script: Path

    def __str__(self) -> str:
        return f"{self.name} {self.state}{f' ({self.reason})' if self.reason else ''}"

    @property
    def output(self) -> Path:
        """What the run says."""
        return self.script.parent / f"{self.name}.out"


def look_for_sbatch(launcher: str = "slurm") -> None:
    """Raises RefusedError where nothing can be submitted."""
    if not shutil.which("sbatch"):
        raise RefusedError(
            f"hydra/launcher={launcher}: there is no sbatch here; type this where jobs are submitted, "
            "or leave hydra/launcher out to run it here"
        )


def queued() -> dict[Path, Job]:
    """Every run of ours that a job waits for or works on. Raises RefusedError where Slurm cannot be asked."""
    scripts: dict[str, dict[str, Path]] = {}
    found: dict[Path, Job] = {}
    for line in ask("squeue", "-h", "-r", "-o", "%i|%T|%r|%o").splitlines():
        name, state, reason, command = (line.split("|", 3) + [""] * 3)[:4]
        command = command.strip()
        if not command.endswith(".sbatch") or not {FOLDER, SWEEPS} & set(Path(command).parts):
            continue
        if command not in scripts:
            scripts[command] = _runs(Path(command))
        run = scripts[command].get(name.partition("_")[2] or ALONE)
        if run is not None and (run not in found or state == "RUNNING"):
            found[run] = Job(name, state.lower(), "" if reason == "None" else reason, Path(command))
    return found


def most_tasks() -> int:
    """How many tasks an array may have on this cluster. Raises RefusedError where Slurm cannot be asked."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else MAX_ARRAY_SIZE


def same(place: Path) -> Path:
    """What is equal for two paths of one run: its digest says which it is, not what was typed."""
    digest = re.search(r"-([0-9a-f]{8})$", place.name)
    return place.parent / digest[1] if digest else place


def marks(runs: Mapping[str, Path]) -> list[str]:
    """The lines of a script by which its runs are known again: task → run."""
    return [f"{MARK}{task} {json.dumps(str(place))}" for task, place in runs.items()]


def _runs(script: Path) -> dict[str, Path]:
    try:
        lines = [line for line in script.read_text().splitlines() if line.startswith(MARK)]
        named = [line.removeprefix(MARK).split(" ", 1) for line in lines]
        return {task: same(Path(json.loads(place))) for task, place in named}
    except (OSError, ValueError):  # it is gone, or somebody else's
        return {}


def ask(*command: str, holding: Sequence[int] = ()) -> str:
    """What a Slurm command prints; it keeps the locks in `holding` until it ends, even where we are killed.

    Raises RefusedError with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, pass_fds=holding)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RefusedError(f"{command[0]}: {error}{NOTHING}") from None
    if done.returncode:
        complaint = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RefusedError(f"{complaint.removeprefix(f'{command[0]}: error: ')}{NOTHING}")
    return done.stdout.strip()
