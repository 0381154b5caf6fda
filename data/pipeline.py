"""In which order examples come: shuffled anew each epoch, for ever, batched. The position is a number to save.

A batch is a function of its number: who makes it, and how far ahead, changes nothing. The same goes for a row of it:
where several processes train together, each makes some rows of the one batch. So the position is ours and not
that of grain's iterators, which depends on how they are put together: the number of the first batch that was not yet
handed out. A run may go on with other workers. The shuffling is ours: one sort an epoch, instead of grain's 14 µs for
each example (measured), which for a batch of 64 is as much as a small train step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from data.bad_examples import attach_skipped, detach_skipped
from data.option_fields import Augmentation
from data.sources import Source

Batch = dict[str, np.ndarray]


class ShuffledBatches:
    """Endless batches by number: each epoch has every example once, in an order that depends on seed and epoch alone.

    Takes 8 bytes an example for each of the two epochs that a batch may touch.

    Args:
        source: the examples.
        batch_size: how many of them a batch has. A batch may end one epoch and begin the next.
        seed: decides the orders, and how images are varied.
        augment: how images are varied; None for not at all.
        rows: which rows of a batch are made, of those that follow each other; None: all. The others cost nothing.
        reopen: reads the source once more in another process, so that what is sent there is small.
        begin: the number of the batch that is `batches[0]`.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        augment: Augmentation | None = None,
        rows: slice | None = None,
        reopen: Callable[[], Source] | None = None,
        begin: int = 0,
    ):
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._rows = rows or slice(0, batch_size)
        self._augment, self._reopen, self._begin = augment if augment != Augmentation() else None, reopen, begin
        self._orders: dict[int, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        rest = {
            "batch_size": self._batch_size,
            "seed": self._seed,
            "augment": self._augment,
            "rows": self._rows,
            "begin": self._begin,
        }
        return _rebuild, (None if self._reopen else self._source, self._reopen, rest)

    def starting_at(self, begin: int) -> ShuffledBatches:
        """Return the same batches, of which the one with this number comes first."""
        fresh = ShuffledBatches(
            self._source,
            batch_size=self._batch_size,
            seed=self._seed,
            augment=self._augment,
            rows=self._rows,
            reopen=self._reopen,
            begin=begin,
        )
        fresh._orders = self._orders
        return fresh

    def __len__(self) -> int:
        # Grain asks for a length before it iterates.
        return sys.maxsize - self._begin

    def __getitem__(self, index: int) -> Batch:
        number, size = self._begin + index, len(self._source)
        # Positions in the endless sequence of epochs: each epoch has its own order.
        positions = np.arange(number * self._batch_size, (number + 1) * self._batch_size)[self._rows]
        epochs = positions // size
        indices = np.empty(len(positions), np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._order_of(epoch)[positions[here] % size]
        batch = self._source.take(indices)
        if self._augment is not None:
            from data.transforms import RowsOfBatch, augment_images

            place = RowsOfBatch(self._rows.start, self._batch_size)
            varied = augment_images(batch["inputs"], self._augment, seed=self._seed, number=number, place=place)
            batch = {**batch, "inputs": varied}
        # Where nobody listens to the source, in a worker, the batch carries what is to be told.
        return attach_skipped(batch, self._source)

    def note_skipped(self, batch: Batch) -> Batch:
        """Return a batch without what another process says of examples, having noted that."""
        return detach_skipped(batch, self._source)

    def _order_of(self, epoch: int) -> np.ndarray:
        """Return the permutation of an epoch: the order that sorts random keys."""
        order = self._orders.get(epoch)
        if order is None:
            # Raw Philox output never changes between versions of numpy; its permutations may.
            keys = np.random.Philox(key=[self._seed % 2**64, epoch]).random_raw(len(self._source))
            order = np.argsort(keys, kind="stable")
            kept = {old: kept for old, kept in list(self._orders.items()) if old == epoch - 1}
            # One assignment, for grain's threads may be here at the same time: at worst both sort.
            self._orders = {**kept, epoch: order}
        return order


class NumberedBatches:
    """Endless batches of no data: each holds its number alone, `{"number": UInt32[1]}`, in every process."""

    def __getitem__(self, index: int) -> Batch:
        return {"number": np.array([index % 2**32], np.uint32)}

    def note_skipped(self, batch: Batch) -> Batch:
        """Return a batch as it is: there are no examples to pass over."""
        return batch


def _rebuild(source: Source | None, reopen: Callable[[], Source] | None, rest: Mapping[str, Any]) -> ShuffledBatches:
    """Return pickled batches in a worker, with a source of its own."""
    read = reopen() if reopen is not None else source
    assert read is not None
    return ShuffledBatches(read, **rest)


class TrainingStream:
    """The training batches of a run, one after the other. `state()` is the position of the first not yet handed out.

    Args:
        batches: all batches by number.
        workers: so many processes make batches ahead; 0: none.
        prefetch: so many batches are made ahead by each worker, or by threads where there is no worker.
    """

    def __init__(self, batches: ShuffledBatches | NumberedBatches, *, workers: int = 0, prefetch: int = 0):
        self._batches, self._workers, self._prefetch = batches, workers, prefetch
        self._number = 0
        # Grain's iterator over the batches from the first one on that is asked for; None where nobody has asked.
        self._coming: Any = None
        self._skipped: frozenset[int] = frozenset()

    @property
    def waits(self) -> bool:
        """Return whether a batch may be long in coming."""
        return self._workers > 0

    def __next__(self) -> Batch:
        while self._number in self._skipped:
            self._take()
        return self._take()

    def state(self) -> dict[str, Any]:
        """Return the position, as plain JSON values."""
        return {"next_index": self._number}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a position that `state()` gave."""
        self.close()
        self._number = int(state["next_index"])

    def skip(self, numbers: Collection[int]) -> None:
        """Pass over the batches with these numbers, counted from 0 at the beginning of training."""
        self._skipped = frozenset(numbers)

    def find_batch_number(self, position: Mapping[str, Any], ago: int) -> int:
        """Return the number of the batch that was handed out `ago` batches before the last one before a position."""
        number = int(position["next_index"])
        for _ in range(ago + 1):
            number -= 1
            while number in self._skipped:
                number -= 1
        return number

    def close(self) -> None:
        """End the workers. Whoever asks for another batch starts them again."""
        if self._coming is not None:
            self._coming.close()
            self._coming = None

    def _take(self) -> Batch:
        if isinstance(self._batches, NumberedBatches) or not (self._workers or self._prefetch):
            batch = self._batches.note_skipped(self._batches[self._number])
        else:
            if self._coming is None:
                # Here and not above: grain is heavy to import, and most runs do without.
                from data.workers import prefetch_batches

                self._coming = prefetch_batches(self._batches.starting_at(self._number), self._workers, self._prefetch)
            batch = self._batches.note_skipped(next(self._coming))
        self._number += 1
        return batch


def iterate_in_order(
    source: Source, *, batch_size: int, num_batches: int, rows: slice | None = None
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield a source in its order, each batch with a weight per example Float[batch].

    At most `num_batches` come, which then lie evenly apart: not the beginning alone, which in text is one file, and may
    be a strange one. The last batch is filled up with repeated examples of weight 0, so that every batch has one shape.
    With `rows`, only these rows of each batch are made, and their weights.
    """
    count = min(len(source), num_batches * batch_size)
    for start in range(0, count, batch_size):
        places = np.arange(start, start + batch_size)[rows or slice(None)]
        weights = (places < count).astype(np.float32)
        yield source.take(np.minimum(places, count - 1) * len(source) // count), weights
