"""The directory of a run: every path and file name in it, and how directories are found. No jax."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner import files
from runner.errors import StorageError
from runner.rundir.side_files import parse_status
from runner.text import display_path
from runner.types import JsonObject

SLUG_CHARS = 60


@dataclass(frozen=True)
class RunDir:
    """Name everything in the directory of one run.

    Attributes:
        path: the directory.
        shared: that of the run where `path` is only what one of its processes writes for itself: the checkpoints are
            the run's.
    """

    path: Path
    shared: Path | None = None

    @property
    def config(self) -> Path:
        """Return where the configuration lies that the run was begun with; without it there is no run."""
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        """Return where it is written down what the data were."""
        return self.path / "data.json"

    @property
    def base(self) -> Path:
        """Return where it is written down which files of somebody else's the run began with."""
        return self.path / "base.json"

    @property
    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer that made the run's tokens of text, where it was one in a file."""
        return (self.shared or self.path) / "tokenizer"

    @property
    def remat(self) -> Path:
        """Return where the rematerialization policy lies that was chosen for this run."""
        return self.path / "remat.json"

    @property
    def readme(self) -> Path:
        """Return where the page about the run lies."""
        return self.path / "README.md"

    @property
    def status(self) -> Path:
        """Return where it is written down how far the run is (status_file.py)."""
        return self.path / "status.json"

    @property
    def decisions(self) -> Path:
        """Return where it is written down what a restart must know (decisions.py)."""
        return self.path / "decisions.json"

    @property
    def attempts(self) -> Path:
        """Return where each attempt has its line (attempt_lines.py)."""
        return self.path / "attempts.jsonl"

    @property
    def lock(self) -> Path:
        """Return the file that the process which works on the run has locked."""
        return self.path / ".lock"

    @property
    def lease(self) -> Path:
        """Return where the process that works on the run has put its name (lease.py)."""
        return self.path / ".lease"

    @property
    def heartbeat(self) -> Path:
        """Return where the process gives its sign of life (heartbeat.py)."""
        return self.path / ".pulse"

    @property
    def remote_note(self) -> Path:
        """Return where it is written down what this machine knows of the run in a bucket (remote/local_note.py)."""
        return self.path / "remote.json"

    @property
    def stop(self) -> Path:
        """Return the file that stops the run when somebody makes it."""
        return self.path / "STOP"

    @property
    def profile(self) -> Path:
        """Return where the traces of some steps lie (profiling/)."""
        return self.path / "profile"

    @property
    def profile_request(self) -> Path:
        """Return the file that has the next steps traced when somebody makes it."""
        return self.path / "PROFILE"

    @property
    def checkpoints(self) -> Path:
        """Return where the checkpoints lie, each in a directory named like its step."""
        return (self.shared or self.path) / "checkpoints"

    @property
    def quarantine(self) -> Path:
        """Return where checkpoints lie that were set aside."""
        return self.path / "quarantine"

    @property
    def logs(self) -> Path:
        """Return the folder of the logs."""
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """Return where the metrics lie, without any clock."""
        return self.logs / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """Return where it is written down how long things took."""
        return self.logs / "timing.jsonl"

    @property
    def log(self) -> Path:
        """Return where every line lies that was said to a person."""
        return self.logs / "run.log"

    def __str__(self) -> str:
        return display_path(self.path)

    def holds_checkpoints(self) -> bool:
        """Tell whether there is anything in it that training has made."""
        return any(folder.is_dir() and any(folder.iterdir()) for folder in (self.checkpoints, self.quarantine))

    def read_status(self) -> JsonObject:
        """Return status.json, values of the right types only; empty where it is missing or cannot be read."""
        try:
            return parse_status(files.read_json_object(self.status))
        except OSError:
            return {}


def find_run_dir(parent: Path, slug: str, digest: str) -> RunDir:
    """Return the run with this digest, whatever its readable part says; where there is none, where a new one goes.

    Raises StorageError where the runs of this name cannot be listed: that is not the same as no run.
    """
    try:
        # Not `glob`, which passes over a folder that it may not read: the run would be begun a second time.
        names = sorted(name for name in os.listdir(parent) if name.endswith(f"-{digest}"))
        found = [parent / name for name in names if stat.S_ISDIR(os.stat(parent / name).st_mode)]
    except (FileNotFoundError, NotADirectoryError):
        found = []
    except OSError as error:
        raise StorageError(f"{display_path(parent)}: cannot be listed ({error.strerror}); nothing was begun") from error
    return RunDir(found[0] if found else parent / f"{slug}-{digest}")


def iter_runs(parent: Path) -> Iterator[tuple[RunDir, JsonObject]]:
    """Yield every run of one name with its status, the most recently touched first."""
    # Hidden directories hold what was set aside.
    touched = []
    for path in parent.glob("*/status.json"):
        # One that is being moved away, or that others own, is none to tell of.
        with suppress(OSError):
            if not path.parent.name.startswith("."):
                touched.append((path.stat().st_mtime, path))
    for _, path in sorted(touched, reverse=True):
        run_dir = RunDir(path.parent)
        yield run_dir, run_dir.read_status()


def slug_from_overrides(overrides: Sequence[str], unhashed: Sequence[str]) -> str:
    """Return a readable, safe and short name for a run, from what was typed, in no order.

    It identifies nothing: the digest does. `unhashed` are keys that do not belong to what a run computes.
    """
    words = []
    for override in sorted(overrides):
        key, _, value = override.lstrip("+~").partition("=")
        if key in unhashed or key.split(".")[0].split("/")[0] in unhashed or key.startswith("-"):
            continue
        # The target, which has a word of its own, says more.
        if value == "external":
            continue
        key = "" if key.endswith(".target") else key
        words.append(re.sub(r"[^A-Za-z0-9.-]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_.") or "x")
    return "-".join(words)[:SLUG_CHARS].rstrip("-_.") or "default"


def set_run_aside(run_dir: RunDir) -> Path:
    """Move a whole run out of the way, next to its siblings, and return where it is now. Nothing is deleted."""
    aside = run_dir.path.parent / ".overwritten" / f"{run_dir.path.name}-{time.time_ns()}"
    files.make_folder(aside.parent)
    files.rename_path(run_dir.path, aside)
    return aside
