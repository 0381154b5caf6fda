"""Batches made ahead, through grain: by threads, or by processes that end with this one however it ends."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import grain
from absl import flags

from data.orphans import end_with_parent

# A terminal's Ctrl-C and a scheduler's signals reach every process of the group; what they mean is the run's business.
HANDLED_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}

# Batches come through pipes. Through shared memory those of 40 MB come three times as fast (45 against 150 ms,
# small ones the same), but a container has 64 MB of it, a full one kills, and a killed process leaves it behind.
NEVER = 2**62


def prefetch_batches(batches: Any, workers: int, prefetch: int) -> Any:
    """An iterator over `batches` in their order, closed with `close()`."""
    dataset = grain.MapDataset.source(batches)
    if not workers:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)))
    _begin_tracker()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain asks for a flag of its own, which nobody parses here
    one = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    one = grain.experimental.WithOptionsIterDataset(one, grain.experimental.DatasetOptions(min_shm_size=NEVER))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(prefetch, 1))
    return SignalShieldedIterator(iter(one.mp_prefetch(options, worker_init_fn=_begin)))


class SignalShieldedIterator:
    """An iterator whose workers are started with every signal of ours held back, and live with that."""

    def __init__(self, batches: Any):
        self._batches, self._started = batches, False

    def __next__(self) -> Any:
        if self._started:
            return next(self._batches)
        with _held_back():
            self._started = True
            return next(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return self

    def close(self) -> None:
        self._batches.close()


def _begin_tracker() -> None:
    """Start what removes the semaphores of a killed process, now and without a word about it.

    Later would be too late: where it starts, it lets signals through again. What it is told not to say, it takes from
    the interpreter's own options.
    """
    quiet = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(quiet)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


@contextmanager
def _held_back() -> Iterator[None]:
    """A process inherits what the thread that starts it holds back: so a signal cannot end it, even half started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(number: int, workers: int) -> None:
    """The first thing a worker does."""
    end_with_parent()
    atexit.register(os._exit, 0)  # its queues are flushed by then; to take the interpreter apart would take a second
