"""Proof that a checkpoint is what was written: size and checksum of every file, and everything on the platter. No jax.

Orbax restores flipped bits silently and fsyncs only its array data (measured on 0.12.8), so both are done here.
CRC-32 detects every single- and double-bit flip and every burst up to 32 bits; it runs at memory speed.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from runner.checkpoint.record import PIN, SIDECAR, Files, Record, dump, load

CHUNK_BYTES = 1 << 20
THREADS = min(4, os.cpu_count() or 1)  # checksums leave Python alone: files are read side by side
SYNCS = 16  # files that wait for the disk at the same time
# In format 1 the seal came before Orbax's own commit, which wrote these; nothing is read from them.
UNSEALED_IN_FORMAT_1 = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def seal(directory: Path, record: Record, *, checksums: bool = True) -> None:
    """Write the sidecar with size and digest of every file, and fsync files and directories: before it gets its name.

    The digests are of what is read back from the files. Without `checksums` only the sizes are kept.
    """
    files = measure(directory, list(_names(directory)), checksums=checksums)
    from concurrent.futures import ThreadPoolExecutor  # as in `measure`

    sidecar = directory / SIDECAR
    sidecar.write_bytes(dump(record, files))
    folders = [path for path in directory.rglob("*") if path.is_dir()]
    with ThreadPoolExecutor(SYNCS) as pool:  # side by side they share the disk's own commits: a third of the time
        list(pool.map(_sync, [sidecar, *(directory / name for name in files), *folders, directory]))


def problem_of(directory: Path, *, checksums: bool = True) -> str | None:
    """Why this checkpoint is not what was written, in a few words; None when every byte is.

    Without `checksums` no file is read: only their names and sizes are compared.
    """
    try:
        record, sealed = load(directory)
    except FileNotFoundError:
        return f"no {SIDECAR}: it was never finished, or it is not a checkpoint of a run"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{SIDECAR} cannot be believed ({error or type(error).__name__})"
    unsealed = UNSEALED_IN_FORMAT_1 if record.format == 1 else set()
    present = {name for name in _names(directory) if name.rpartition("/")[2] not in unsealed}
    if missing := sorted(sealed.keys() - present):
        return f"{missing[0]} is missing"
    if foreign := sorted(present - sealed.keys()):
        return f"{foreign[0]} does not belong to it"
    try:
        found = measure(directory, list(sealed), checksums=checksums)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"
    for name, expected in sealed.items():
        if found[name]["bytes"] != expected["bytes"]:
            return f"{name} has {found[name]['bytes']} bytes instead of {expected['bytes']}"
        if checksums and found[name]["crc32"] != expected.get("crc32", found[name]["crc32"]):
            return f"{name} is not what was written (its checksum differs)"
    return None


def measure(directory: Path, names: list[str], *, checksums: bool) -> Files:
    """Size of every file, and CRC-32 of its content where asked for, several files at a time."""
    if not checksums:
        return {name: {"bytes": (directory / name).stat().st_size} for name in names}
    from concurrent.futures import ThreadPoolExecutor  # here: `python -m runner ls` answers sooner without it

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(_read, [directory / name for name in names]), strict=True))


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power loss."""
    _sync(directory)


def _names(directory: Path) -> Iterator[str]:
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_dir() and name not in (SIDECAR, PIN):
            yield name


def _read(path: Path) -> dict[str, int]:
    crc, size, buffer = 0, 0, memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc, size = zlib.crc32(buffer[:count], crc), size + count
    return {"bytes": size, "crc32": crc}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
