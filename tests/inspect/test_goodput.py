"""Where the time went: every moment in one bucket, whatever the lines look like; a killed run counted against a clock."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.__main__ import main
from runner.inspect import goodput_table
from runner.inspect.goodput_table import LEGEND, draw_bar, read_account
from runner.inspect.time_account import BUCKETS, account_for_attempts
from runner.rundir import heartbeat
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
from runner.text import format_duration
from tests.conftest import SMALL, Door, last_logged

BEGAN = 1_763_000_000.0


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(BEGAN + seconds, UTC).isoformat(timespec="milliseconds")


def line(number: int, start: float, end: float, steps: tuple[int, int] | None = None, **more: Any) -> dict[str, Any]:
    known = {"from_step": steps[0], "to_step": steps[1]} if steps else {}
    return {"attempt": number, "started": iso(start), "ended": iso(end), "ending": "killed", **known, **more}


seconds = st.floats(0, 1e5)
spent = st.dictionaries(st.sampled_from(["step", "data", "eval", "save", "import", "compile", "total", "old"]), seconds)
lines = st.lists(
    st.builds(
        lambda start, length, given: {"started": iso(start), "ended": iso(start + length), **given},
        seconds,
        seconds,
        st.fixed_dictionaries(
            {},
            optional={
                "attempt": st.integers(0, 9),
                "ending": st.sampled_from(["finished", "killed", "preempted", "failed", "running"]),
                "from_step": st.integers(0, 1000) | st.none(),
                "to_step": st.integers(0, 1000) | st.none(),
                "lost_steps": st.integers(-5, 1000),
                "redone_steps": st.integers(0, 50),
                "seconds": spent | st.none(),
            },
        ),
    ),
    max_size=8,
)


@given(lines)
def test_every_moment_is_in_one_bucket(lines: list[dict[str, Any]]) -> None:
    """Attempts that overlap, that know nothing, or that claim more seconds than they had."""
    found = account_for_attempts(lines)
    assert sum(found.buckets.values()) == found.clock
    assert found.buckets.keys() == set(BUCKETS)
    assert min(found.buckets.values()) >= 0
    assert 0.0 <= found.goodput <= found.goodput_running <= 1.0 or found.running == 0
    clock = 0
    for span in found.spans:
        assert sum(span.buckets.values()) == span.end - span.start
        assert span.start - span.down == clock
        clock = span.end
        done = max(span.to_step - (span.from_step or 0), 0) if span.from_step is not None else 0
        assert 0 <= span.lost_steps <= done + 50
        assert span.buckets.get("lost", 0) <= span.end - span.start
    assert len(found.spans) + found.unreadable == len(lines)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=8))
def test_the_clock_is_first_start_to_last_end(pairs: list[tuple[float, float]]) -> None:
    clock, lines = 0.0, []
    for number, (pause, length) in enumerate(pairs):
        start = clock + (pause if number else 0.0)
        clock = start + length
        lines.append(line(number, start, clock))
    found = account_for_attempts(lines[::-1])
    assert found.clock == pytest.approx(clock * 1000, abs=2)
    assert found.buckets["down"] == pytest.approx(sum(pause for pause, _ in pairs[1:]) * 1000, abs=2 * len(pairs))


def test_an_account_by_hand() -> None:
    """Killed at 50, restored at 40, 5 s later: a fifth of its training is lost, saves and evaluations as well."""
    first = line(1, 0, 60, (0, 50), seconds={"import": 2, "compile": 8, "step": 40, "eval": 5, "save": 5, "total": 60})
    last = line(2, 65, 100, (40, 100), seconds={"restore": 5, "step": 30, "total": 35}, ending="finished")
    found = account_for_attempts([first, last], 3.6)
    assert {name: time for name, time in found.buckets.items() if time} == {
        "progress": 32_000 + 30_000,
        "eval": 4_000,
        "save": 4_000,
        "lost": 10_000,
        "import": 2_000,
        "compile": 8_000,
        "restore": 5_000,
        "down": 5_000,
    }
    assert found.clock == 100_000
    assert found.goodput == pytest.approx(0.62)
    assert found.goodput_running == pytest.approx(62 / 95)
    assert (found.lost_steps, found.interruptions) == (10, 1)
    assert found.dollars == pytest.approx(3.6 * 95 / 3600)


def test_who_claims_more_seconds_than_there_were_is_scaled_down() -> None:
    """Two clocks need not agree: every bucket gives its share."""
    found = account_for_attempts([line(1, 0, 10, (0, 5), seconds={"step": 15, "finish": 5})])
    assert (found.buckets["progress"], found.buckets["finish"]) == (7_500, 2_500)


def test_lost_is_what_a_later_attempt_began_before() -> None:
    """Also where the line knows better or worse: it was written before anybody knew."""
    taken_back = [line(1, 0, 10, (0, 30), lost_steps=0), line(2, 10, 20, (30, 60)), line(3, 20, 30, (20, 60))]
    assert [span.lost_steps for span in account_for_attempts(taken_back).spans] == [10, 30, 0]
    published_after_all = [line(1, 0, 10, (0, 30), lost_steps=10), line(2, 10, 20, (30, 60))]
    assert [span.lost_steps for span in account_for_attempts(published_after_all).spans] == [0, 0]
    nobody_since = [line(1, 0, 10, (0, 30), lost_steps=10), line(2, 10, 20)]
    assert [span.lost_steps for span in account_for_attempts(nobody_since).spans] == [10, 0]
    rolled_back = account_for_attempts([line(1, 0, 10, (0, 30), redone_steps=20, seconds={"step": 10})])
    assert (rolled_back.lost_steps, rolled_back.buckets["lost"]) == (20, 4_000)


def test_the_clock_stops_when_a_run_is_finished() -> None:
    """Continued a week later: nobody wanted it to run between."""
    week = 7 * 86400.0
    done, more = line(1, 0, 10, (0, 30), ending="finished"), line(2, week, week + 10, (30, 60))
    found = account_for_attempts([done, more, line(3, week + 15, week + 20, (60, 90))])
    assert (found.clock, found.buckets["down"]) == (30_000, 5_000)
    assert [(span.start, span.end) for span in found.spans] == [(0, 10_000), (10_000, 20_000), (25_000, 30_000)]


@pytest.mark.parametrize(
    "broken",
    [
        {},
        [],
        "text",
        None,
        {"started": iso(0)},
        {"started": iso(0), "ended": "yesterday"},
        {"started": 3, "ended": 4},
        {"started": None, "ended": None},
    ],
)
def test_a_line_that_is_none_is_counted_and_left_out(broken: Any) -> None:
    found = account_for_attempts([broken, line(1, 0, 10)])
    assert (len(found.spans), found.unreadable, found.clock) == (1, 1, 10_000)


@pytest.mark.parametrize(
    "odd",
    [
        {"seconds": {"step": float("nan"), "eval": "much", "save": -1, "data": None}},
        {"seconds": [1, 2]},
        {"from_step": "x", "to_step": None, "lost_steps": "many"},
        {"started": "2025-11-13T02:13:20", "ended": "2025-11-13T02:13:30"},
        {"attempt": None, "host": 7, "ending": None},
    ],
)
def test_a_line_with_odd_values_counts(odd: dict[str, Any]) -> None:
    found = account_for_attempts([{**line(1, 0, 10, (0, 5)), **odd}])
    assert (found.clock, sum(found.buckets.values())) == (10_000, 10_000)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(list(LEGEND)), st.integers(0, 10**9)), st.integers(10, 200))
def test_a_bar_is_as_long_as_it_may_be(spent: dict[str, int], room: int) -> None:
    drawn = draw_bar(spent, room)
    assert len(drawn) == (room if sum(spent.values()) else 0)
    for name, amount in spent.items():
        share = amount / (sum(spent.values()) or 1) * room
        assert abs(drawn.count(LEGEND[name][0]) - share) <= 1.0


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [(400, "0.4 s"), (59_949, "59.9 s"), (59_950, "1m00s"), (125_000, "2m05s"), (11.2e6, "3h06m")],
)
def test_durations(milliseconds: float, said: str) -> None:
    assert format_duration(milliseconds / 1000) == said


PAUSE = 1.5


@pytest.fixture(scope="session")
def killed(make_door: Callable[[str], Door]) -> tuple[Path, dict[str, Any]]:
    """A run that was SIGKILLed, left alone for a while, and finished; and what was true outside."""
    door, price = make_door("goodput"), "train.dollars_per_hour=36"
    words = (*SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=20", price)
    process = door.start(*words)
    while last_logged(door.cwd) < 35:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    dead, run = time.time(), RunDir(door.the_run)
    beat = heartbeat.read_heartbeat(run.heartbeat)
    assert beat is not None
    before = read_account(run)  # nobody has written its line
    time.sleep(PAUSE)
    spawning = time.time()
    second = door.start(*words)
    spawned = time.time()
    out, err = second.communicate()
    assert second.returncode == 0, (out, err)
    facts = {
        "beat": beat,
        "dead": dead,
        "spawning": spawning,
        "spawned": spawned,
        "over": time.time(),
        "before": before,
    }
    return run.path, facts


def test_a_killed_run_against_the_clock(killed: tuple[Path, dict[str, Any]]) -> None:
    path, facts = killed
    found, beat = read_account(RunDir(path)), facts["beat"]
    first, second = found.spans
    assert (first.ending, second.ending) == ("killed", "finished")
    assert first.to_step == beat.step >= 35
    assert (first.from_step, second.from_step, second.to_step) == (0, 20, 60)
    assert first.lost_steps == beat.step - 20
    assert second.lost_steps == 0
    # its end is its last sign of life; a process begins at a tick of 10 ms
    down = second.down / 1000
    assert facts["spawning"] - beat.changed - 0.03 <= down <= facts["spawned"] - beat.changed + 0.03
    assert down >= PAUSE - 0.03
    assert beat.changed <= facts["dead"]
    assert second.started + (second.end - second.start) / 1000 <= facts["over"]
    for told in read_attempts(RunDir(path)):
        spent = told["seconds"]
        length = datetime.fromisoformat(told["ended"]) - datetime.fromisoformat(told["started"])
        assert sum(spent.values()) - spent["total"] == pytest.approx(spent["total"], abs=0.02)
        assert length.total_seconds() == pytest.approx(spent["total"], abs=0.1)  # two clocks
        known = ("step", "import", "startup", "restore", "eval", "save", "finish")
        # of a killed one status.json knows all but the last second, in which all of its steps may lie
        assert min(spent[bucket] for bucket in (known if told["ending"] == "finished" else known[1:4])) > 0
    assert first.buckets["lost"] == pytest.approx(read_attempts(RunDir(path))[0]["lost_seconds"] * 1000, abs=20)
    assert found.buckets["other"] < 200
    assert 0 < found.goodput < found.goodput_running < 1


def test_before_anybody_came_back(killed: tuple[Path, dict[str, Any]]) -> None:
    """Killed, and no line of it: its last sign of life is its end, and what a restart would lose is lost."""
    path, facts = killed
    (span,) = facts["before"].spans
    assert (span.ending, span.to_step, span.lost_steps) == ("killed", facts["beat"].step, facts["beat"].step - 20)
    assert facts["before"].spans[0].buckets == read_account(RunDir(path)).spans[0].buckets


def test_a_run_at_work_counts_up_to_its_last_sign_of_life(killed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(killed[0], run.path, symlinks=True)
    whole = run.attempts.read_text().splitlines(keepends=True)
    run.attempts.write_text(whole[0])
    status = {**run.read_status(), "state": "running"}
    status["attempt"] = {key: json.loads(whole[1])[key] for key in ("attempt", "started", "host", "from_step", "drift")}
    # Of the end of the run, and so of another moment than what is put together here.
    del status["updated"]
    run.status.write_text(json.dumps(status))
    assert [span.ending for span in read_account(run).spans] == ["killed", "killed"]
    with lock_run(run):
        spans = read_account(run).spans
    assert [span.ending for span in spans] == ["killed", "running"]
    beat = heartbeat.read_heartbeat(run.heartbeat)
    assert beat is not None
    # The seconds of its status are those of its end, a moment after its last sign of life.
    assert spans[1].started + (spans[1].end - spans[1].start) / 1000 >= beat.changed - 0.01


def test_the_verb(
    killed: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, facts = killed
    monkeypatch.setenv("COLUMNS", "160")  # a narrow terminal shortens why it ended
    picture = tmp_path / "time.png"
    assert main(["goodput", str(path), "--to", str(picture)]) == 0
    out = capsys.readouterr().out
    assert f"0 → {facts['beat'].step}" in out
    assert "killed during" in out
    assert "20 → 60" in out
    assert "at $36 an hour while attempts ran" in out
    found = read_account(RunDir(path))
    assert f"goodput {100 * found.goodput:.1f} % of {format_duration(found.clock / 1000)}" in out
    (drawn,) = (text for text in out.splitlines() if text.startswith("█") and "  " not in text)
    assert len(drawn) == 100
    assert "×" in drawn
    assert "·" in drawn
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(picture.read_bytes()) > 20_000


def test_the_same_as_data(killed: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["goodput", str(killed[0]), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert sum(told["buckets"].values()) == pytest.approx(told["seconds"], abs=1e-6)
    assert told["goodput"] == pytest.approx(told["buckets"]["progress"] / told["seconds"])
    assert [attempt["ending"] for attempt in told["attempts"]] == ["killed", "finished"]


def test_a_folder_of_runs(
    killed: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.yaml").write_text("train: [what]\n")
    (old / "attempts.jsonl").write_text(
        json.dumps({"attempt": 1, "started": iso(0), "ended": iso(60), "ending": "finished", "to_step": 9})
        + '\n{"attempt": 2, "sta\n{"attempt": 2}\n[3]\n'
    )
    shutil.copytree(killed[0], tmp_path / "new", symlinks=True)
    assert main(["goodput", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "3 lines of attempts.jsonl left out" in out
    assert "1 of 2 runs have a price" in out
    assert main(["goodput", str(tmp_path), "--to", str(tmp_path / "x.png")]) == 2
    assert "a picture shows one run, and these are 2" in capsys.readouterr().err
    assert main(["goodput", str(old)]) == 0
    assert "nobody wrote down" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["RUN", "--to", "time.txt"], 2, "is no picture"),
        (["RUN", "--to", "nowhere/time.png"], 2, "there is no directory"),
        (["nothing"], 3, "there is no such directory"),
        (["empty"], 3, "nothing says when it ran"),
    ],
)
def test_what_cannot_be(
    words: list[str],
    code: int,
    said: str,
    killed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.yaml").write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    assert main(["goodput", *(word.replace("RUN", str(killed[0])) for word in words)]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# --- clocks that are set ---

DAY = 86400.0


def test_a_clock_set_back_between_attempts() -> None:
    """They are in the order of their numbers; nobody knows how long it was down, and that is said."""
    first = line(1, 0, 60, (0, 50), seconds={"step": 60, "total": 60})
    second = line(2, -DAY, 30 - DAY, (40, 70), seconds={"step": 30, "total": 30})
    last = line(3, 40 - DAY, 60 - DAY, (60, 90), seconds={"step": 20, "total": 20}, ending="finished")
    found = account_for_attempts([last, second, first])
    assert [span.number for span in found.spans] == [1, 2, 3]
    assert [span.lost_steps for span in found.spans] == [10, 10, 0]
    assert [(span.start, span.end) for span in found.spans] == [(0, 60_000), (60_000, 90_000), (100_000, 120_000)]
    assert (found.buckets["down"], found.set_clocks) == (10_000, 1)


def test_a_clock_set_back_within_an_attempt() -> None:
    """Whether it wrote that down or not, it took as long as it took."""
    for known in ({}, {"clock_jump_seconds": -DAY}):
        first = line(1, 0, 60 - DAY, (0, 50), seconds={"step": 60, "total": 60}, **known)
        found = account_for_attempts([first, line(2, 65 - DAY, 75 - DAY, (50, 60), seconds={"total": 10})])
        assert [(span.start, span.end) for span in found.spans] == [(0, 60_000), (65_000, 75_000)]
        assert (found.buckets["progress"], found.buckets["down"], found.set_clocks) == (60_000, 5_000, 1)


def test_a_clock_set_forward_within_an_attempt() -> None:
    """Where it wrote that down, the years are nobody's; else they are nobody's known use."""
    years = 10 * 365 * DAY
    told = line(1, 0, 60 + years, (0, 50), seconds={"step": 60, "total": 60}, clock_jump_seconds=years)
    later = line(2, 65 + years, 75 + years, (50, 60), seconds={"total": 10})
    found = account_for_attempts([told, later])
    assert [(span.start, span.end) for span in found.spans] == [(0, 60_000), (65_000, 75_000)]
    del told["clock_jump_seconds"]
    assert account_for_attempts([told, later]).buckets["other"] == round(years * 1000) + 10_000


def test_two_clocks_that_differ_a_little_are_no_matter() -> None:
    found = account_for_attempts([line(1, 0, 60), line(2, 59, 80)])
    assert (found.set_clocks, found.clock, found.buckets["down"]) == (0, 80_000, 0)


@pytest.mark.parametrize(
    "odd",
    [
        {"seconds": {"step": 10**400, "total": 10**400}},
        {"seconds": {"total": float("inf"), "step": float("-inf")}},
        {"clock_jump_seconds": float("nan")},
        {"clock_jump_seconds": 10**400},
        {"clock_jump_seconds": "a day"},
        {"attempt": 10**400, "to_step": 10**400, "from_step": -(10**400), "lost_steps": 10**400},
        {"redone_steps": -5, "lost_steps": -5},
    ],
)
def test_no_number_is_too_odd(odd: dict[str, Any]) -> None:
    found = account_for_attempts([{**line(1, 0, 10, (0, 5)), **odd}])
    assert (found.clock, sum(found.buckets.values())) == (10_000, 10_000)


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "started": st.datetimes().map(lambda time: time.isoformat()),
                "ended": st.datetimes().map(lambda time: time.isoformat()),
                "attempt": st.integers() | st.none(),
                "clock_jump_seconds": st.floats() | st.integers(),
                "seconds": st.dictionaries(st.sampled_from(["step", "total"]), st.floats() | st.integers()),
            }
        ),
        max_size=5,
    )
)
def test_clocks_of_any_kind(lines: list[dict[str, Any]]) -> None:
    found = account_for_attempts(lines)
    assert sum(found.buckets.values()) == found.clock
    assert min([0, *(spent for span in found.spans for spent in span.buckets.values()), *found.buckets.values()]) == 0
    for line in (*goodput_table._format_attempts(found), *goodput_table._format_total([found])):
        assert "-" not in line.replace(" - ", "").partition("UTC")[2]


def test_a_clock_that_was_set_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Also where the picture is drawn of it, and of the centuries that attempts claim to have taken."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    century = 100 * 365 * DAY
    lines = [
        {**line(1, 0, -DAY, (0, 5)), "command": []},
        *({**line(n, n * century, (n + 1) * century, (5, 9)), "command": []} for n in range(2, 70)),
    ]
    (run / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["goodput", str(run), "--to", str(tmp_path / "x.png")]) == 0
    assert "a clock was set back 1 time: what lies between counts as no time" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 10_000
