"""Whether there is time to save: what a save takes, as measured, against what a notice leaves."""

from __future__ import annotations

import time
from collections.abc import Callable

from runner.preempt.watch import Stopped, Watcher

HOPELESS = 2.0  # times as long as there is left: below it a try may succeed, and a try that fails costs nothing


def shortfall(save_seconds: float, notice_seconds: float, source: str) -> str | None:
    """A warning where a save takes longer than a notice leaves, with both numbers and the ways out; else None."""
    if save_seconds <= notice_seconds:
        return None
    return (
        f"warning: a checkpoint takes {save_seconds:.3g} s until it is durable, but {source} leaves "
        f"{notice_seconds:g} s: a stop would lose the steps since the last one; save more often, write to a faster "
        "disk, or, where the machine leaves longer, say so"
    )


def is_hopeless(save_seconds: float | None, seconds_left: float | None) -> bool:
    """Whether a save that is begun now would surely be cut off."""
    return save_seconds is not None and seconds_left is not None and save_seconds > HOPELESS * max(seconds_left, 0.0)


class Grace:
    """Learns what a save takes; warns once where that is too long, and says at a notice whether to begin another."""

    def __init__(self, watcher: Watcher, notice: tuple[float, str], tell: Callable[[str], None], seconds: float | None):
        self._watcher, self._notice, self._tell = watcher, notice, tell
        self._seconds: float | None = None
        self._warned = False
        if seconds is not None:
            self.learn(seconds)

    def learn(self, seconds: float) -> None:
        """A save took so long until it was durable."""
        self._seconds = seconds
        warning = shortfall(seconds, *self._notice)
        if warning and not self._warned:
            self._warned = True
            self._tell(warning)

    def check(self) -> None:
        """Raises Stopped where there is a deadline that a save begun now could not keep."""
        deadline = self._watcher.deadline
        left = None if deadline is None else deadline - time.monotonic()
        if is_hopeless(self._seconds, left):
            raise Stopped(f"a save takes {self._seconds:.3g} s and {left:.3g} s are left")
