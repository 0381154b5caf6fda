"""Where the seconds of a process go: every moment since its beginning counts towards exactly one bucket. No jax."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from runner.rundir.heartbeat import HeartbeatWriter
from runner.rundir.process_age import seconds_since_start
from runner.text import CLOCK_SLACK_SECONDS, format_duration


class TimeBuckets:
    """Count the seconds of the training thread by bucket, and tell the heartbeat which one it is in.

    The buckets are the phases of `Heartbeat`. `began` is when the process started, in seconds since 1970: what it took
    until now was importing. From here on nobody looks at the clock of the machine, which may be set while it trains.
    """

    def __init__(self, heartbeat: HeartbeatWriter, began: float):
        self._heartbeat, self._bucket = heartbeat, "startup"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._seconds["import"] = seconds_since_start(began)
        self._since = time.perf_counter()
        self._offset = _read_clock_offset()

    @contextmanager
    def time_in(self, bucket: str) -> Iterator[None]:
        """Count the time of a block towards a bucket, and not towards the one around it."""
        outer = self._turn_to(bucket)
        try:
            yield
        finally:
            self._turn_to(outer)

    def move_to(self, bucket: str, seconds: float) -> None:
        """Count seconds that were counted towards the bucket that is open now towards another; no more than it has."""
        self._turn_to(self._bucket)
        moved = min(seconds, self._seconds[self._bucket])
        self._seconds[self._bucket] -= moved
        self._seconds[bucket] += moved

    @property
    def total(self) -> float:
        """Return the seconds since the process began. From any thread."""
        return self.read()["total"]

    @property
    def clock_jump(self) -> float:
        """Return by how many seconds the clock of the machine was set, forward or back (< 0), since this began.

        0.0 where that is less than a minute, which is not worth a word. From any thread.
        """
        jump = _read_clock_offset() - self._offset
        return round(jump, 3) if abs(jump) > CLOCK_SLACK_SECONDS else 0.0

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


def describe_clock_jump(seconds: float) -> str:
    """Return a line for people about a clock that was set forward, or back (< 0), by so many seconds."""
    where = "forward" if seconds > 0 else "back"
    return (
        f"warning: the clock of this machine was set {where} by {format_duration(abs(seconds))} in the meantime; no "
        "length of time counts that"
    )


def _read_clock_offset() -> float:
    """Return what has to be added to a clock that nobody can set, to get that of the machine. In seconds."""
    # One that goes on while the machine sleeps, as the clock of the machine does.
    return time.time() - time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
