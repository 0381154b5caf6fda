"""Where examples come from. A source is random access over examples; its order is the pipeline's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

NUM_BYTES = 256
NUM_CLASSES = 10


@runtime_checkable
class Source(Protocol):
    """Random access over examples, many at a time."""

    def __len__(self) -> int: ...

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked: every value has a leading batch dimension."""
        ...


@dataclass(frozen=True)
class Sources:
    """What a data option reads: two sources, their shape, and the proof that they are the same data as last time."""

    train: Source
    eval: Source
    inputs: tuple[int, ...]  # the shape of one example: (features,), (height, width, channels) or (tokens,)
    num_outputs: int  # classes, or the vocabulary
    fingerprint: str  # hash of everything the examples are made of
    summary: str  # for a person: "12.1 MB of text in 734 files"
    decode: Callable[[np.ndarray], str] | None = None  # tokens Int[seq] as text; None where they are none
    bytes_per_token: float | None = None  # of text, in what is evaluated on; None where nobody knows
    waits: bool = False  # whether taking examples may take long: then they are fetched ahead, by a thread
    files: Mapping[str, str] = field(default_factory=dict)  # name → "SIZE HASH": what changed, when something did


@dataclass(frozen=True)
class Table:
    """Arrays that share their leading dimension."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        rows = np.asarray(indices)
        return {name: column[rows] for name, column in self.columns.items()}


@dataclass(frozen=True)
class SourcePart:
    """Some of the examples of a source, in an order of their own."""

    source: Source
    chosen: Int[np.ndarray, "part"]

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        return self.source.take(self.chosen[np.asarray(indices)])


def split_source(source: Source, eval_fraction: float) -> tuple[SourcePart, SourcePart]:
    """A source cut in two at random, the same way every time: to train and to evaluate on."""
    mine, theirs = _drawn(len(source), eval_fraction)
    return SourcePart(source, mine), SourcePart(source, theirs)


def split_table(whole: Table, eval_fraction: float) -> tuple[Table, Table]:
    """The same two parts of a table, each in memory in its own order."""
    mine, theirs = _drawn(len(whole), eval_fraction)
    return Table(whole.take(mine)), Table(whole.take(theirs))


def _drawn(size: int, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(0).permutation(size)
    cut = int(size * (1.0 - eval_fraction))
    return order[:cut], order[cut:]


def count_classes(labels: Int[np.ndarray, "examples"], num_classes: int | None) -> int:
    """How many classes there are: as was said, or as the labels need. Raises ValueError where one is outside."""
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(f"label is {labels.dtype} of shape {labels.shape}; expected one whole number an example")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or (num_classes is not None and high >= num_classes):
        wrong = low if low < 0 else high
        most = f"num_classes={num_classes}" if num_classes else "the number of classes"
        raise ValueError(f"a label is {wrong}; expected 0 or more, and less than {most}")
    return num_classes or high + 1
