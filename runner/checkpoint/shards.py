"""Write a state that several processes hold among them, as one checkpoint: each its own parts, all at the same time.

Each process copies its parts while training waits, and writes them in its background thread, in one transaction, into a
folder of its own. They talk over the connections of runner/hosts alone: no computation of the devices takes part, so
training goes on beside it. Process 0 then puts the folders into the checkpoint and merges what they list, which moves
no array. Each process has taken the checksums of its own files by then.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner import files, hosts
from runner.checkpoint import arrays, store
from runner.checkpoint.arrays import LeafPieces
from runner.checkpoint.held_state import HeldState, copy_to_host, list_pieces, wait_for_copy
from runner.checkpoint.record import SAVE_CHANNEL, FileTable
from runner.checkpoint.seal import WrittenArrays, sync_folder
from runner.checkpoint.trouble import find_errno, short_reason
from runner.errors import StorageError
from runner.types import JsonObject, Tree

# The folder of a process within a tree, as Orbax names it too.
PART = "ocdbt.process_{}"
# What the folder is called in which the parts wait for the checkpoint.
PARTS_SUFFIX = ".parts"
# On a network file system a folder that one process makes is seen by the others a little later.
SEEN_SECONDS = 10.0


def write_part(folder: Path, leaves: Mapping[str, LeafPieces], *, checksums: bool) -> FileTable:
    """Write what this process holds into a folder of its own, durably; return its files with their checksums.

    Raises OSError, ValueError where the disk does not take it.
    """
    # All it has is held, and written, by others: they need no empty folder.
    if not leaves:
        return {}
    folder.mkdir()
    written = arrays.write_leaves(folder, leaves)
    sync_folder(folder)
    return written if checksums else {name: {"bytes": facts["bytes"]} for name, facts in written.items()}


class SharedStore:
    """Put a state that several processes hold among them on disk: the part of process 0, which puts it together.

    The others do the same at the same time (following_saver.py). `verify` is what is proven of what was written.
    """

    def __init__(self, verify: str):
        self._verify = verify

    def copy_to_host(self, state: Tree) -> HeldState:
        """Return what this process is to write, copied to host memory."""
        return copy_to_host(state)

    def wait_for_copy(self, held: HeldState) -> bool:
        """Wait until the copy of this process is complete; return whether it was not, by now."""
        return wait_for_copy(held)

    def write_checkpoint(self, directory: Path, state: Tree, progress: JsonObject) -> WrittenArrays:
        """Write a state, and return what it has, and the files whose checksums their writers have taken.

        Raises StorageError, OSError where one of the processes cannot write; then nothing has that name.
        """
        # A strategy that waits for the disk has not copied it.
        held = state if isinstance(state, HeldState) else list_pieces(state)
        tree = store.describe_tree(held)
        waiting = directory.with_name(directory.name + PARTS_SUFFIX)
        waiting.mkdir(parents=True)

        def move_parts(folder: Path) -> FileTable:
            parts = [PART.format(index) for index, report in enumerate(found) if report["files"]]
            for name in parts:
                files.rename_path(waiting / name, folder / name)
            arrays.merge_trees(folder, parts)
            return {
                f"{PART.format(index)}/{name}": facts
                for index, report in enumerate(found)
                for name, facts in report["files"].items()
            }

        try:
            hosts.agree(SAVE_CHANNEL, {"into": str(waiting), "verify": self._verify})
            found: list[Any] = hosts.gather(SAVE_CHANNEL, report_part(waiting, held, self._verify)) or []
            _raise_first(found)
            return store.write_tree(directory, tree, progress, move_parts)
        finally:
            files.remove_tree(waiting)

    def find_differing_leaf(self, directory: Path, state: Tree) -> str | None:
        """Return None: each process has compared its own part before it was put in."""
        return None


def report_part(waiting: Path, held: HeldState, verify: str) -> JsonObject:
    """Write the part of this process; return its files, or what went wrong, as plain JSON."""
    folder = waiting / PART.format(hosts.current_group().index)
    try:
        _wait_until_seen(waiting)
        leaves = store.list_leaves(held, store.describe_tree(held))
        written = write_part(folder, leaves, checksums=verify != "off")
        if verify == "values" and leaves and (name := store.find_differing_part(folder, leaves)):
            raise OSError(errno.EIO, f"{name} reads back differently from what was to be saved")
    # Whatever it is, the others wait for an answer.
    except Exception as error:
        with suppress(OSError):
            files.remove_tree(folder)
        return {"files": {}, "error": short_reason(error), "errno": find_errno(error)}
    return {"files": written, "error": None, "errno": None}


def _wait_until_seen(folder: Path) -> None:
    until = time.monotonic() + SEEN_SECONDS
    while not folder.is_dir() and time.monotonic() < until:
        time.sleep(0.05)


def _raise_first(reports: list[Any]) -> None:
    """Raise what kept the first process that failed from writing, as its own trouble would be raised here."""
    for index, report in enumerate(reports):
        if report["error"] is not None:
            what = f"process {index}: {report['error']}" if index else report["error"]
            if report["errno"] is not None:
                raise OSError(report["errno"], what if index else os.strerror(report["errno"]))
            raise StorageError(what)
