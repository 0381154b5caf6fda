"""What a run is made by: packages, commit, the source itself, the machine; and when this process began. No jax."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from runner.rundir.process_age import measure_process_age
from runner.types import JsonObject

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "hydra-core", "numpy")
ROOMS = ("runner", "models", "data")


def collect_provenance(own_files: Iterable[Path] = ()) -> JsonObject:
    """Return what may explain a difference between two processes later, as JSON values; `own_files`: of the user's."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": _describe_commit(),
        "code": hash_code(own_files),
        **_describe_slurm_job(os.environ),
    }


def hash_code(own_files: Iterable[Path] = ()) -> str:
    """Return eight hex digits over every source file of the runner, the models, the data and the user."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in (*sorted(path for room in ROOMS for path in (root / room).rglob("*.py")), *own_files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def process_start_time() -> float:
    """Return when this process started, in seconds since 1970: what it took to import is part of a restart."""
    return time.time() - (measure_process_age() or 0.0)


def peak_host_memory() -> int:
    """Return the most memory of the host that this process had at once, in bytes (its resident set)."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in KiB elsewhere.
    return most if sys.platform == "darwin" else most * 1024


def _describe_slurm_job(environment: Mapping[str, str]) -> JsonObject:
    """Return the job this process is part of, and how often Slurm has started it again; nothing outside Slurm."""
    names = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT")
    found = {name.lower(): int(environment[f"SLURM_{name}"]) for name in names if f"SLURM_{name}" in environment}
    # Slurm sets the count from the second start on.
    return {"slurm": {"restart_count": 0, **found}} if "job_id" in found else {}


def _describe_commit() -> str | None:
    """Return the commit of the code that runs, marked where files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    # An installed package may lie in somebody else's repository, whose commit says nothing about it.
    if not (folder / "run.py").is_file():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
