"""Checkpoints that were set aside: kept under `quarantine/STEP-TIME/`, each with the reason in it. No jax."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from runner import files
from runner.checkpoint.record import REASON, list_steps
from runner.text import display_path
from runner.values import Say

# A step, and when it was set aside, in nanoseconds since 1970: the same step may be set aside more than once.
NAME = re.compile(r"(0|[1-9][0-9]{0,15})-([0-9]{1,20})")


@dataclass(frozen=True)
class SetAside:
    """A checkpoint that was set aside: its step, where it lies, and why (empty where nobody knows)."""

    step: int
    directory: Path
    reason: str


def set_newer_aside(checkpoints: Path, quarantine: Path, step: int, say: Say) -> None:
    """Set aside what is newer than a step, so that training can go on from it: a step is saved once in a run."""
    newer = [other for other in list_steps(checkpoints) if other > step]
    for other in newer:
        quarantine_checkpoint(
            checkpoints / str(other), quarantine, f"newer than step {step}, to which the run was taken back"
        )
    if newer:
        say(f"taken back to step {step}: {', '.join(map(str, newer))} moved to {display_path(quarantine)}")


def quarantine_checkpoint(directory: Path, quarantine: Path, problem: str) -> Path:
    """Rename a checkpoint out of sight, with the reason beside it; never delete it. Returns where it is now."""
    files.make_folder(quarantine)
    # The same step may be set aside more than once.
    aside = quarantine / f"{directory.name}-{time.time_ns()}"
    files.rename_path(directory, aside)
    files.replace_file(aside / REASON, problem + "\n", durable=False)
    # The new name first: a power loss between the two leaves it under both names, or under the old one.
    for folder in (quarantine, quarantine.parent, directory.parent):
        files.sync_path(folder)
    return aside


def list_set_aside(quarantine: Path) -> list[SetAside]:
    """Return what was set aside, the highest step first, of one step the newest first. Raises OSError."""
    if not quarantine.is_dir():
        return []
    named = [(NAME.fullmatch(path.name), path) for path in quarantine.iterdir()]
    found = [(int(match[1]), int(match[2]), path) for match, path in named if match and path.is_dir()]
    return [SetAside(step, path, _read_reason(path)) for step, _, path in sorted(found, reverse=True)]


def _read_reason(aside: Path) -> str:
    try:
        return files.read_file(aside / REASON, limit=1 << 16).decode(errors="replace").strip()
    except OSError:
        return ""
