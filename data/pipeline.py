"""In which order examples come: shuffled anew each epoch, for ever, batched. The position is a value to save.

grain's iterator state is exact, with read-ahead too: it counts batches that were handed out, not those prepared. The
shuffling is ours: one sort an epoch, instead of grain's 14 µs for each example (measured), which for a batch of 64 is
as much as a small train step.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from data.sources import Source

Batch = dict[str, np.ndarray]


class Shuffled:
    """Endless batches by number: each epoch has every example once, in an order that depends on seed and epoch alone.

    Takes 8 bytes an example for each of the two epochs that a batch may touch.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int):
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> Batch:
        size = len(self._source)
        positions = np.arange(number * self._batch_size, (number + 1) * self._batch_size)
        epochs = positions // size
        indices = np.empty(self._batch_size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._order(epoch)[positions[here] % size]
        return self._source.take(indices)

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch: random keys, sorted. Raw Philox output never changes between numpy versions."""
        if epoch not in self._orders:
            keys = np.random.Philox(key=[self._seed % 2**64, epoch]).random_raw(len(self._source))
            kept = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders = {**kept, epoch: np.argsort(keys, kind="stable")}
        return self._orders[epoch]


class Stream:
    """The endless training batches of one source. `state()` is the position of the first batch not yet handed out."""

    def __init__(self, source: Source, *, batch_size: int, seed: int):
        batches = grain.MapDataset.source(Shuffled(source, batch_size=batch_size, seed=seed))
        # Every source is in memory so far: a thread that reads ahead would cost more than it saves (measured).
        self._batches = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        self._skipped: frozenset[int] = frozenset()

    def __next__(self) -> Batch:
        if self._skipped:
            self._pass_over()
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        return self._batches.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state()` gave."""
        self._batches.set_state(state)

    def skip(self, numbers: Collection[int]) -> None:
        """Pass over the batches with these numbers, counted from 0 at the beginning of training."""
        self._skipped = frozenset(numbers)

    def number(self, position: Mapping[str, Any], ago: int) -> int:
        """The number of the batch that was handed out `ago` batches before the last one, seen from a position."""
        number = int(position["next_index"])
        for _ in range(ago + 1):
            number -= 1
            while number in self._skipped:
                number -= 1
        return number

    def _pass_over(self) -> None:
        number = int(self.state()["next_index"])
        while number in self._skipped:
            number += 1
            self._batches.set_state({**self.state(), "next_index": number})


def in_order(source: Source, *, batch_size: int, num_batches: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """A source in order, each batch with a weight per example; at most `num_batches`, which then lie evenly apart.

    Not its beginning: in text that is one file, and may be a strange one. The last batch is filled up with repeated
    examples of weight 0, so that every batch has one shape.
    """
    count = min(len(source), num_batches * batch_size)
    for start in range(0, count, batch_size):
        places = np.arange(start, start + batch_size)
        weights = (places < count).astype(np.float32)
        yield source.take(np.minimum(places, count - 1) * len(source) // count), weights
