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
from data.safe_path import leave_safe_path, safe_path_for_children

# A terminal's Ctrl-C and a scheduler's signals reach every process of the group; what they mean is the run's business.
HANDLED_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}

# From this size on grain sends batches through shared memory: never. Batches come through pipes. Through shared memory
# those of 40 MB come three times as fast (45 against 150 ms, small ones the same), but a container has 64 MB of it, a
# full one kills, and a killed process leaves it behind.
SHARED_MEMORY_FROM_BYTES = 2**62


def prefetch_batches(batches: Any, workers: int, prefetch: int) -> Any:
    """Return an iterator over `batches` in their order, which makes some of them ahead; `close()` ends it.

    With `workers=0`, threads of this process make them.
    """
    dataset = grain.MapDataset.source(batches)
    if not workers:
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)))
    _start_resource_tracker()
    # Grain asks absl for a flag of its own, and absl refuses before somebody has parsed a command line; nobody does.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    # No threads within a worker: the processes are what works side by side.
    one = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    in_pipes = grain.experimental.DatasetOptions(min_shm_size=SHARED_MEMORY_FROM_BYTES)
    one = grain.experimental.WithOptionsIterDataset(one, in_pipes)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(prefetch, 1))
    return SignalShieldedIterator(iter(one.mp_prefetch(options, worker_init_fn=_start_worker)))


class SignalShieldedIterator:
    """An iterator whose workers are started with the run's signals blocked, and live with that."""

    def __init__(self, batches: Any):
        self._batches, self._has_started = batches, False

    def __next__(self) -> Any:
        if self._has_started:
            return next(self._batches)
        # Grain starts its processes when the first batch is asked for.
        with _block_signals(), safe_path_for_children():
            self._has_started = True
            return next(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return self

    def close(self) -> None:
        """End the workers."""
        self._batches.close()


def _start_resource_tracker() -> None:
    """Start the process that removes the semaphores of a killed process, and have it say nothing about it."""
    # Now, because where it starts it lets signals through again: later, that would be within `_block_signals`. What it
    # is not to warn about, it takes from the options of the interpreter that starts it.
    quiet = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(quiet)
    try:
        with safe_path_for_children():
            resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


@contextmanager
def _block_signals() -> Iterator[None]:
    """Block the run's signals in this thread while the context lasts.

    A process inherits the mask of the thread that starts it, so a signal cannot end it, even half started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(number: int, workers: int) -> None:
    """Prepare a worker process; grain calls it first."""
    end_with_parent()
    leave_safe_path()
    # Leave at once when the work is done: its queues are flushed by then, and to take the interpreter apart would take
    # a second.
    atexit.register(os._exit, 0)
