"""Read parts of saved arrays as the bytes that they are: many in one read where they lie side by side in a file.

What is read goes into buffers that are used again: to touch fresh memory page by page takes several times as long as to
read (100 MB: 35 ms against 6), and two of them bound what is held besides the state. Where a proof is asked for, the
checksum of each file is taken from the same buffers, while they are in the processor's cache: no file is read twice,
and what is proven is what was read. No jax, no TensorStore.
"""

from __future__ import annotations

import errno
import functools
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from runner.checkpoint.buffers import allocate_buffer
from runner.checkpoint.ocdbt import Extent, Index, Place, check_file
from runner.checkpoint.record import FileFacts, FileTable

# So much is read at once, and no more than the largest array; two such buffers are in use. More would be more memory to
# touch, and less that goes on side by side (10 MB: 3.2 ms with 8 MB, 2.6 with this).
RUN_BYTES = 1 << 20
# What is read before its checksum is taken stays in the cache of one core.
SLICE_BYTES = 512 << 10
# What lies between two parts is read along where it is less than another read would cost.
GAP_BYTES = 4096
# Where jax finds an array on a CPU at a multiple of 64 it uses it where it is, also where it is asked not to (0.10.2).
# Then the next read would change it. So what begins at a multiple of 64 in a file, as all arrays do that are written
# here, is put a little beside one, and jax copies it while the next ones are read. Older code wrote arrays anywhere: of
# those that come to lie at a multiple a copy is handed on.
MISALIGNMENT = 16
_ALIGNMENT = 64


@dataclass(frozen=True)
class SavedPart:
    """Say where a part of an array lies that is exactly one chunk of it.

    Attributes:
        shape: that of the part.
        dtype: the type of its numbers.
        place: where its bytes lie.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    place: Place


@dataclass(frozen=True)
class ChunkGrid:
    """Describe how an array is divided on disk.

    Attributes:
        shape: that of the array.
        chunk: that of its chunks.
        dtype: the type of its numbers.
        is_plain: whether the bytes of a chunk are its numbers, without any coding.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    is_plain: bool

    def locate(self, index: Index, name: str, part: tuple[slice, ...]) -> SavedPart | None:
        """Return where a part of an array lies, if it is exactly one chunk; None where it is not."""
        if not self.is_plain or not self._num_bytes:
            return None
        first = self._whole if not part else self._find_chunk(part)
        if first is None:
            return None
        place = index.get((f"{name}/{first}" if name else first).encode())
        if place is None or (place.length if isinstance(place, Extent) else len(place)) != self._num_bytes:
            return None
        return SavedPart(self.chunk, self.dtype, place)

    def _find_chunk(self, part: tuple[slice, ...]) -> str | None:
        """Return the key, within the array, of the chunk that a part is; None where it is not exactly one."""
        numbers = []
        for piece, length, chunk in zip(part, self.shape, self.chunk, strict=True):
            start, stop, _ = piece.indices(length)
            if start % chunk or stop - start != chunk:
                return None
            numbers.append(start // chunk)
        return "/".join(["c", *map(str, numbers)])

    # A state has hundreds of arrays, and few kinds of them.
    @functools.cached_property
    def _whole(self) -> str | None:
        return self._find_chunk((slice(None),) * len(self.shape))

    @functools.cached_property
    def _num_bytes(self) -> int:
        """The size of a chunk; 0 where the array has no numbers."""
        return math.prod(self.chunk) * self.dtype.itemsize if math.prod(self.shape) else 0


@dataclass(frozen=True)
class _Run:
    """Parts that lie side by side: where they begin, so many bytes, and the place of each in them."""

    file: str
    offset: int
    length: int
    parts: tuple[tuple[int, int], ...]  # the number of the part, its offset in the run


class _FileReader:
    """Read a file of a database. Every byte up to where was read is part of its checksum, where one is taken."""

    def __init__(self, handle: int, *, measures: bool):
        self._handle, self._hasher, self._hashed = handle, xxhash.xxh3_128() if measures else None, 0

    def read(self, into: memoryview, offset: int) -> None:
        """Fill a buffer with what lies at `offset`. Raises OSError where the file ends before."""
        if self._hasher is None:
            _read_fully(self._handle, into, offset)
            return
        self._pass_over(offset)
        for start in range(0, len(into), SLICE_BYTES):
            part = into[start : start + SLICE_BYTES]
            _read_fully(self._handle, part, offset + start)
            self._hash(part, offset + start)

    def finish(self) -> FileFacts:
        """Read what is left of the file; return its size and its checksum."""
        assert self._hasher is not None, "a checksum was asked for"
        self._pass_over(os.fstat(self._handle).st_size)
        return {"bytes": self._hashed, "xxh3": self._hasher.hexdigest()}

    def _pass_over(self, end: int) -> None:
        """Take into the checksum what lies before `end` and was not read."""
        if self._hashed >= end:
            return
        buffer = memoryview(bytearray(min(SLICE_BYTES, end - self._hashed)))
        while self._hashed < end:
            part = buffer[: end - self._hashed]
            _read_fully(self._handle, part, self._hashed)
            self._hash(part, self._hashed)

    def _hash(self, content: memoryview, offset: int) -> None:
        """Take into the checksum what of some bytes is not in it: two arrays may share theirs."""
        assert self._hasher is not None
        if (fresh := content[max(0, self._hashed - offset) :]).nbytes:
            self._hasher.update(fresh)
            self._hashed += fresh.nbytes


def iter_parts(
    folder: Path, parts: Sequence[SavedPart], measured: FileTable | None = None
) -> Iterator[dict[int, np.ndarray]]:
    """Yield the values of parts by their numbers, as they lie in the files, some at a time; meanwhile read the next.

    They are good until more is asked for. Where `measured` is given it takes size and checksum of every file that was
    read, by its name; all of such a file is read then. Raises OSError where a file cannot be read.
    """
    inline = {number: part.place for number, part in enumerate(parts) if isinstance(part.place, bytes)}
    if inline:
        yield {number: _view(place, parts[number], 0, is_aligned=True) for number, place in inline.items()}
    runs = _plan_runs(parts)
    with ExitStack() as opened, ThreadPoolExecutor(1) as pool:
        readers: dict[str, _FileReader] = {}
        for file in {run.file for run in runs}:
            handle = os.open(folder / check_file(file), os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, handle)
            readers[file] = _FileReader(handle, measures=measured is not None)
        buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

        def read(number: int) -> np.ndarray:
            run, turn = runs[number], number % 2
            if len(buffers[turn]) < run.length + _ALIGNMENT:
                buffers[turn] = np.frombuffer(allocate_buffer(run.length + _ALIGNMENT), np.uint8)
            # The same within 64 bytes as in the file, and then a little off.
            first = (run.offset + MISALIGNMENT - buffers[turn].ctypes.data) % _ALIGNMENT
            readers[run.file].read(memoryview(buffers[turn].data)[first : first + run.length], run.offset)
            is_last = number + 1 == len(runs) or runs[number + 1].file != run.file
            if measured is not None and is_last:
                measured[run.file] = readers[run.file].finish()
            return buffers[turn][first : first + run.length]

        following: Future[np.ndarray] | None = pool.submit(read, 0) if runs else None
        for number, run in enumerate(runs):
            assert following is not None
            content = following.result()
            # Into the buffer of the one before, which whoever asks for this one is done with.
            following = pool.submit(read, number + 1) if number + 1 < len(runs) else None
            # Once for all of them: numpy takes longer to say where an array lies than to make it.
            address = content.ctypes.data
            yield {
                part: _view(content, parts[part], offset, is_aligned=(address + offset) % _ALIGNMENT == 0)
                for part, offset in run.parts
            }


def _plan_runs(parts: Sequence[SavedPart]) -> list[_Run]:
    """Return what is read at once, in the order of the files and of what is in them."""
    extents = [(part.place, number) for number, part in enumerate(parts) if isinstance(part.place, Extent)]
    runs, run, end = list[_Run](), list[tuple[int, int]](), 0
    first: Extent | None = None
    for extent, number in sorted(extents):
        fits = (
            first is not None
            and extent.file == first.file
            and 0 <= extent.offset - end <= GAP_BYTES
            and extent.offset + extent.length - first.offset <= RUN_BYTES
        )
        if not fits:
            if first is not None:
                runs.append(_Run(first.file, first.offset, end - first.offset, tuple(run)))
            first, run = extent, []
        assert first is not None
        run.append((number, extent.offset - first.offset))
        end = extent.offset + extent.length
    if first is not None:
        runs.append(_Run(first.file, first.offset, end - first.offset, tuple(run)))
    return runs


def _view(content: np.ndarray | bytes, part: SavedPart, offset: int, *, is_aligned: bool) -> np.ndarray:
    """Return the values of a part that was read: where they lie, or a copy where jax would use them in place."""
    values: np.ndarray = np.ndarray(part.shape, part.dtype, content, offset)
    return values.copy() if is_aligned else values


def _read_fully(handle: int, into: memoryview, offset: int) -> None:
    while len(into):
        count = os.preadv(handle, [into], offset)
        if count == 0:
            raise OSError(errno.EIO, "a file of the checkpoint ends too early")
        into, offset = into[count:], offset + count
