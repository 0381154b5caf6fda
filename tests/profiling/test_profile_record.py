"""profile.json: what was written is read, and what somebody else wrote has the right types or is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.profiling.profile_record import (
    ProfileRecord,
    begin_record,
    list_profiles,
    parse_record,
    publish_record,
    remove_cut_short,
)
from runner.profiling.trace_summary import Operation, TraceSummary
from runner.profiling.window import Window

SUMMARY = TraceSummary(
    seconds=0.21,
    devices=1,
    shares={"matmul": 0.61, "copy": 0.03, "collective": 0.0, "other": 0.2, "idle": 0.16},
    operations=[Operation("dot.3", "matmul", 0.1, 0.5, 15)],
)


def publish(profiles: Path, window: Window, summary: TraceSummary | None = SUMMARY, problem: str = "") -> Path:
    return publish_record(ProfileRecord(window, "1 × cpu", summary, problem, begin_record(profiles)))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    profiles = tmp_path / "profile"
    assert not list_profiles(profiles)
    later = publish(profiles, Window(300, 304, None), None, "the trace cannot be summed up")
    first = publish(profiles, Window(100, 104, 100))
    again = publish(profiles, Window(100, 104, None))
    assert [path.name for path in (later, first, again)] == ["300-304", "100-104", "100-104.2"]
    assert [(record.window, record.summary, record.folder) for record in list_profiles(profiles)] == [
        (Window(100, 104, 100), SUMMARY, first),
        (Window(100, 104, None), SUMMARY, again),
        (Window(300, 304, None), None, later),
    ]
    assert [record.describe() for record in list_profiles(profiles)][1:] == [
        "steps 100 to 104, 42 ms a step: matrix products 61.0 %, copies 3.0 %, other work 20.0 %, idle 16.0 %",
        "steps 300 to 304: the trace cannot be summed up",
    ]


def test_what_is_not_whole_is_not_shown_and_goes(tmp_path: Path) -> None:
    profiles = tmp_path / "profile"
    (begin_record(profiles) / "half.xplane.pb").write_bytes(b"half")
    assert not list_profiles(profiles)
    assert remove_cut_short(profiles)
    assert not remove_cut_short(profiles)
    assert not list(profiles.iterdir())


def test_nothing_is_read_through_a_link(tmp_path: Path) -> None:
    publish(tmp_path / "other", Window(1, 2, None))
    (tmp_path / "profile").symlink_to(tmp_path / "other")
    assert not list_profiles(tmp_path / "profile")


@pytest.mark.parametrize(
    "change",
    [
        {"shares": None},
        {"shares": {**SUMMARY.shares, "idle": 7}},
        {"shares": {**SUMMARY.shares, "idle": float("nan")}},
        {"shares": {"matmul": 1.0}},
        {"seconds": "0.2"},
        {"seconds": -1},
        {"devices": 1e9},
    ],
)
def test_shares_that_are_none_are_not_told(change: dict[str, Any]) -> None:
    document = ProfileRecord(Window(1, 2, None), "cpu", SUMMARY, "", Path("x")).document()
    assert (record := parse_record(document, Path("x"))) is not None
    assert record.summary == SUMMARY
    assert (record := parse_record({**document, **change}, Path("x"))) is not None
    assert record.summary is None
    assert record.problem


@pytest.mark.parametrize("steps", [None, [1], [2, 1], ["1", "2"], [1, 2, 3], [-1, 2], [True, 2], {}])
def test_steps_that_are_none_are_no_record(steps: Any, tmp_path: Path) -> None:
    (tmp_path / "1-2").mkdir()
    (tmp_path / "1-2/profile.json").write_text(json.dumps({"steps": steps}))
    assert not list_profiles(tmp_path)


def test_operations_that_are_none_are_left_out() -> None:
    document = ProfileRecord(Window(1, 2, None), "cpu", SUMMARY, "", Path("x")).document()
    document["operations"] = [*document["operations"], None, {}, {"name": "x", "kind": "magic"}, *[{}] * 100]
    record = parse_record(document, Path("x"))
    assert record is not None
    assert record.summary == SUMMARY
