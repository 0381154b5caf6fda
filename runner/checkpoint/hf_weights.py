"""The weights of a Hugging Face folder as arrays of ours: which there are, and any part of one, by the family's table.

An array of ours is made of many tensors: one for each layer, and of queries, keys and values. Only the parts that a
device needs are read from disk, into one buffer of that part's size, so nothing is there twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from models.hf_config import read_shape
from models.hf_families import FAMILIES, LAYER, Family, NameRow
from runner.checkpoint.arrays import LeafSpec
from runner.checkpoint.hf_folder import DTYPES, HfFolder, TensorPlace, open_hf_folder
from runner.errors import ConfigError
from runner.text import display_path

Index = tuple[slice, ...]
NUMPY_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# What XLA wants of memory that it is to use as it lies; anything else it copies.
ALIGNMENT = 64


@dataclass(frozen=True)
class HfWeights:
    """Read arrays of ours from a folder; a source of `transfer_weights`.

    Attributes:
        folder: what is there.
        family: the table of its names.
        tied: whether the embedding is the output layer too.
    """

    folder: HfFolder
    family: Family
    tied: bool

    @property
    def name(self) -> str:
        """Return how it is called to a person."""
        return f"hf:{display_path(self.folder.path)}"

    @cached_property
    def specs(self) -> Mapping[str, LeafSpec]:
        """Return shape and type of every array of ours that is there, by name; others under the names they have there.

        Raises ConfigError where a layer is missing, or a tensor has a type that is not taken.
        """
        found, left = {}, set(self.folder.tensors)
        for row in self.family.rows:
            layers = self._list_layers(row)
            names = [self._spell(tensor, layer) for layer in layers for tensor in row.tensors]
            there = [name for name in names if name in left]
            if not there:
                continue
            if len(there) < len(names):
                absent = next(name for name in names if name not in left)
                raise ConfigError(f"{self.name}: has no tensor {absent}, beside {there[0]}; download it again")
            left -= set(there)
            found[row.leaf] = self._describe(row, layers)
        if self.tied:
            # Some write what is tied a second time.
            head = next((row for row in self.family.rows if row.leaf == "params.head.kernel"), None)
            if head is not None and found.pop(head.leaf, None) is not None:
                self._check_same(head)
        unused = re.compile("|".join(self._spell(pattern) for pattern in self.family.unused) or "(?!)")
        for name in sorted(left):
            if not unused.fullmatch(name):
                place = self.folder.tensors[name]
                found[f"{name} of {place.file.name}"] = LeafSpec(place.shape, "float32")
        return found

    def read(self, leaf: str, index: Index) -> np.ndarray:
        """Return one part of an array of ours, in float32."""
        row = next(row for row in self.family.rows if row.leaf == leaf)
        shape = self.specs[leaf].shape
        ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        part = _allocate_aligned(tuple(map(len, ranges)))
        layers = self._list_layers(row)
        if layers == [None]:
            self._fill(part, row, None, ranges)
            return part
        for at, layer in enumerate(ranges[0]):
            self._fill(part[at], row, layer, ranges[1:])
        return part

    def _fill(self, part: np.ndarray, row: NameRow, layer: int | None, ranges: Sequence[range]) -> None:
        """Write the part of one layer's entry: of each tensor, joined along the last dimension, what falls into it."""
        begin = 0
        for tensor in row.tensors:
            place = self.folder.tensors[self._spell(tensor, layer)]
            axes = row.axes or tuple(range(len(place.shape) - row.leading))
            length = place.shape[row.leading :][axes[-1]]
            first, last = max(ranges[-1].start, begin), min(ranges[-1].stop, begin + length)
            if first < last:
                wanted = [*ranges[:-1], range(first - begin, last - begin)]
                # In the order of the file's dimensions.
                theirs: list[range] = [wanted[axes.index(axis)] for axis in range(len(axes))]
                value = _read_part(place, row.leading, theirs)
                target = part[..., first - ranges[-1].start : last - ranges[-1].start]
                target[...] = value.transpose(axes)
            begin += length

    def _describe(self, row: NameRow, layers: Sequence[int | None]) -> LeafSpec:
        """Return the shape that an array of ours has. Raises ConfigError where its tensors do not fit each other."""
        shapes = []
        for layer in layers:
            entry: list[tuple[int, ...]] = []
            for tensor in row.tensors:
                name = self._spell(tensor, layer)
                place = self.folder.tensors[name]
                if place.dtype not in DTYPES:
                    raise ConfigError(f"{self.name}: {name} is {place.dtype}; only {', '.join(DTYPES)} are taken")
                shape = place.shape[row.leading :]
                axes = row.axes or tuple(range(len(shape)))
                if len(axes) != len(shape) or set(place.shape[: row.leading]) - {1}:
                    raise ConfigError(
                        f"{self.name}: {name} has the shape {list(place.shape)}, of another number of "
                        "dimensions than it should have"
                    )
                entry.append(tuple(shape[axis] for axis in axes))
            if len({shape[:-1] for shape in entry}) > 1:
                raise ConfigError(f"{self.name}: {' and '.join(map(str, row.tensors))} do not fit: {entry}")
            shapes.append((*entry[0][:-1], sum(shape[-1] for shape in entry)))
        if len(set(shapes)) > 1:
            raise ConfigError(f"{self.name}: layers differ in the shape of {row.tensors[0]}: {shapes}")
        return LeafSpec(shapes[0] if layers == [None] else (len(layers), *shapes[0]), "float32")

    def _check_same(self, head: NameRow) -> None:
        """Raise ConfigError where an output layer is there that is not the embedding it is said to be."""
        embedding = next(row for row in self.family.rows if row.leaf == "params.embed.embedding")
        first, second = (self.folder.tensors[self._spell(row.tensors[0])] for row in (head, embedding))
        same = first.shape == second.shape and first.dtype == second.dtype
        if not same or not all(
            np.array_equal(*rows) for rows in zip(_iter_rows(first), _iter_rows(second), strict=True)
        ):
            raise ConfigError(
                f"{self.name}: config.json says that {head.tensors[0]} is the embedding, and it is another; with "
                '"tie_word_embeddings": false in config.json both are taken'
            )

    def _list_layers(self, row: NameRow) -> list[int | None]:
        return list(range(self._num_layers)) if LAYER in row.tensors[0] else [None]

    @cached_property
    def _num_layers(self) -> int:
        """Return how many layers there are, by the highest number in a name."""
        stacked = next(row.tensors[0] for row in self.family.rows if LAYER in row.tensors[0])
        start = re.escape(self._spell(stacked).partition(LAYER)[0])
        numbers = [int(found[1]) for name in self.folder.tensors if (found := re.match(rf"{start}(\d{{1,5}})\.", name))]
        return max(numbers, default=-1) + 1

    @cached_property
    def _has_prefix(self) -> bool:
        return any(name.startswith(self.family.prefix) for name in self.folder.tensors)

    def _spell(self, name: str, layer: int | None = None) -> str:
        """Return the name of a tensor as it is in this folder: one of the bare model has no prefix."""
        if not self._has_prefix:
            name = name.removeprefix(re.escape(self.family.prefix)).removeprefix(self.family.prefix)
        return name if layer is None else name.replace(LAYER, str(layer))


def open_hf_weights(path: Path) -> HfWeights:
    """Return the weights of a folder. Raises ConfigError where it is none that can be read, or of an unknown family."""
    folder = open_hf_folder(path)
    try:
        shape = read_shape(folder.config)
    except ValueError as error:
        raise ConfigError(f"{display_path(path / 'config.json')}: {error}") from None
    weights = HfWeights(folder, FAMILIES[shape.family], bool(getattr(shape.network, "tied", False)))
    # Looked at before anything is made: a folder that cannot be taken is refused at once.
    _ = weights.specs
    return weights


def _read_part(place: TensorPlace, leading: int, ranges: Sequence[range]) -> np.ndarray:
    """Return a part of a tensor, as it lies in the file."""
    # Mapped for this part alone: pages of a map that stays count as this process's memory.
    whole = np.memmap(place.file, NUMPY_TYPES[place.dtype], "r", place.offset, place.shape)
    return whole[(0,) * leading + tuple(slice(part.start, part.stop) for part in ranges)]


def _iter_rows(place: TensorPlace) -> Iterator[np.ndarray]:
    for start in range(0, place.shape[0], 1024):
        yield _read_part(place, 0, [range(start, min(start + 1024, place.shape[0])), range(place.shape[1])])


def _allocate_aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return an empty array of float32 in memory that XLA takes as it lies."""
    count = int(np.prod(shape, dtype=np.int64))
    buffer = np.empty(4 * count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + 4 * count].view(np.float32).reshape(shape)
