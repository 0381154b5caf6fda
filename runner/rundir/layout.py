"""The directory of a run: every path and file name in it, who may write it, and how a file is replaced. No jax."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import hosts
from runner.errors import RefusedError
from runner.text import display_path

SLUG_CHARS = 60
# The processes of a run start at about the same time: so long they wait for the one that locks it.
LOCK_SECONDS = 300.0
# What a process has that holds no lock of its own.
NO_HANDLE = -1
SUPERVISOR = "HOLDFAST_SUPERVISOR"  # set by `supervise`: the file in which it reads where its command works


@dataclass(frozen=True)
class RunDir:
    """The names of everything in one run directory."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    data = property(lambda self: self.path / "data.json")
    remat = property(lambda self: self.path / "remat.json")
    readme = property(lambda self: self.path / "README.md")
    status = property(lambda self: self.path / "status.json")
    attempts = property(lambda self: self.path / "attempts.jsonl")
    lock = property(lambda self: self.path / ".lock")
    heartbeat = property(lambda self: self.path / ".pulse")
    stop = property(lambda self: self.path / "STOP")
    checkpoints = property(lambda self: self.path / "checkpoints")
    quarantine = property(lambda self: self.path / "quarantine")
    logs = property(lambda self: self.path / "logs")
    metrics = property(lambda self: self.path / "logs" / "metrics.jsonl")
    timing = property(lambda self: self.path / "logs" / "timing.jsonl")
    log = property(lambda self: self.path / "logs" / "run.log")

    def __str__(self) -> str:
        """The path as a person would type it."""
        return display_path(self.path)

    def holds_checkpoints(self) -> bool:
        """Whether there is anything in it that training has made."""
        return any(folder.is_dir() and any(folder.iterdir()) for folder in (self.checkpoints, self.quarantine))

    def read_status(self) -> dict[str, Any]:
        """status.json, or nothing where it is missing or torn (only a power loss can tear it)."""
        try:
            status = json.loads(self.status.read_bytes())
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}


def find_run_dir(parent: Path, slug: str, digest: str) -> RunDir:
    """The run with this digest, whatever its readable part says; where there is none, the place for a new one."""
    found = sorted(path for path in parent.glob(f"*-{digest}") if path.is_dir())
    return RunDir(found[0] if found else parent / f"{slug}-{digest}")


def iter_runs(parent: Path) -> Iterator[tuple[RunDir, dict[str, Any]]]:
    """Every run of one name with its status, the most recently touched first."""
    statuses = [path for path in parent.glob("*/status.json") if not path.parent.name.startswith(".")]
    for path in sorted(statuses, key=lambda path: path.stat().st_mtime, reverse=True):
        run = RunDir(path.parent)
        yield run, run.read_status()


def slug_from_overrides(overrides: Sequence[str], places: Sequence[str]) -> str:
    """A readable, safe and short name for a run, from what was typed, in no order. The digest identifies, not this."""
    words = []
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if key in places or key.split(".")[0].split("/")[0] in places or key.startswith("-"):
            continue
        if value == "external":  # the target says more
            continue
        key = "" if key.endswith(".target") else key
        words.append(re.sub(r"[^A-Za-z0-9.-]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_.") or "x")
    return "-".join(words)[:SLUG_CHARS].rstrip("-_.") or "default"


@contextmanager
def lock_run(run: RunDir) -> Iterator[int]:
    """Hold the run for this process alone. The kernel lets go when the process ends, however it ends.

    A child that is given the handle holds it as well, until both have ended.

    Raises RefusedError, naming the holder, where another process has it.
    """
    if not hosts.is_lead():
        # The lead holds the run for all its processes: a second lock would refuse it to itself.
        hosts.barrier("run is locked", LOCK_SECONDS)
        yield NO_HANDLE
        return
    run.path.mkdir(parents=True, exist_ok=True)
    handle = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(handle):
            _tell_supervisor(run, held=False)
            raise RefusedError(f"{run}: in use by {_holder(handle)}; wait for it or stop it")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        _tell_supervisor(run, held=True)
        hosts.barrier("run is locked", LOCK_SECONDS)
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Try for a moment: whoever only looks (`in_use`) has the lock for some microseconds."""
    for pause in (0.01, 0.05, 0.0):
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(pause)
    return False


def is_in_use(run: RunDir) -> bool:
    """Whether a process holds the run, on this machine or on any that shares its locks."""
    try:
        handle = os.open(run.lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def run_state(run: RunDir) -> str:
    """How a run stands, in one word: what status.json says, and `killed` where that says running and nobody is."""
    state = run.read_status().get("state", "unknown")
    return "killed" if state == "running" and not is_in_use(run) else state


def _tell_supervisor(run: RunDir, *, held: bool) -> None:
    """Which run this process has, or found in use. Where nobody supervises, and where he has gone, nobody is told."""
    if file := os.environ.get(SUPERVISOR):
        with suppress(OSError), open(file, "a") as out:
            out.write(json.dumps({"run": str(run.path.resolve()), "held": held}) + "\n")


def _holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return f"pid {holder['pid']} on host {holder['host']}"
    except (ValueError, KeyError):
        return "another process"


def set_run_aside(run: RunDir) -> Path:
    """Move a whole run out of the way, next to its siblings, and say where. Nothing is deleted."""
    aside = run.path.parent / ".overwritten" / f"{run.path.name}-{time.time_ns()}"
    aside.parent.mkdir(exist_ok=True)
    run.path.rename(aside)
    return aside
