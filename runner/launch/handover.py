"""What was checked is what runs: hand on, with the words of a run, which configuration and directory they stand for.

A run of a sweep, or of a job, is composed where the command is typed and once more in its own process, from the same
words. A variable of the environment or a file of choices may be another there, so the process compares.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from runner.config.identity import hash_config, replace_places
from runner.config.schema import Config
from runner.errors import RefusedError
from runner.rundir.layout import RunDir

CHECKED = "HOLDFAST_CHECKED"


def describe_checked(config: Config, run_dir: RunDir) -> dict[str, str]:
    """Return the variables by which a process knows what was checked before it was started."""
    return {CHECKED: f"{_hash_checked(config)} {run_dir.path}"}


def take_checked_run(config: Config) -> RunDir | None:
    """Return the directory that this process was started for; None where nobody has said so.

    The variable is taken away: what this process starts is for other runs. Raises RefusedError where the configuration
    is another one than was checked.
    """
    checked, _, path = os.environ.pop(CHECKED, "").partition(" ")
    if not checked:
        return None
    if checked != _hash_checked(config):
        raise RefusedError(
            f"{path}: this configuration is not the one that was checked when the run was handed on; a variable of the "
            "environment or a file of conf/ is different here: type the command again"
        )
    return RunDir(Path(path))


def _hash_checked(config: Config) -> str:
    """Return eight hex digits over what a run computes and what it is called; its data may lie elsewhere here."""
    document = config.document
    content = hash_config(replace_places(document, {}))
    return hashlib.sha256(f"{content} {document['name']} {document['root']}".encode()).hexdigest()[:8]
