"""The law: a power cut at any moment is a kill at some earlier moment (powercut.py).

The short form takes a few states of each scenario, those first that a restart looks at; `pytest -m slow` and
`python -m tests.laws.powercut` take 500.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.laws.crash_states import Call, Cut, History, read_calls, read_tree, write_tree
from tests.laws.endings import find_run, find_wrong_end, read_attempt_numbers, read_ending
from tests.laws.faults import Forks, compiled, missing
from tests.laws.powercut import (
    ALL_KEPT,
    BACK_TO,
    SCENARIOS,
    Scenario,
    record_scenario,
    recording_forks,
    try_states,
)

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SHORT = {"fresh": 12, "resumed": 6, "taken back": 6}
FULL = 100  # of each of the five


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with recording_forks(tmp_path_factory.mktemp("recorder")) as served:
        yield served


@pytest.mark.parametrize("scenario", [each for each in SCENARIOS if each.name in SHORT], ids=lambda each: each.name)
def test_a_power_cut_is_a_kill_at_some_earlier_moment(recorded: Forks, scenario: Scenario, tmp_path: Path) -> None:
    recording = record_scenario(recorded, scenario, tmp_path)
    verdicts = try_states(recorded, recording, tmp_path / "states", SHORT[scenario.name], seed=0)
    assert len(verdicts) == SHORT[scenario.name]
    assert [str(verdict) for verdict in verdicts if verdict.problem] == []


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda each: each.name)
def test_every_power_cut_is_a_kill_at_some_earlier_moment(recorded: Forks, scenario: Scenario, tmp_path: Path) -> None:
    recording = record_scenario(recorded, scenario, tmp_path)
    verdicts = try_states(recorded, recording, tmp_path / "states", FULL, seed=1)
    assert len(verdicts) == FULL
    assert [str(verdict) for verdict in verdicts if verdict.problem] == []


def test_a_run_that_was_taken_back_is_not_taken_back_again_by_what_a_power_cut_leaves(
    recorded: Forks, tmp_path: Path
) -> None:
    """status.json is replaced once a second without a wait for the disk, and a line of attempts.jsonl may be torn."""
    cwd, back = tmp_path / "work", (*ALL_KEPT, f"step={BACK_TO}")
    cwd.mkdir()
    assert recorded.run(cwd, *ALL_KEPT).returncode == 0
    run = find_run(cwd)
    undisturbed = read_ending(run)
    assert recorded.run(cwd, *back, kill_at=10).returncode == -9
    (run / "status.json").write_bytes(b"")
    with (run / "attempts.jsonl").open("a") as out:
        out.write('{"attempt": 2, "started": "20')
    done = recorded.run(cwd, *back)
    assert done.returncode == 0, done.stdout
    assert "restored step 9 " in done.stdout
    assert find_wrong_end(run, undisturbed) is None
    assert read_attempt_numbers(run) == [1, 2, 3]


# --- the states themselves, of a history of a few calls ---


def _history(*calls: tuple[str, int, str, str, bytes]) -> History:
    return History({}, [Call(kind, inode, 0, path, to, data) for kind, inode, path, to, data in calls], {".": 1})


REPLACED = (
    ("create", 2, "old", "", b""),
    ("write", 2, "old", "", b"old"),
    ("sync", 2, "old", "", b""),
    ("sync", 1, ".", "", b""),
    ("create", 3, ".new", "", b""),
    ("write", 3, ".new", "", b"new"),
)
RENAMED = ("rename", 0, ".new", "old", b"")


def _states(history: History, rules: str) -> set[bytes | str | None]:
    cuts = [Cut(len(history.calls), rules, seed) for seed in range(200)]  # type: ignore[arg-type]
    return {cut.state_of(history).get("old", "gone") for cut in cuts}


@pytest.mark.parametrize("rules", ["ordered", "weak"])
def test_a_file_that_is_renamed_unsynced_may_be_anything_but_is_never_gone(rules: str) -> None:
    states = _states(_history(*REPLACED, RENAMED), rules)
    assert states >= {b"old", b"new", b"", b"\0\0\0"}
    assert states <= {b"old", b"new", b"", b"\0\0\0", b"n", b"ne"}


@pytest.mark.parametrize("rules", ["ordered", "weak"])
def test_a_file_that_is_synced_before_it_is_renamed_is_the_old_or_the_new(rules: str) -> None:
    synced = (*REPLACED, ("sync", 3, ".new", "", b""), RENAMED)
    assert _states(_history(*synced), rules) == {b"old", b"new"}
    assert _states(_history(*synced, ("sync", 1, ".", "", b"")), rules) == {b"new"}


def test_a_new_name_is_sure_when_its_folder_is_synced_and_under_weak_rules_only_then() -> None:
    made = (("create", 2, "old", "", b""), ("write", 2, "old", "", b"x"), ("sync", 2, "old", "", b""))
    assert _states(_history(*made), "ordered") == {b"x"}
    assert _states(_history(*made), "weak") == {b"x", "gone"}
    assert _states(_history(*made, ("sync", 1, ".", "", b"")), "weak") == {b"x"}


def test_what_is_moved_between_folders_is_at_one_place_or_lost_where_only_the_first_was_synced() -> None:
    moved = (
        ("create", 2, "old", "", b""),
        ("sync", 1, ".", "", b""),
        ("mkdir", 3, "to", "", b""),
        ("rename", 0, "old", "to/there", b""),
    )
    synced = _history(*moved, ("sync", 1, ".", "", b""))
    trees = [Cut(5, "weak", seed).state_of(synced) for seed in range(50)]
    assert {("old" in tree, "to/there" in tree) for tree in trees} == {(False, False), (False, True)}
    unsynced = [Cut(4, "weak", seed).state_of(_history(*moved)) for seed in range(50)]
    assert {"old" in tree for tree in unsynced} == {True, False}


def test_the_record_played_back_is_what_lies_on_disk(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = """
import os, pathlib
os.mkdir("a"); out = open("a/file", "wb", buffering=0); out.write(b"other"); out.seek(1); out.write(b"T")
os.truncate("a/file", 3); os.pwrite(out.fileno(), b"!", 5); os.fsync(out.fileno())
with open("a/file", "ab") as again: again.write(b"appended")
os.symlink("file", "a/link"); os.link("a/file", "twin"); os.rename("a", "b"); os.replace("twin", "b/file2")
folder = os.open("b", os.O_RDONLY); os.mkdir("c", dir_fd=folder); os.rmdir("c", dir_fd=folder)
os.writev(os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=folder), [b"one", b"two"]); os.fsync(folder)
pathlib.Path("b/new").write_text("x"); os.unlink("b/file")
"""
    work, log = tmp_path / "work", tmp_path / "calls"
    work.mkdir()
    environment = {
        "RECORD_BELOW": str(work),
        "RECORD_LOG": str(log),
        "LD_PRELOAD": str(compiled(tmp_path, "recorder.c")),
    }
    subprocess.run([sys.executable, "-S", "-E", "-c", code], cwd=work, env=environment, check=True)
    history = History({}, read_calls(log, work), {".": work.stat().st_ino})
    assert history.tree() == read_tree(work)
    assert read_tree(work) == {"b": None, "b/link": "file", "b/file2": b"oTh\0\0!appended", "b/new": b"x"}
    (tmp_path / "again").mkdir()
    write_tree(history.tree(), tmp_path / "again")
    assert read_tree(tmp_path / "again") == read_tree(work)
