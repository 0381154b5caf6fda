"""Find the run of a command whose data lies elsewhere by now: at another mount, in a job's own folder, moved. No jax.

The directory of a run has a hash in its name, over its configuration with the places of its data. So with the places of
another run's beginning in it, the configuration of a command has that run's hash where only the places differ.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.identity import find_places, hash_config, replace_places
from runner.config.schema import Config
from runner.errors import StorageError
from runner.files import NOT_A_FILE
from runner.rundir.layout import RunDir
from runner.text import display_path

if TYPE_CHECKING:
    from runner.types import Document

# What the folder of somebody else, or one that is just moved away, is answered with.
NOT_OURS = (errno.ENOENT, errno.EACCES, errno.EPERM, *NOT_A_FILE)


def find_moved_run(parent: Path, config: Config) -> RunDir | None:
    """Return the run that was begun with this configuration and this data, which lay elsewhere then; None where none.

    The data is read only where some run differs from the configuration in nothing but places. Of several runs that were
    begun with the same data, it is the one that came furthest.

    Raises:
        ConfigError: the data cannot be read.
        StorageError: a run cannot be read now; that is not the same as no run.
    """
    if not find_places(config.document):
        return None
    found = list(_iter_runs_elsewhere(parent, config.document))
    if not found:
        return None
    # numpy and the readers: not for who has no run to find.
    from runner.train.moved_data import holds_same_data

    same = [run for run, places in found if holds_same_data(run, places, config.data)]
    # In the order of their names, so that of two that came equally far it is always the same one.
    return max(sorted(same, key=str), key=lambda run: run.read_status().get("step", 0), default=None)


def find_twin_on_other_data(run: RunDir, config: Config) -> RunDir | None:
    """Return a run that differs from a new one only in where its data lay, and so in what it is; None where none."""
    if not find_places(config.document):
        return None
    others = (other for other, _ in _iter_runs_elsewhere(run.path.parent, config.document) if other.path != run.path)
    return next(others, None)


def _iter_runs_elsewhere(parent: Path, document: Document) -> Iterator[tuple[RunDir, dict[str, Any]]]:
    """Yield the runs of a folder that differ from a document in the places of their data alone, with those places."""
    from runner.train.moved_data import read_places

    digests: dict[str, str] = {}
    for run, digest in _list_runs(parent):
        try:
            places = read_places(run)
        except OSError as error:
            if error.errno in NOT_OURS:
                continue
            raise StorageError(f"{run.config}: {error.strerror}; nothing was begun") from error
        # Most runs of one name have their data at the same place.
        key = repr(sorted(places.items()))
        if key not in digests:
            digests[key] = hash_config(replace_places(document, places)) if places else ""
        if digest == digests[key]:
            yield run, places


def _list_runs(parent: Path) -> list[tuple[RunDir, str]]:
    """Return the directories of runs in a folder, each with the hash in its name."""
    try:
        names = os.listdir(parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{display_path(parent)}: cannot be listed ({error.strerror}); nothing was begun") from error
    return [(RunDir(parent / name), name[-8:]) for name in names if re.fullmatch(r"[^.].*-[0-9a-f]{8}", name)]
