"""PROOF that a checkpoint is what was written: size and checksum of every file, and everything on the platter. No jax.

Orbax restores flipped bits silently and fsyncs only its array data (measured on 0.12.8), so both are done here. The
checksums of the files with the arrays are those of what was in memory: a restore proves that it reads what the process
had, and not only what the disk once took. All else is small, and is read back.
The checksum is XXH3 of 128 bits, six times as fast as zlib's CRC-32 (measured: 100 MB in 7 ms).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from runner.checkpoint.record import (
    PIN,
    REASON,
    SIDECAR,
    STATE,
    ArrayTable,
    FileFacts,
    FileTable,
    Record,
    Sidecar,
    encode_sidecar,
    read_sidecar,
)
from runner.checkpoint.trouble import find_errno
from runner.errors import StorageError
from runner.files import sync_path

# Takes the sizes and checksums of the named files of a checkpoint.
MeasureFiles = Callable[[Path, Sequence[str]], FileTable]

CHUNK_BYTES = 1 << 20  # what is read at once stays in the processor's cache
# Checksums are computed outside of Python's lock, so files are read side by side.
CHECKSUM_THREADS = min(4, os.cpu_count() or 1)
PARALLEL_BYTES = 1 << 20  # from here on a thread pays: a checkpoint has ten files that are smaller
SYNC_THREADS = 16  # files that wait for the disk at the same time


@dataclass(frozen=True)
class WrittenArrays:
    """Say what was to be written, by who has it in memory: a seal of what lies there proves nothing by itself.

    Attributes:
        table: every array.
        measured: files whose checksums their writers have taken, from what they had in memory: whatever else comes to
            lie on disk, at any time, is found when it is read. The writers may be other processes.
    """

    table: ArrayTable
    measured: FileTable = field(default_factory=dict)


def seal_checkpoint(
    directory: Path, record: Record, written: WrittenArrays | None = None, *, checksums: bool = True
) -> None:
    """Write the sidecar with size and checksum of every file, and make all of the directory durable.

    Call this before the directory gets its name. Without `checksums` only the sizes are kept.

    Raises OSError, and StorageError where the arrays on disk are not those that were to be written.
    """
    # Imported here for the reason given in `measure_files`.
    from concurrent.futures import ThreadPoolExecutor

    arrays, measured = (written.table, written.measured) if written is not None else (None, {})
    names = list(_list_names(directory))
    if missing := sorted(measured.keys() - set(names)):
        raise StorageError(_find_differing_array(directory, arrays or {}) or f"{missing[0]} is missing")
    found = measure_files(directory, [name for name in names if name not in measured], checksums=checksums)
    for name, facts in measured.items():
        if (size := (directory / name).stat().st_size) != facts["bytes"]:
            raise OSError(errno.EIO, f"{name} has {size} bytes here and {facts['bytes']} where it was written")
    files = {name: {**found, **measured}[name] for name in names}
    if not checksums:
        files = {name: {"bytes": facts["bytes"]} for name, facts in files.items()}
    sidecar = directory / SIDECAR
    sidecar.write_bytes(encode_sidecar(Sidecar(record, files, arrays)))
    # Side by side the syncs share the disk's own commits: a third of the time of one after another (measured).
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        syncing = pool.map(sync_path, list_paths(directory))
        # While the disk is busy. There is time for it: the checkpoint has no name yet.
        problem = _find_unreadable(directory, arrays) if arrays is not None else None
        list(syncing)
    if problem is not None:
        raise StorageError(problem)


def sync_folder(folder: Path) -> None:
    """Make all of a folder durable. Raises OSError."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        list(pool.map(sync_path, list_paths(folder)))


def list_paths(folder: Path) -> list[Path]:
    """Return everything in a folder, files before folders, and the folder itself last."""
    below = sorted(folder.rglob("*"), key=Path.is_dir)
    return [*below, folder]


def find_problem(
    directory: Path, *, checksums: bool = True, step: int | None = None, measure: MeasureFiles | None = None
) -> str | None:
    """Return why this checkpoint is not what was written, in a few words; None when every byte is.

    Without `checksums` no file is read: only their names and sizes are compared. `step` is what it should hold, where
    the directory is not named after it. `measure` takes the checksums, where some of them are taken already.

    Raises:
        OSError: something is there and cannot be read now (a disk in trouble, too many open files, no permission): that
            says nothing about its bytes.
        NewerFormatError: a later version has saved it, and only that one can tell.
    """
    try:
        if (odd := find_odd_file(directory)) is not None:
            return odd
        _, sealed, arrays = read_sidecar(directory, step)
    except (FileNotFoundError, NotADirectoryError):
        return f"no {SIDECAR}: it was never finished, or it is not a checkpoint of a run"
    except ValueError as error:
        return f"{SIDECAR} cannot be believed ({error})"
    present = set(_list_names(directory))
    if missing := sorted(sealed.keys() - present):
        return f"{missing[0]} is missing"
    # A file too many means that something else has written there.
    if foreign := sorted(present - sealed.keys()):
        return f"{foreign[0]} does not belong to it"
    try:
        found = (
            measure(directory, list(sealed))
            if measure is not None and checksums
            else measure_files(directory, list(sealed), checksums=checksums)
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    for name, expected in sealed.items():
        if found[name]["bytes"] != expected["bytes"]:
            return f"{name} has {found[name]['bytes']} bytes instead of {expected['bytes']}"
        # A checkpoint that was saved with ckpt.verify=off has no checksums to compare with.
        if checksums and expected.get("xxh3", found[name]["xxh3"]) != found[name]["xxh3"]:
            return f"{name} is not what was written (its checksum differs)"
    # Before the arrays were listed, this was sealed where they had been written somewhere else.
    if f"{STATE}/_METADATA" in sealed and f"{STATE}/manifest.ocdbt" not in sealed:
        return "it holds no arrays: they were written somewhere else"
    return _find_differing_array(directory, arrays) if checksums and arrays is not None else None


def find_odd_file(directory: Path) -> str | None:
    """Return what in a checkpoint is neither a plain file nor a folder, in a few words; None where nothing is.

    Such a checkpoint is not read at all: a link leads out of it, a pipe is waited for, and a device has no end. Raises
    OSError where a folder cannot be listed.
    """
    folders = [directory]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    what = "is a link" if entry.is_symlink() else "is no plain file"
                    return f"{Path(entry.path).relative_to(directory)} {what}"
    return None


def _find_differing_array(directory: Path, arrays: ArrayTable) -> str | None:
    """Return which array on disk is not what was to be written, in a few words; None where all are.

    Raises OSError where they cannot be read now.
    """
    # Imported here: `python -m runner ls` asks for sizes only, and answers sooner without TensorStore.
    from runner.checkpoint.arrays import read_leaf_specs

    try:
        found = {name: str(spec) for name, spec in read_leaf_specs(directory / STATE).items()}
    # TensorStore says everything with a ValueError, also what the operating system had told it.
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if number := find_errno(error):
            raise OSError(number, os.strerror(number), str(directory / STATE)) from error
        return f"its arrays cannot be listed ({str(error).splitlines()[0]})"
    differing = sorted(name for name in found.keys() | arrays.keys() if found.get(name) != arrays.get(name))
    if not differing:
        return None
    name, more = differing[0], f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return f"{name} is {found.get(name, 'absent')} on disk and was {arrays.get(name, 'absent')} in memory{more}"


def _find_unreadable(directory: Path, arrays: ArrayTable) -> str | None:
    """Return what of the arrays on disk is not what was to be written, or is not to be found by TensorStore.

    Raises OSError where they cannot be read now.
    """
    if (problem := _find_differing_array(directory, arrays)) is not None:
        return problem
    from runner.checkpoint.arrays import list_with_tensorstore

    # What was just compared was written and read by our own code: others read it with TensorStore.
    try:
        listed = list_with_tensorstore(directory / STATE)
    except ValueError as error:
        if number := find_errno(error):
            raise OSError(number, os.strerror(number), str(directory / STATE)) from error
        return f"TensorStore cannot list its arrays ({str(error).splitlines()[0]})"
    missing = sorted(arrays.keys() - {key.decode().removesuffix("/zarr.json") for key in listed})
    return f"TensorStore does not find {missing[0]}" if missing else None


def measure_files(directory: Path, names: Sequence[str], *, checksums: bool) -> FileTable:
    """Return the size of every file and, where asked for, the checksum of its content. Raises OSError."""
    if not checksums:
        return {name: {"bytes": (directory / name).stat().st_size} for name in names}
    large = [name for name in names if (directory / name).stat().st_size >= PARALLEL_BYTES]
    found = {name: _measure_file(directory / name) for name in names if name not in large}
    if not large:
        return found
    # Imported here: `python -m runner ls` compares sizes only, and answers sooner without it.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        found |= zip(large, pool.map(_measure_file, [directory / name for name in large]), strict=True)
    return found


def _list_names(directory: Path) -> Iterator[str]:
    """Yield every file of a checkpoint that is sealed, in order: not the sidecar, nor what is put beside it later."""
    names = []
    # Not `rglob`: it passes over a folder that cannot be read, and its files would seem to be missing.
    for folder, _, files in os.walk(directory, onerror=_raise_error):
        names += [(Path(folder) / file).relative_to(directory).as_posix() for file in files]
    yield from sorted(name for name in names if name not in (SIDECAR, PIN, REASON))


def _raise_error(error: OSError) -> None:
    raise error


def _measure_file(path: Path) -> FileFacts:
    hasher, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(CHUNK_BYTES))
    # Unbuffered, into one buffer: nothing is copied, and a checkpoint larger than memory is no trouble.
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
    return {"bytes": size, "xxh3": hasher.hexdigest()}
