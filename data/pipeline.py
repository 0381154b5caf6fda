"""In which order examples come: shuffled anew each epoch, for ever, batched. The position is a value to save.

grain's iterator state is exact despite read-ahead: it counts batches that were handed out, not those prepared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from data.sources import Source

Batch = dict[str, np.ndarray]


class Stream:
    """The endless training batches of one source. `state()` is the position of the first batch not yet handed out."""

    def __init__(self, source: Source, *, batch_size: int, seed: int):
        if len(source) == 0:
            raise ValueError("the data holds no training example; is it shorter than one sequence?")
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        batches = order.batch(batch_size, batch_fn=np.asarray).map(source.take)
        self._batches = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON values."""
        return self._batches.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state()` gave."""
        self._batches.set_state(state)


def in_order(source: Source, *, batch_size: int, num_batches: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """At most `num_batches` batches of a source from its beginning, each with a weight per example.

    The last batch is filled up with repeated examples of weight 0, so that every batch has one shape.
    """
    for start in range(0, min(len(source), num_batches * batch_size), batch_size):
        indices = np.arange(start, start + batch_size)
        weights = (indices < len(source)).astype(np.float32)
        yield source.take(np.minimum(indices, len(source) - 1)), weights
