"""Refuse a run's directory in which something could lead a write out of it: links, pipes, second names of other files.

Runs make one link, `checkpoints/best`, to a step beside it. wandb makes some in its own folder, to files below it and,
in those of its starts, to its cache.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from runner.checkpoint.record import is_step_name
from runner.errors import RefusedError
from runner.rundir.layout import RunDir

# Nothing below these is written in place: a file of theirs that has a second name (`cp -al`) is never changed.
REPLACED_WHOLE = ("checkpoints", "quarantine", "media", "eval")


def refuse_foreign_files(run_dir: RunDir) -> None:
    """Raise RefusedError where something in a run is a link, no plain file, or a second name of another file.

    Raises OSError where a folder cannot be read.
    """
    for path, what in _find_foreign_files(run_dir):
        raise RefusedError(
            f"{run_dir}: {path.relative_to(run_dir.path)} {what}: a run writes into its own directory only; "
            "put a plain file or folder there, or copy the run (cp -rL)"
        )


def _find_foreign_files(run_dir: RunDir) -> Iterator[tuple[Path, str]]:
    """Yield each thing that does not belong in a run, and what it is."""
    folders = [run_dir.path]
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            found = list(entries)
        for entry in found:
            path = Path(entry.path)
            if entry.is_symlink():
                if not _is_own_link(run_dir, path):
                    yield path, "is a link"
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif not entry.is_file(follow_symlinks=False):
                yield path, "is no plain file"
            elif path.relative_to(run_dir.path).parts[0] not in REPLACED_WHOLE and _has_second_name(entry):
                yield path, "has a second name elsewhere (a hard link)"


def _has_second_name(entry: os.DirEntry[str]) -> bool:
    found = entry.stat(follow_symlinks=False)
    return stat.S_ISREG(found.st_mode) and found.st_nlink > 1


def _is_own_link(run_dir: RunDir, path: Path) -> bool:
    if path == run_dir.checkpoints / "best" or path == run_dir.checkpoints / ".best":
        return is_step_name(os.readlink(path))
    wandb = run_dir.logs / "wandb"
    # In the folder of one start, `wandb/wandb/run-…/logs`, wandb links to its own cache; nobody writes there again. A
    # kill may leave it in `.superseded`, from where it is only ever removed, and never through a link.
    starts = (wandb / "wandb", wandb / ".superseded")
    in_old_start = any(path.is_relative_to(each) and len(path.relative_to(each).parts) > 2 for each in starts)
    return in_old_start or (path.is_relative_to(wandb) and Path(os.path.realpath(path)).is_relative_to(wandb))
