"""Where the seconds of a process go: every moment since its beginning counts towards exactly one bucket. No jax."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from runner.rundir.heartbeat import HeartbeatWriter


class TimeBuckets:
    """Count the seconds of the training thread by bucket, and tell the heartbeat which one it is in.

    The buckets are the phases of `Heartbeat`. `began` is when the process started, in seconds since 1970: what it took
    until now was importing.
    """

    def __init__(self, heartbeat: HeartbeatWriter, began: float):
        self._heartbeat, self._bucket = heartbeat, "startup"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._seconds["import"] = max(time.time() - began, 0.0)
        self._since = time.perf_counter()

    @contextmanager
    def time_in(self, bucket: str) -> Iterator[None]:
        """Count the time of a block towards a bucket, and not towards the one around it."""
        outer = self._turn_to(bucket)
        try:
            yield
        finally:
            self._turn_to(outer)

    def read(self) -> dict[str, float]:
        """Return the seconds by bucket so far, and as `total` their sum. From any thread."""
        seconds = dict(self._seconds)
        # The bucket that is open now has time that no turn has counted yet.
        seconds[self._bucket] = seconds.get(self._bucket, 0.0) + time.perf_counter() - self._since
        return {bucket: round(spent, 3) for bucket, spent in {**seconds, "total": sum(seconds.values())}.items()}

    def _turn_to(self, bucket: str) -> str:
        """Count from now on towards a bucket; return the one that was left."""
        now, outer = time.perf_counter(), self._bucket
        self._seconds[outer] += now - self._since
        self._since, self._bucket = now, bucket
        self._heartbeat.set_phase(bucket)
        return outer
