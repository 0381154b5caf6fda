"""Where the seconds of one process go. No jax."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from runner.pulse import Pulse


class Stopwatch:
    """Where the seconds of a process go: every moment since its beginning counts towards exactly one bucket."""

    def __init__(self, pulse: Pulse, began: float):
        self._pulse, self._bucket = pulse, "startup"
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.seconds["import"] = max(time.time() - began, 0.0)
        self._since = time.perf_counter()

    @contextmanager
    def spend(self, bucket: str) -> Iterator[None]:
        """Count the time of a block towards a bucket, and not towards the one around it."""
        outer = self._turn_to(bucket)
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, bucket: str) -> str:
        now, outer = time.perf_counter(), self._bucket
        self.seconds[outer] += now - self._since
        self._since, self._bucket = now, bucket
        self._pulse.phase(bucket)
        return outer

    def read(self) -> dict[str, float]:
        """Seconds by bucket so far, and in total."""
        seconds = dict(self.seconds)
        seconds[self._bucket] = seconds.get(self._bucket, 0.0) + time.perf_counter() - self._since
        return {bucket: round(spent, 3) for bucket, spent in {**seconds, "total": sum(seconds.values())}.items()}
