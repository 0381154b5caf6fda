"""Batches that may make one wait: a thread fetches the next one while the device works, and a stop ends the wait."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, wait
from typing import Any, Protocol

from runner.preempt.stop import StopFlag, run_in_thread

Batch = Mapping[str, Any]


class Stream(Protocol):
    """Endless batches that know their position."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...


class Ahead:
    """A stream, one batch ahead of training. `state()` is the position of the first batch not yet handed out."""

    def __init__(self, stream: Stream, stop_flag: StopFlag):
        self._stream, self._stop_flag = stream, stop_flag
        self._position = stream.state()
        self._coming: Future[tuple[Batch, dict[str, Any]]] | None = None

    def __next__(self) -> Batch:
        """Raises Stopped where a stop is asked for before the batch is there."""
        self._coming = self._coming or self._fetch()
        batch, self._position = self._stop_flag.wait_for(self._coming)
        self._coming = self._fetch()
        return batch

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON values; not that of the stream, which is further."""
        return self._position

    def close(self) -> None:
        """Wait until the stream is nobody's, unless the process is about to end anyway."""
        if self._coming is not None and self._stop_flag.reason is None:
            wait([self._coming])

    def _fetch(self) -> Future[tuple[Batch, dict[str, Any]]]:
        return run_in_thread(lambda: (next(self._stream), self._stream.state()), "data")
