"""Plan where every byte of a saved tree lies: the chunks of its arrays, what describes them, and the index of it all.

A run saves the same structure each time, so that a plan is made once: a save then writes buffers, and computes nothing
for each array. Nothing here reads or writes a file, or imports TensorStore.
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runner.checkpoint.ocdbt import Crc, Extent, Place, encode_index

# One file is written, and its checksum computed, by one thread: more files let them work side by side when it is read.
FILE_BYTES = 256 << 20
# An array that begins at a multiple of this in a file can be used where it was read to. What jax asks for on a CPU.
ALIGNMENT = 64


class PieceKind(NamedTuple):
    """Describe a piece of an array that is written: whole chunks of it.

    Attributes:
        name: that of the array.
        shape: that of the whole array.
        chunk: the shape of the chunks it is divided into.
        dtype: the type of its numbers.
        start: where the piece begins in the array.
        extent: the shape of the piece.
    """

    name: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype
    start: tuple[int, ...]
    extent: tuple[int, ...]


@dataclass(frozen=True)
class PlacedChunk:
    """Say which part of which piece is the next chunk of a file.

    Attributes:
        piece: its number.
        part: the part of the piece; None for all of it.
        padding: the shape of the whole chunk, where it reaches beyond the array; None where it does not.
    """

    piece: int
    part: tuple[slice, ...] | None
    padding: tuple[int, ...] | None


@dataclass(frozen=True)
class DataFile:
    """Hold the content of a file: chunks and bytes, in order.

    Attributes:
        name: relative to the folder of the tree.
        content: what it consists of.
        num_bytes: its size.
    """

    name: str
    content: tuple[PlacedChunk | bytes, ...]
    num_bytes: int


@dataclass(frozen=True)
class Layout:
    """Hold the files of a tree but for the manifest, which `encode_manifest` makes for a time since 1970, in ns."""

    files: tuple[DataFile, ...]
    encode_manifest: Callable[[int], bytes]


# Returns the zarr.json of an array of such a type, shape and shape of its chunks.
DescribeArray = Callable[[np.dtype, tuple[int, ...], tuple[int, ...]], bytes]


class _OpenFile:
    def __init__(self) -> None:
        self.name, self.content, self.size = f"d/{secrets.token_hex(16)}", list[PlacedChunk | bytes](), 0

    def append(self, what: PlacedChunk | bytes, length: int, *, aligned: bool) -> Extent:
        """Put something at the end of the file; return where it lies."""
        if aligned and (gap := -self.size % ALIGNMENT):
            self.content.append(bytes(gap))
            self.size += gap
        self.content.append(what)
        self.size += length
        return Extent(self.name, self.size - length, length)


def plan_layout(pieces: Sequence[PieceKind], describe: DescribeArray, crc: Crc) -> Layout:
    """Return where everything lies. Raises ValueError where two arrays, or two pieces of one, have the same place."""
    files, index = [_OpenFile()], dict[bytes, Place]()
    described = dict[bytes, Extent]()

    def note(key: str, place: Extent) -> None:
        if index.setdefault(key.encode(), place) is not place:
            raise ValueError(f"two arrays are written as {key}")

    for number, piece in enumerate(pieces):
        # As TensorStore joins a path: the keys of an array without a name begin with nothing.
        prefix = f"{piece.name}/" if piece.name else ""
        length = math.prod(piece.chunk) * piece.dtype.itemsize
        for key, chunk in _divide_piece(number, piece):
            if files[-1].size and files[-1].size + length > FILE_BYTES:
                files.append(_OpenFile())
            note(prefix + key, files[-1].append(chunk, length, aligned=True))
    last = files[-1]
    for piece in pieces:
        content = describe(piece.dtype, piece.shape, piece.chunk)
        # Once for all arrays of one kind: the format allows that keys share a value.
        place = described.get(content) or last.append(content, len(content), aligned=False)
        described[content] = place
        key = f"{piece.name}/zarr.json" if piece.name else "zarr.json"
        if index.setdefault(key.encode(), place) != place:
            raise ValueError(f"two arrays are written as {key}")
    nodes, encode_manifest = encode_index(index, last.name, last.size, crc)
    last.append(nodes, len(nodes), aligned=False)
    return Layout(tuple(DataFile(file.name, tuple(file.content), file.size) for file in files), encode_manifest)


def _divide_piece(number: int, piece: PieceKind) -> list[tuple[str, PlacedChunk]]:
    """Return the chunks of a piece, each with its key in the array."""
    counts = [-(-length // chunk) for length, chunk in zip(piece.extent, piece.chunk, strict=True)]
    # An array of no numbers has no chunks.
    if math.prod(piece.extent) == 0:
        return []
    firsts = [start // chunk for start, chunk in zip(piece.start, piece.chunk, strict=True)]
    found = []
    for at in itertools.product(*map(range, counts)):
        key = "/".join(["c", *(str(first + n) for first, n in zip(firsts, at, strict=True))])
        part = tuple(
            slice(n * chunk, min((n + 1) * chunk, length))
            for n, chunk, length in zip(at, piece.chunk, piece.extent, strict=True)
        )
        is_whole = all(one.stop - one.start == chunk for one, chunk in zip(part, piece.chunk, strict=True))
        is_all = is_whole and piece.extent == piece.chunk
        found.append((key, PlacedChunk(number, None if is_all else part, None if is_whole else piece.chunk)))
    return found


def list_buffers(file: DataFile, pieces: Sequence[np.ndarray]) -> list[memoryview]:
    """Return the content of a file, as bytes that are where the pieces have them; a chunk that is not is copied."""
    return [memoryview(one) if isinstance(one, bytes) else _view_bytes(one, pieces[one.piece]) for one in file.content]


def _view_bytes(chunk: PlacedChunk, piece: np.ndarray) -> memoryview:
    values = piece if chunk.part is None else piece[chunk.part]
    if chunk.padding is not None:
        whole = np.zeros(chunk.padding, values.dtype)
        whole[tuple(map(slice, values.shape))] = values
        values = whole
    # Types that are numpy's own by name only have no buffer of their own.
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
