"""Encode and decode the index of an OCDBT database: which bytes of which file are the value of a key. No TensorStore.

TensorStore reads what is encoded here, and what it writes itself is decoded here; each array is then written and read
as the bytes that it is, where TensorStore opens a driver for each (2,000 arrays: 106 ms). The format is the one that
google/tensorstore describes in `tensorstore/kvstore/ocdbt/index.rst`: a manifest that names the root of a B+tree, whose
leaf nodes hold the keys. Nothing is compressed. A save has TensorStore list what was written before the checkpoint gets
its name (seal.py), so that a mistake here, or a format that has changed, is an error of that save.
"""

from __future__ import annotations

import functools
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MANIFEST = "manifest.ocdbt"
# What TensorStore writes where nobody chooses: larger values lie outside of the nodes.
MAX_INLINE_BYTES = 100
MAX_NODE_BYTES = 8 << 20
VERSION_TREE_ARITY_LOG2 = 4
# A node is read as a whole, and must stay below MAX_NODE_BYTES: an entry of it takes a key and some 20 bytes.
KEYS_PER_NODE = 16384
# A tree of such a height holds more keys than memory does.
MAX_HEIGHT = 4
_MANIFEST_MAGIC, _NODE_MAGIC = b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde"
_HEADER = struct.Struct("<Q")

# Returns the CRC-32C of some bytes, as it lies on disk.
Crc = Callable[[bytes], bytes]


class UnknownLayoutError(ValueError):
    """Raised where a database is one that this module does not decode: compressed, or of many versions."""


class Extent(NamedTuple):
    """Say where a value lies.

    Attributes:
        file: the name of the file, relative to the database; `/` between its parts.
        offset: of the first byte.
        length: in bytes.
    """

    file: str
    offset: int
    length: int


Place = Extent | bytes  # of a value: in a file, or within the index itself
Index = dict[bytes, Place]  # by key, in order


@dataclass(frozen=True)
class _Node:
    """Refer to a node of the tree: where it lies, its height, its first key, and what it adds up to."""

    extent: Extent
    height: int
    first_key: bytes
    statistics: tuple[int, int, int]  # keys, bytes of nodes, bytes of values outside of them


def encode_index(
    index: Mapping[bytes, Place], file: str, offset: int, crc: Crc
) -> tuple[bytes, Callable[[int], bytes]]:
    """Return the nodes of the tree, which are to lie in `file` from `offset` on, and what makes the manifest.

    That takes the nanoseconds since 1970. Raises ValueError where a key is longer than the format allows.
    """
    keys = sorted(index)
    if any(len(key) > 65535 for key in keys):
        raise ValueError("the name of an array is longer than 65,535 bytes")
    encoded = bytearray()

    def add(node: bytes, height: int, first_key: bytes, values: tuple[int, int, int]) -> _Node:
        extent = Extent(file, offset + len(encoded), len(node))
        encoded.extend(node)
        return _Node(extent, height, first_key, (values[0], values[1] + len(node), values[2]))

    nodes = []
    for start in range(0, len(keys), KEYS_PER_NODE):
        part = keys[start : start + KEYS_PER_NODE]
        outside = sum(place.length for key in part if isinstance(place := index[key], Extent))
        nodes.append(add(_encode_leaf({key: index[key] for key in part}, crc), 0, part[0], (len(part), 0, outside)))
    if len(nodes) > 1:
        total: tuple[int, int, int] = tuple(map(sum, zip(*(node.statistics for node in nodes), strict=True)))  # type: ignore[assignment]
        nodes = [add(_encode_interior(nodes, crc), 1, b"", total)]
    return bytes(encoded), functools.partial(_encode_manifest, nodes[0] if nodes else None, crc)


def _encode_manifest(root: _Node | None, crc: Crc, nanoseconds: int) -> bytes:
    """Return a manifest of one version, whose tree has this root; of one without any key, where there is none."""
    nothing = (1 << 64) - 1
    extent = root.extent if root else Extent("", nothing, nothing)
    height, statistics = (root.height, root.statistics) if root else (0, (0, 0, 0))
    body = b"".join(
        [
            os.urandom(16),
            _varints([0, MAX_INLINE_BYTES, MAX_NODE_BYTES]),
            bytes([VERSION_TREE_ARITY_LOG2]),
            _varints([0]),
            _encode_files([extent.file]),
            # One version, the first, whose root lies in file 0.
            _varints([1, 1]),
            bytes([height]),
            _varints([0, extent.offset, extent.length, *statistics]),
            _HEADER.pack(nanoseconds),
            # No older versions.
            _varints([0]),
        ]
    )
    return _frame(_MANIFEST_MAGIC, body, crc)


def _encode_leaf(entries: Mapping[bytes, Place], crc: Crc) -> bytes:
    places = list(entries.values())
    extents = [place for place in places if isinstance(place, Extent)]
    files = sorted({extent.file for extent in extents}, key=os.fsencode)
    numbers = {file: number for number, file in enumerate(files)}
    body = b"".join(
        [
            bytes([0]),
            _encode_files(files),
            _varints([len(entries)]),
            *_encode_keys(list(entries)),
            _varints([place.length if isinstance(place, Extent) else len(place) for place in places]),
            _varints([isinstance(place, Extent) for place in places]),
            _varints([numbers[extent.file] for extent in extents]),
            _varints([extent.offset for extent in extents]),
            *(place for place in places if isinstance(place, bytes)),
        ]
    )
    return _frame(_NODE_MAGIC, body, crc)


def _encode_interior(children: Sequence[_Node], crc: Crc) -> bytes:
    lengths, suffixes = _encode_keys([child.first_key for child in children])
    body = b"".join(
        [
            bytes([children[0].height + 1]),
            _encode_files([children[0].extent.file]),
            _varints([len(children)]),
            lengths,
            # The children hold whole keys: no prefix is left to this node.
            _varints([0] * len(children)),
            suffixes,
            _varints([0] * len(children)),
            _varints([child.extent.offset for child in children]),
            _varints([child.extent.length for child in children]),
            *(_varints([child.statistics[number] for child in children]) for number in range(3)),
        ]
    )
    return _frame(_NODE_MAGIC, body, crc)


def _encode_keys(keys: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return the lengths of the prefixes shared with the key before and of what follows them; and what follows."""
    # No prefix is shared, which the format allows: the keys of a state take less than its numbers either way.
    return _varints([*[0] * (len(keys) - 1), *map(len, keys)]), b"".join(keys)


def _encode_files(files: Sequence[str]) -> bytes:
    """Return a table of files; none of their paths is passed on to nodes below."""
    names = [os.fsencode(file) for file in files]
    prefixes, suffixes = [0] * (len(names) - 1), [len(name) for name in names]
    return _varints([len(names), *prefixes, *suffixes, *[0] * len(names)]) + b"".join(names)


def _frame(magic: bytes, body: bytes, crc: Crc) -> bytes:
    """Return a body with its header and its checksum."""
    # After the length: the version of the format, and no compression.
    length = len(magic) + _HEADER.size + 2 + len(body) + 4
    content = magic + _HEADER.pack(length) + b"\0\0" + body
    return content + crc(content)


def _varints(values: Sequence[int]) -> bytes:
    encoded = bytearray()
    for value in values:
        while value > 0x7F:
            encoded.append(value & 0x7F | 0x80)
            value >>= 7
        encoded.append(value)
    return bytes(encoded)


def read_index(folder: Path) -> Index:
    """Return where the value of each key of a database lies, in order of the keys.

    Nothing is compared with its checksum: that of each file is in the seal of the checkpoint.

    Raises:
        OSError: a file is missing or cannot be read.
        UnknownLayoutError: it is compressed, or has versions that are not in the manifest.
        ValueError: it is none; as TensorStore says it, with the code DATA_LOSS in front.
    """
    try:
        root, height = _decode_manifest((folder / MANIFEST).read_bytes())
        index: Index = {}
        if height > MAX_HEIGHT:
            raise UnknownLayoutError("a tree that is too high")
        if root.file:
            _decode_node(folder, root, height, b"", index)
    except UnknownLayoutError:
        raise
    except (IndexError, struct.error, ValueError) as error:
        raise ValueError(f"DATA_LOSS: {MANIFEST} or a node of its tree is damaged ({error})") from error
    return index


class _Reader:
    """Read numbers and bytes off some bytes, one after the other."""

    def __init__(self, content: bytes, magic: bytes):
        if content[:4] != magic:
            raise ValueError("is no part of an OCDBT database")
        if _HEADER.unpack_from(content, 4)[0] != len(content) or content[12] != 0:
            raise UnknownLayoutError("another version of OCDBT")
        if content[13] != 0:
            raise UnknownLayoutError("compressed")
        self._content, self._at = content, 14

    def take(self, count: int) -> bytes:
        """Return the next so many bytes."""
        if count > len(self._content) - self._at:
            raise IndexError
        self._at += count
        return self._content[self._at - count : self._at]

    def varint(self) -> int:
        """Return the next number."""
        value, shift, content = 0, 0, self._content
        while True:
            byte = content[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    def varints(self, count: int) -> list[int]:
        """Return the next so many numbers."""
        if count > len(self._content) - self._at:
            raise IndexError
        return [self.varint() for _ in range(count)]

    def keys(self, count: int, *, also: int = 0) -> tuple[list[bytes], list[list[int]]]:
        """Return keys, and `also` columns of numbers that lie between their lengths and themselves."""
        prefixes, suffixes = [0, *self.varints(max(count - 1, 0))], self.varints(count)
        columns = [self.varints(count) for _ in range(also)]
        keys, last = [], b""
        for prefix, suffix in zip(prefixes, suffixes, strict=False):
            last = last[:prefix] + self.take(suffix)
            keys.append(last)
        return keys, columns

    def files(self, base: str) -> list[tuple[str, str]]:
        """Return a table of files: of each the path, and the part of it that is passed on to nodes below."""
        count = self.varint()
        prefixes, suffixes = [0, *self.varints(max(count - 1, 0))], self.varints(count)
        passed, files, last = self.varints(count), [], b""
        for prefix, suffix, length in zip(prefixes, suffixes, passed, strict=False):
            last = last[:prefix] + self.take(suffix)
            files.append((base + os.fsdecode(last), base + os.fsdecode(last[:length])))
        return files


def _decode_manifest(content: bytes) -> tuple[Extent, int]:
    """Return where the root of the newest version lies, and its height; an extent without a file for no root."""
    reader = _Reader(content, _MANIFEST_MAGIC)
    reader.take(16)
    kind, _, _ = reader.varints(3)
    reader.take(1)
    if kind != 0 or reader.varint() != 0:
        raise UnknownLayoutError("compressed, or its manifest is in several files")
    files = reader.files("")
    count = reader.varint()
    if count == 0:
        raise UnknownLayoutError("no version in the manifest")
    reader.varints(count)
    height = reader.take(count)[-1]
    numbers, offsets, lengths = (reader.varints(count)[-1] for _ in range(3))
    return Extent(files[numbers][0], offsets, lengths), height


def _decode_node(folder: Path, node: Extent, height: int, prefix: bytes, index: Index, base: str = "") -> None:
    """Add the keys below a node, which begin with `prefix`, to an index."""
    content = read_extent(folder, node)
    if height == 0:
        # Whoever proves a checkpoint decodes the same at the same time as whoever reads it.
        with _DECODING:
            entries = _decode_leaf(content, base)
        index.update(((prefix + key, place) for key, place in entries) if prefix else entries)
    else:
        reader, files, count = _open_node(content, height, base)
        keys, (shared,) = reader.keys(count, also=1)
        numbers, offsets, lengths = (reader.varints(count) for _ in range(3))
        for key, length, number, offset, size in zip(keys, shared, numbers, offsets, lengths, strict=True):
            path, passed = files[number]
            _decode_node(folder, Extent(path, offset, size), height - 1, prefix + key[:length], index, passed)


_DECODING = threading.Lock()


# A run saves and restores the same structure each time.
@functools.lru_cache(maxsize=4)
def _decode_leaf(content: bytes, base: str) -> Sequence[tuple[bytes, Place]]:
    reader, files, count = _open_node(content, 0, base)
    entries = list[tuple[bytes, Place]]()
    keys, _ = reader.keys(count)
    lengths, kinds = reader.varints(count), reader.varints(count)
    outside = sum(1 for kind in kinds if kind)
    places = zip(reader.varints(outside), reader.varints(outside), strict=True)
    for key, length, kind in zip(keys, lengths, kinds, strict=True):
        if kind:
            number, offset = next(places)
            entries.append((key, Extent(files[number][0], offset, length)))
        else:
            entries.append((key, reader.take(length)))
    return entries


def _open_node(content: bytes, height: int, base: str) -> tuple[_Reader, list[tuple[str, str]], int]:
    """Return what reads a node, from its entries on; its files, and the number of its entries."""
    reader = _Reader(content, _NODE_MAGIC)
    if reader.take(1)[0] != height:
        raise ValueError("a node of another height than was noted")
    files = reader.files(base)
    return reader, files, reader.varint()


def check_file(file: str) -> str:
    """Return the name of a file of a database. Raises ValueError where it leads out of its folder."""
    # What a damaged index says is not believed.
    if file.startswith("/") or ".." in file.split("/") or "\0" in file:
        raise ValueError("a file of it lies outside")
    return file


def read_extent(folder: Path, extent: Extent) -> bytes:
    """Return the bytes of an extent. Raises OSError, ValueError where the file ends before."""
    with (folder / check_file(extent.file)).open("rb", buffering=0) as file:
        # Also where what a damaged index says is no size at all.
        ends = extent.offset + extent.length > os.fstat(file.fileno()).st_size
        content = b"" if ends else os.pread(file.fileno(), extent.length, extent.offset)
    if len(content) != extent.length:
        raise ValueError(f"{extent.file} ends too early")
    return content
