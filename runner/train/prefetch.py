"""Fetch the next batch in a thread while the device works; a request to stop ends the wait for it."""

from __future__ import annotations

from concurrent.futures import Future, wait
from typing import Any

from runner.preempt.stop import StopFlag, run_in_thread
from runner.train.loop import BatchStream
from runner.types import Batch


class Prefetcher:
    """A stream of batches that is read one batch ahead of training."""

    def __init__(self, stream: BatchStream, stop_flag: StopFlag):
        self._stream, self._stop_flag = stream, stop_flag
        self._position = stream.state()
        self._coming: Future[tuple[Batch, dict[str, Any]]] | None = None

    def __next__(self) -> Batch:
        """Return the next batch. Raises Stopped where a stop is asked for before it is there."""
        self._coming = self._coming or self._fetch()
        batch, self._position = self._stop_flag.wait_for(self._coming)
        self._coming = self._fetch()
        return batch

    def state(self) -> dict[str, Any]:
        """Return the data position as plain JSON values: not that of the stream, which is one batch further."""
        return self._position

    def close(self) -> None:
        """Wait until the stream is nobody's, unless the process is about to end anyway."""
        if self._coming is not None and self._stop_flag.reason is None:
            wait([self._coming])

    def _fetch(self) -> Future[tuple[Batch, dict[str, Any]]]:
        return run_in_thread(lambda: (next(self._stream), self._stream.state()), "data")
