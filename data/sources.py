"""Where examples come from. A source is random access over examples; their order is the business of pipeline.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

NUM_BYTES = 256
NUM_CLASSES = 10
# A label, or a token, of this value is padding: it counts in no loss and in no metric. PyTorch and Hugging Face use it.
# Data that has another one says so (`data.ignore_label`).
IGNORED_LABEL = -100


@runtime_checkable
class Source(Protocol):
    """Random access over examples, many at a time."""

    def __len__(self) -> int: ...

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """Return the examples at `indices`, stacked: every value has a leading batch dimension.

        They are those of a whole batch, or of the rows of one that this process makes.
        """
        ...


@dataclass(frozen=True)
class Sources:
    """What a data option reads: two sources, their shape, and the proof that they are the same data as last time.

    Attributes:
        train: the examples to train on.
        eval: the examples to evaluate on.
        inputs: the shape of one example: (features,), (height, width, channels) or (tokens,).
        num_outputs: the number of classes, or the size of the vocabulary.
        fingerprint: a hash of everything the examples are made of.
        summary: a few words for a person, such as "12.1 MB of text in 734 files".
        decode: makes text of tokens Int[seq]; None where there are no tokens.
        bytes_per_token: of the text that is evaluated on; None where nobody knows.
        waits: whether taking examples may take long: a thread then fetches the next batch while the device works.
        files: "SIZE HASH" of each file by its name, so that a changed file can be named.
        held_out: further examples that are never trained on, by name: `test`, or whatever sets the data brings along.
            An evaluation looks at one with `split=NAME`.
        classes: the names of the classes in the order of their numbers, where the data names them; else empty.
        may_ignore: whether labels may hold `ignore_label`, and losses and metrics therefore leave such places out.
        ignore_label: the label, or the token, that is left out where one may be.
        fingerprint_as_read: what reading gives, where a run knows the data by another one since a file was renamed.
    """

    train: Source
    eval: Source
    inputs: tuple[int, ...]
    num_outputs: int
    fingerprint: str
    summary: str
    decode: Callable[[np.ndarray], str] | None = None
    bytes_per_token: float | None = None
    waits: bool = False
    files: Mapping[str, str] = field(default_factory=dict)
    held_out: Mapping[str, Source] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    may_ignore: bool = False
    ignore_label: int = IGNORED_LABEL
    fingerprint_as_read: str | None = None

    @property
    def ignored(self) -> int | None:
        """Return the label, or the token, that losses and metrics leave out; None where there is none."""
        return self.ignore_label if self.may_ignore else None


@dataclass(frozen=True)
class Table:
    """Arrays that share their leading dimension."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """Return the rows at `indices`."""
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
        """Return the examples at `indices` of this part, stacked."""
        return self.source.take(self.chosen[np.asarray(indices)])


def split_source(source: Source, eval_fraction: float) -> tuple[SourcePart, SourcePart]:
    """Split a source at random, the same way every time, into a part to train and a part to evaluate on."""
    train, held_out = _draw_split(len(source), eval_fraction)
    return SourcePart(source, train), SourcePart(source, held_out)


def split_table(whole: Table, eval_fraction: float) -> tuple[Table, Table]:
    """Split a table into the parts that `split_source` gives, each a copy in memory in the order of the part."""
    train, held_out = _draw_split(len(whole), eval_fraction)
    return Table(whole.take(train)), Table(whole.take(held_out))


def _draw_split(size: int, eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    # A fixed seed, and not the run's: runs with several seeds are compared on the same held-out examples.
    order = np.random.default_rng(0).permutation(size)
    cut = int(size * (1.0 - eval_fraction))
    return order[:cut], order[cut:]
