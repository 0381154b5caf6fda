"""Read parts of saved arrays as the bytes that they are: many in one read where they lie side by side in a file.

What is read goes into buffers that are used again: to touch fresh memory page by page takes several times as long as to
read (100 MB: 35 ms against 6), and two of them bound what is held besides the state. No jax, no TensorStore.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runner.checkpoint.buffers import allocate_buffer
from runner.checkpoint.ocdbt import Extent, Index, Place, check_file

# So much is read at once, and no more than the largest array; two such buffers are in use.
RUN_BYTES = 8 << 20
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
        if not self.is_plain or math.prod(self.shape) == 0:
            return None
        numbers = []
        for piece, length, chunk in zip(part or (slice(None),) * len(self.shape), self.shape, self.chunk, strict=True):
            start, stop, _ = piece.indices(length)
            if start % chunk or stop - start != chunk:
                return None
            numbers.append(start // chunk)
        key = "/".join([*([name] if name else []), "c", *map(str, numbers)])
        place = index.get(key.encode())
        size = math.prod(self.chunk) * self.dtype.itemsize
        if place is None or (place.length if isinstance(place, Extent) else len(place)) != size:
            return None
        return SavedPart(self.chunk, self.dtype, place)


@dataclass(frozen=True)
class _Run:
    """Parts that lie side by side: where they begin, so many bytes, and the place of each in them."""

    file: str
    offset: int
    length: int
    parts: tuple[tuple[int, int], ...]  # the number of the part, its offset in the run


def iter_parts(folder: Path, parts: Sequence[SavedPart]) -> Iterator[dict[int, np.ndarray]]:
    """Yield the values of parts by their numbers, in order, some at a time; the next are read meanwhile.

    They are good until more is asked for. Raises OSError where a file cannot be read.
    """
    inline = {number: part.place for number, part in enumerate(parts) if isinstance(part.place, bytes)}
    if inline:
        yield {number: _view(place, parts[number], 0).copy() for number, place in inline.items()}
    runs = _plan_runs(parts)
    with ExitStack() as opened, ThreadPoolExecutor(1) as pool:
        handles: dict[str, int] = {}
        for file in {run.file for run in runs}:
            handles[file] = os.open(folder / check_file(file), os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, handles[file])
        buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

        def read(number: int) -> np.ndarray:
            run, turn = runs[number], number % 2
            if len(buffers[turn]) < run.length + _ALIGNMENT:
                buffers[turn] = np.frombuffer(allocate_buffer(run.length + _ALIGNMENT), np.uint8)
            # The same within 64 bytes as in the file, and then a little off.
            first = (run.offset + MISALIGNMENT - buffers[turn].ctypes.data) % _ALIGNMENT
            _read_fully(handles[run.file], memoryview(buffers[turn].data)[first : first + run.length], run.offset)
            return buffers[turn][first : first + run.length]

        following: Future[np.ndarray] | None = pool.submit(read, 0) if runs else None
        for number, run in enumerate(runs):
            assert following is not None
            content = following.result()
            # Into the buffer of the one before, which whoever asks for this one is done with.
            following = pool.submit(read, number + 1) if number + 1 < len(runs) else None
            yield {part: _view(content, parts[part], offset) for part, offset in run.parts}


def _plan_runs(parts: Sequence[SavedPart]) -> list[_Run]:
    runs, run, end = list[_Run](), list[tuple[int, int]](), 0
    first: Extent | None = None
    for number, part in enumerate(parts):
        extent = part.place
        if not isinstance(extent, Extent):
            continue
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


def _view(content: np.ndarray | bytes, part: SavedPart, offset: int) -> np.ndarray:
    values: np.ndarray = np.ndarray(part.shape, part.dtype, content, offset)
    return values if values.ctypes.data % _ALIGNMENT else values.copy()


def _read_fully(handle: int, into: memoryview, offset: int) -> None:
    while len(into):
        count = os.preadv(handle, [into], offset)
        if count == 0:
            raise OSError(errno.EIO, "a file of the checkpoint ends too early")
        into, offset = into[count:], offset + count
