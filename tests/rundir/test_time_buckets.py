"""Every second of a process counts towards exactly one bucket, also one that is moved to another afterwards."""

from __future__ import annotations

import time

import pytest

from runner.rundir import time_buckets
from runner.rundir.time_buckets import TimeBuckets


class Heartbeat:
    def set_phase(self, phase: str) -> None: ...


def test_seconds_are_moved_and_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    times = TimeBuckets(Heartbeat(), time.time())  # type: ignore[arg-type]
    monkeypatch.setattr(time_buckets.time, "perf_counter", lambda: now[0])
    times._since = now[0]
    with times.time_in("train"):
        now[0] += 3.0
        times.move_to("save", 1.0)
        now[0] += 2.0
        # It cannot have waited for longer than it was there.
        times.move_to("save", 100.0)
        now[0] += 0.5
    found = times.read()
    assert (found["train"], found["save"]) == (0.5, 5.0)
    assert found["total"] == pytest.approx(sum(found.values()) - found["total"], abs=0.005)
