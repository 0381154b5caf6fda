"""Whether training waits for its data: told once, with numbers."""

from __future__ import annotations

import time

from runner.values import Say

WINDOW_STEPS, WINDOW_SECONDS = 50, 2.0
# The first batches wait for what only begins: workers, a compiler that still has the cores.
WARM_UP_STEPS = 3
# Less than this share of the wall-clock is not worth a word.
WORTH_TELLING = 0.1


class StarvationMonitor:
    """Tells, once, that the device waits for batches.

    That a batch takes long costs nothing while the device still works on an earlier step. So only those batches count
    that arrived when the last dispatched step was complete: then the device had run dry.
    """

    def __init__(self, say: Say, advice: str):
        self._say, self._advice = say, advice
        self._told = False
        self._batches, self._dry, self._fetching = -WARM_UP_STEPS, 0, 0.0
        self._since = time.perf_counter()

    def count_batch(self, began: float, ended: float, *, device_is_idle: bool) -> None:
        """Count one batch that was waited for between two times (`time.perf_counter`), in seconds."""
        if self._told:
            return
        self._batches += 1
        if self._batches <= 0:
            self._since = ended
            return
        self._fetching += ended - began
        self._dry += device_is_idle
        if self._batches >= WINDOW_STEPS and ended - self._since >= WINDOW_SECONDS:
            self._judge(ended - self._since)
            self._batches, self._dry, self._fetching, self._since = 0, 0, 0.0, ended

    def _judge(self, seconds: float) -> None:
        share = self._fetching / seconds
        if share <= WORTH_TELLING or self._dry <= self._batches / 2:
            return
        fetch, step = (1000 * value / self._batches for value in (self._fetching, seconds))
        self._say(
            f"warning: training waits for data: a batch takes {fetch:.3g} ms of {step:.3g} ms a step ({share:.0%}), "
            f"and the device runs dry meanwhile; {self._advice}"
        )
        self._told = True
