"""What is told of times that a clock had which was set: never a traceback, never less than nothing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.rundir import process_age, time_buckets
from runner.rundir.heartbeat import HeartbeatWriter
from runner.rundir.process_age import measure_process_age, seconds_since_start
from runner.rundir.provenance import process_start_time
from runner.rundir.time_buckets import TimeBuckets, describe_clock_jump
from runner.text import format_age, format_duration, format_time
from tests.conftest import REPO

YEAR = 365.25 * 86400


@pytest.mark.parametrize(
    ("seconds", "age", "duration"),
    [
        (-5.0, "now", "0.0 s"),
        (-10 * YEAR, "in the future", "0.0 s"),
        (-math.inf, "in the future", "0.0 s"),
        (math.inf, "long ago", "forever"),
        (math.nan, "long ago", "?"),
        (1e300, "long ago", "forever"),
        (10**400, "long ago", "forever"),
        (10 * YEAR, "3652d ago", "87660h00m"),
    ],
)
def test_lengths_of_any_kind(seconds: float, age: str, duration: str) -> None:
    assert (format_age(seconds), format_duration(seconds)) == (age, duration)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf, 1e12 * YEAR, -1e12 * YEAR, 10**400])
def test_times_that_no_calendar_has(seconds: float) -> None:
    assert format_time(seconds) == "no time"


@given(st.floats() | st.integers())
def test_a_number_is_always_told(seconds: float) -> None:
    for told in (format_age(seconds), format_duration(seconds), format_time(seconds)):
        assert 0 < len(told) < 40


def test_how_old_this_process_is() -> None:
    code = "import time; time.sleep(0.3); from runner.rundir.process_age import measure_process_age as m; print(m())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.monotonic() - began + 1 / os.sysconf("SC_CLK_TCK")
    assert process_start_time() + (measure_process_age() or 0.0) == pytest.approx(time.time(), abs=0.1)


@pytest.mark.parametrize("jump", [-10 * YEAR, -86400.0, 0.0, 86400.0, 10 * YEAR])
def test_importing_took_no_years(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was set between the start of the process and now."""
    age = measure_process_age()
    assert age is not None
    began, real = process_start_time(), time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    expected = 0.0 if jump < 0 else age
    assert seconds_since_start(began) == pytest.approx(expected, abs=1.0)


def test_where_nobody_knows_how_old_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Linux, or a /proc of another kind: the clock is all there is."""
    monkeypatch.setattr(process_age.Path, "read_text", lambda path: "1 (python) R")
    assert measure_process_age() is None
    assert seconds_since_start(time.time() - 1e6) == pytest.approx(1e6, abs=1.0)
    assert seconds_since_start(time.time() + 1e6) == 0.0


@pytest.mark.parametrize("jump", [-10 * YEAR, -86400.0, -30.0, 30.0, 86400.0])
def test_a_clock_that_is_set_while_it_trains(jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, real = TimeBuckets(HeartbeatWriter(tmp_path / "pulse"), time.time() - 2.0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    with times.time_in("step"):
        pass
    told = times.read()
    assert 2.0 <= times.total < 60.0
    assert all(0.0 <= spent < 60.0 for spent in told.values())
    # What two machines may differ by is not worth a word.
    assert times.clock_jump == pytest.approx(jump if abs(jump) > 60 else 0.0, abs=0.1)


def test_what_is_said_of_it() -> None:
    assert "was set back by 24h00m in the meantime" in describe_clock_jump(-86400.0)
    assert "was set forward by 1m30s" in describe_clock_jump(90.0)


def test_a_machine_that_sleeps_sets_no_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the clock and the time since the boot go on; what is measured does not."""
    times, slept = TimeBuckets(HeartbeatWriter(tmp_path / "pulse"), time.time()), 8 * 3600.0
    real: tuple[Any, Any] = time.time, time.clock_gettime
    monkeypatch.setattr(time_buckets.time, "time", lambda: real[0]() + slept)
    monkeypatch.setattr(time_buckets.time, "clock_gettime", lambda which: real[1](which) + slept)
    assert (times.clock_jump, times.total < 60.0) == (0.0, True)
