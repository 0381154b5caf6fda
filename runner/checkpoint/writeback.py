"""Write buffers to a new file: the disk begins while the rest is still being written, and the checksum is taken beside.

Nothing here makes a file durable: that is for whoever syncs it afterwards, who then waits for less.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from runner.checkpoint.record import FileFacts

# So much is written before the disk is told to begin with it.
SLICE_BYTES = 8 << 20
# Buffers that the system takes at once; IOV_MAX is 1024 on Linux.
BUFFERS_AT_ONCE = 1024
# A thread for the checksum pays from here on.
PARALLEL_BYTES = 1 << 20
_SYNC_FILE_RANGE_WRITE = 2


def write_buffers(path: Path, buffers: Sequence[memoryview]) -> FileFacts:
    """Write a new file; return its size and the checksum of what it was given, which is taken from memory.

    Raises OSError where it is there, or where the disk does not take it.
    """
    size = sum(map(len, buffers))
    if size < PARALLEL_BYTES:
        _write(path, buffers)
        return {"bytes": size, "xxh3": _compute_checksum(buffers)}
    with ThreadPoolExecutor(1) as pool:
        checksum: Future[str] = pool.submit(_compute_checksum, buffers)
        _write(path, buffers)
    return {"bytes": size, "xxh3": checksum.result()}


def _compute_checksum(buffers: Sequence[memoryview]) -> str:
    hasher = xxhash.xxh3_128()
    for buffer in buffers:
        hasher.update(buffer)
    return hasher.hexdigest()


def _write(path: Path, buffers: Sequence[memoryview]) -> None:
    start_writeback = _find_writeback()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        offset = 0
        for group in _group_buffers(buffers):
            begun = offset
            while group:
                written = os.writev(handle, group)
                if written == 0 and any(map(len, group)):
                    raise OSError(errno.EIO, "the disk takes nothing", str(path))
                offset += written
                group = _drop_written(group, written)
            start_writeback(handle, begun, offset - begun)
    finally:
        os.close(handle)


def _group_buffers(buffers: Sequence[memoryview]) -> list[list[memoryview]]:
    """Return the same bytes in groups of at most SLICE_BYTES, and of as many buffers as the system takes at once."""
    groups, group, room = [], list[memoryview](), SLICE_BYTES
    for buffer in buffers:
        rest = buffer
        while len(rest):
            group.append(rest[:room])
            room, rest = room - len(group[-1]), rest[room:]
            if room == 0 or len(group) == BUFFERS_AT_ONCE:
                groups.append(group)
                group, room = [], SLICE_BYTES
    return [*groups, group] if group else groups


def _drop_written(group: list[memoryview], written: int) -> list[memoryview]:
    for number, buffer in enumerate(group):
        if written < len(buffer):
            return [buffer[written:], *group[number + 1 :]]
        written -= len(buffer)
    return []


@functools.cache
def _find_writeback() -> Callable[[int, int, int], None]:
    """Return what has the disk begin with a part of a file, and waits for nothing; on Linux alone there is such a call.

    What goes wrong with it is no matter: the bytes are as durable as before, and the sync says what the disk says.
    """
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return lambda handle, offset, length: None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

    def start(handle: int, offset: int, length: int) -> None:
        call(handle, offset, length, _SYNC_FILE_RANGE_WRITE)

    return start
