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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runner import files, hosts
from runner.checkpoint import arrays, store
from runner.checkpoint.arrays import LeafPieces
from runner.checkpoint.record import SAVE_CHANNEL, STATE, FileTable
from runner.checkpoint.seal import WrittenArrays, measure_and_sync
from runner.checkpoint.store import Index
from runner.checkpoint.trouble import find_errno, short_reason
from runner.errors import StorageError
from runner.types import JsonObject, Tree

# The folder of a process within a tree, as Orbax names it too.
PART = "ocdbt.process_{}"
# What the folder is called in which the parts wait for the checkpoint.
PARTS_SUFFIX = ".parts"
# On a network file system a folder that one process makes is seen by the others a little later.
SEEN_SECONDS = 10.0


@dataclass(frozen=True)
class HeldLeaf:
    """Hold what this process is to write of an array.

    Attributes:
        whole: shape, type and sharding of all of it.
        words: the same as it lies on disk: a random key as its words.
        pieces: copies in host memory of the parts that no other process writes, with their places.
    """

    whole: jax.ShapeDtypeStruct
    words: jax.ShapeDtypeStruct
    pieces: tuple[tuple[Index, jax.Array], ...]


def hold_parts(state: Tree) -> Tree:
    """Return a tree with what this process is to write of each array, copied to host memory. Does not wait."""
    return jax.tree.map(_hold_leaf, state)


def _hold_leaf(leaf: jax.Array) -> HeldLeaf:
    whole = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    words, pieces = whole, []
    if store.is_key(leaf):
        shape = jax.eval_shape(jax.random.key_data, whole)
        words = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=store.words_sharding(whole, shape))
    for shard in leaf.addressable_shards:
        # Of parts that lie on several devices, one device's copy is written.
        if shard.replica_id == 0:
            data = jax.random.key_data(shard.data) if store.is_key(leaf) else shard.data
            pieces.append((shard.index, jax.device_put(data, data.sharding.with_memory_kind("pinned_host"))))
    return HeldLeaf(whole, words, tuple(pieces))


def name_held(state: Tree) -> dict[str, HeldLeaf]:
    """Return what this process is to write under the names that arrays have on disk. Raises as `name_leaves`."""
    held: Any = store.name_leaves(state)  # its leaves are of another type here
    return held


def write_part(folder: Path, held: Mapping[str, HeldLeaf], *, checksums: bool) -> FileTable:
    """Write what this process holds into a folder of its own, durably; return its files with their checksums.

    Raises OSError, ValueError where the disk does not take it.
    """
    leaves = {
        name: LeafPieces(leaf.words.shape, store.find_chunk(leaf.words), _read_pieces(leaf))
        for name, leaf in held.items()
        if leaf.pieces
    }
    # All it has is held, and written, by others: they need no empty folder.
    if not leaves:
        return {}
    folder.mkdir()
    arrays.write_leaves(folder, leaves)
    return measure_and_sync(folder, checksums=checksums)


def _read_pieces(leaf: HeldLeaf) -> list[tuple[Index, np.ndarray]]:
    return [(index, np.asarray(values)) for index, values in leaf.pieces]


def find_differing_part(folder: Path, held: Mapping[str, HeldLeaf]) -> str | None:
    """Return an array of which a part on disk is not, bit for bit, what this process has written; None for none."""
    mine = {name: leaf for name, leaf in held.items() if leaf.pieces}
    if not mine:
        return None
    with arrays.open_leaves(folder, mine) as opened:
        for name, leaf in mine.items():
            for index, live in _read_pieces(leaf):
                saved = np.asarray(opened[name][index or ()].read().result())
                if (live.shape, live.dtype, live.tobytes()) != (saved.shape, saved.dtype, saved.tobytes()):
                    return name
    return None


class SharedStore:
    """Put a state that several processes hold among them on disk: the part of process 0, which puts it together.

    The others do the same at the same time (following_saver.py). `verify` is what is proven of what was written.
    """

    def __init__(self, verify: str):
        self._verify = verify

    def copy_to_host(self, state: Tree) -> Tree:
        """Return what this process is to write, copied to host memory."""
        return hold_parts(state)

    def write_checkpoint(self, directory: Path, state: Tree, progress: JsonObject) -> WrittenArrays:
        """Write a state, and return what it has, and the files whose checksums their writers have taken.

        Raises StorageError, OSError where one of the processes cannot write; then nothing has that name.
        """
        # A strategy that waits for the disk has not copied it.
        state = jax.tree.map(lambda leaf: leaf if isinstance(leaf, HeldLeaf) else _hold_leaf(leaf), state)
        held = name_held(state)
        waiting = directory.with_name(directory.name + PARTS_SUFFIX)
        waiting.mkdir(parents=True)
        try:
            hosts.agree(SAVE_CHANNEL, {"into": str(waiting), "verify": self._verify})
            found = hosts.gather(SAVE_CHANNEL, report_part(waiting, held, self._verify))
            assert found is not None, "process 0 puts the parts together"
            _raise_first(found)
            listed = {name: str(store.describe_leaf(leaf.whole)) for name, leaf in held.items()}
            stand_in = jax.numpy.zeros((), device=jax.local_devices()[0])

            def write_notes(tree: Path, _: Mapping[str, jax.Array]) -> None:
                whole = {name: leaf.whole for name, leaf in held.items()}
                store.write_notes(tree, whole, {name: leaf.words for name, leaf in held.items()})

            # Orbax is given the names alone, each with the same number: it writes none of them.
            names_only = jax.tree.map(lambda _: stand_in, state)
            store.write_with_orbax(directory, names_only, progress, write_notes)
            # After Orbax is done: it would merge folders of that name by itself, in another manner.
            parts = [PART.format(index) for index, report in enumerate(found) if report["files"]]
            for name in parts:
                files.rename_path(waiting / name, directory / STATE / name)
            try:
                arrays.merge_trees(directory / STATE, parts)
            # TensorStore says everything with a ValueError, also what the operating system had told it.
            except ValueError as error:
                raise StorageError(short_reason(error)) from error
        finally:
            files.remove_tree(waiting)
        measured = {
            f"{STATE}/{PART.format(index)}/{name}": facts
            for index, report in enumerate(found)
            for name, facts in report["files"].items()
        }
        return WrittenArrays(listed, measured)

    def find_differing_leaf(self, directory: Path, state: Tree) -> str | None:
        """Return None: each process has compared its own part before it was put in."""
        return None


def report_part(waiting: Path, held: Mapping[str, HeldLeaf], verify: str) -> JsonObject:
    """Write the part of this process; return its files, or what went wrong, as plain JSON."""
    folder = waiting / PART.format(hosts.current_group().index)
    try:
        _wait_until_seen(waiting)
        written = write_part(folder, held, checksums=verify != "off")
        if verify == "values" and (name := find_differing_part(folder, held)):
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
