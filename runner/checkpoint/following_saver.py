"""Save together with process 0, as one of several processes: write the own part when it says so, and decide nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from runner import hosts
from runner.checkpoint import shards
from runner.checkpoint.checkpointer import copy_if_there_is_memory
from runner.checkpoint.held_state import HeldState, copy_to_host
from runner.checkpoint.record import SAVE_CHANNEL, STATE
from runner.log.sinks import LogDigest
from runner.types import CheckpointItems
from runner.values import StepInfo


class FollowingSaver:
    """Save the part of a process that does not lead, when process 0 saves.

    `on_phase` takes what its background thread does: write, or "" for nothing.
    """

    newest: int | None = None
    trouble: str | None = None
    copied_at: float | None = None  # process 0 counts

    def __init__(self, on_phase: Callable[[str], None]):
        self._on_phase = on_phase
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future[None] | None = None

    def due(self, info: StepInfo) -> str | None:
        """Return None: process 0 decides."""
        return None

    def holds(self, step: int) -> bool:
        """Return False: process 0 is asked. Waits for a save that is under way."""
        self._settle()
        return False

    def save(self, reason: str, info: StepInfo, items: CheckpointItems, log: LogDigest | None = None) -> None:
        """Save the part of this process, in the background."""
        self._settle()
        held, trouble = copy_if_there_is_memory(copy_to_host, items[STATE])
        if hosts.is_true_for_all("held", trouble is None):
            self._pending = self._thread.submit(self._write, held)

    def rescue(self, error: Exception, info: StepInfo, items: Callable[[], CheckpointItems]) -> None:
        """Do nothing: after an error of one process the others cannot save with it."""

    def close(self) -> None:
        """Wait for the save that is under way."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()

    def _write(self, held: HeldState) -> None:
        """Write this process's part where process 0 says, tell it how that went, and wait until it is done."""
        word = hosts.hear(SAVE_CHANNEL)
        if "into" in word:
            self._on_phase("write")
            report = shards.report_part(Path(word["into"]), held, word["verify"])
            hosts.gather(SAVE_CHANNEL, report)
            hosts.hear(SAVE_CHANNEL)
            self._on_phase("")

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
