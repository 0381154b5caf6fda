"""The law: whatever change to the disk a kill comes before, nothing looks like a checkpoint and is not one.

A run of a few seconds is killed just before its n-th change to the disk, and resumed to its end. The short form takes
some n of each window; `pytest -m slow tests/laws/test_storage.py` takes every n = 1, 2, 3 … until nothing is left to
kill, and says how many kills that were and before what.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from runner.checkpoint.record import Score, find_best, list_records, list_steps, read_sidecar
from runner.checkpoint.seal import find_problem
from tests.conftest import Door, assert_same
from tests.laws.faults import LAST, TINY, Event, Forks, Window, compiled, events_in, forks, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

RUN = (*TINY, "retention.last.n=1")  # the save at 8 moves the link to the best and deletes two others
SURVIVORS = 2  # so many runs in succession that no kill met: TensorStore does not write as many files each time


@dataclass(frozen=True)
class Place:
    """A working directory with a run in it, or with nothing yet."""

    cwd: Path

    @property
    def run(self) -> Path:
        return Door(self.cwd).the_run

    @property
    def checkpoints(self) -> Path:
        found = list(self.cwd.glob("outputs/*/*/checkpoints"))
        return found[0] if found else self.cwd / "none"

    def copied(self, cwd: Path) -> Place:
        shutil.copytree(self.cwd, cwd, symlinks=True)
        return Place(cwd)


@dataclass(frozen=True)
class Laboratory:
    """Where runs are killed: forks with the shim, an uninterrupted run to compare with, and room."""

    forks: Forks
    reference: Path
    room: Path

    def place(self, name: str) -> Place:
        (self.room / name).mkdir()
        return Place(self.room / name)

    def killed(self, place: Place, overrides: Iterable[str], window: Window, at: int) -> Event | None:
        """Run, and be killed just before event `at` of the window; None where the run came to its end untouched."""
        log = place.cwd / "fatal.txt"
        log.unlink(missing_ok=True)
        done = self.forks.run(place.cwd, *overrides, **window.environment(place.cwd / "outputs", log, at))
        if done.returncode == 0 and not log.exists():
            return None
        assert done.returncode == -signal.SIGKILL, done.stdout
        (fatal,) = events_in(log)
        assert fatal.number == at
        return fatal


# --- what is killed ---


def _new(lab: Laboratory, name: str, overrides: Iterable[str]) -> Place:
    return lab.place(name)


def _before(after: str) -> Callable[[Laboratory, str, Iterable[str]], Place]:
    """A run that was killed just before the first change to such a path."""

    def prepared(lab: Laboratory, name: str, overrides: Iterable[str]) -> Place:
        place = lab.place(name)
        assert lab.killed(place, overrides, Window(after), 1)
        return place

    return prepared


def _littered(lab: Laboratory, name: str, overrides: Iterable[str]) -> Place:
    """A run with half a checkpoint on its way in, and half a one on its way out."""
    writing, place = lab.place(f"{name}-writing"), lab.place(name)
    assert lab.killed(writing, overrides, Window("/.writing/8"), 20)
    assert lab.killed(place, overrides, Window("/.trash/4-"), 10)
    shutil.rmtree(place.checkpoints / ".writing")
    shutil.copytree(writing.checkpoints / ".writing", place.checkpoints / ".writing")
    assert any((place.checkpoints / ".writing").iterdir())
    assert any((place.checkpoints / ".trash").iterdir())
    return place


@dataclass(frozen=True)
class Case:
    """A window of a run, and the state the run is in before it."""

    prepared: Callable[[Laboratory, str, Iterable[str]], Place]
    window: Window
    overrides: tuple[str, ...] = RUN


ONE_SAVE = Window("/.writing/8", "/.writing/")  # written, sealed, published, linked, two others deleted, told
PUBLISHING = Window("/checkpoints/8", "/.writing/")  # of that, what comes after the seal
BACKGROUND = (*RUN, "ckpt.write=background")
CASES = {
    "a blocking save": Case(_before("/.writing/8"), ONE_SAVE),
    "a background save": Case(_before("/.writing/8"), ONE_SAVE, BACKGROUND),
    "the beginning": Case(_new, Window(until="/.writing/")),
    "a resume": Case(_littered, Window(until="/.writing/9")),
    "the end": Case(_before("/.writing/12"), Window("/checkpoints/.trash")),
}


def _events(lab: Laboratory, case: Case, start: Place) -> list[Event]:
    """Every event of a window, when nothing is killed."""
    place, log = start.copied(lab.room / "counted"), lab.room / "events.txt"
    log.unlink(missing_ok=True)
    done = lab.forks.run(place.cwd, *case.overrides, **case.window.environment(place.cwd / "outputs", log, at=0))
    assert done.returncode == 0, done.stdout
    shutil.rmtree(place.cwd)
    return events_in(log)


# --- what must hold ---


def _holds(lab: Laboratory, case: Case, start: Place, window: Window, at: int) -> Event | None:
    """Kill at one event, look at the disk, resume, and compare. None where the run came to its end untouched."""
    place = start.copied(lab.room / "attempt")
    try:
        fatal = lab.killed(place, case.overrides, window, at)
        if fatal is not None:
            _looks_right(place, start)
        _resumes(lab, case, place)
    finally:
        shutil.rmtree(place.cwd)
    return fatal


def _looks_right(place: Place, start: Place) -> None:
    """After the kill: every step is a good checkpoint, none that was promised is gone, and `best` leads to one."""
    steps = list_steps(place.checkpoints)
    assert {step: find_problem(place.checkpoints / str(step)) for step in steps} == dict.fromkeys(steps)
    before, after, score = list_records(start.checkpoints), list_records(place.checkpoints), Score()
    if not before:
        return
    assert steps[-1] >= before[-1].step
    known, best = find_best(before, score), find_best(after, score)
    assert known is not None
    assert best is not None
    assert best.metrics[score.metric] <= known.metrics[score.metric]
    assert read_sidecar((place.checkpoints / "best").resolve())[0] in (known, best)


def _resumes(lab: Laboratory, case: Case, place: Place) -> None:
    """The same command again goes on from the newest step there is, and ends where nothing was interrupted."""
    newest, finished = list_steps(place.checkpoints)[-1:], _finished(place)
    done = lab.forks.run(place.cwd, *case.overrides)
    assert done.returncode == 0, done.stdout
    restored = [int(step) for step in re.findall(r"^restored step (\d+)", done.stdout, re.MULTILINE)]
    assert restored == ([] if finished else newest), done.stdout
    assert "is not good" not in done.stdout, done.stdout
    assert not (place.run / "quarantine").exists()
    assert_same(place.run, lab.reference, LAST)
    assert list_steps(place.checkpoints) == list_steps(lab.reference / "checkpoints")
    assert (place.checkpoints / "best").readlink() == (lab.reference / "checkpoints/best").readlink()
    assert [path for name in (".trash", ".writing") for path in (place.checkpoints / name).glob("*")] == []
    attempts = [json.loads(line) for line in (place.run / "attempts.jsonl").read_text().splitlines()]
    assert attempts[-1]["ending"] == "finished"
    assert len({line["attempt"] for line in attempts}) == len(attempts)


def _finished(place: Place) -> bool:
    status = [json.loads(path.read_text()) for path in place.cwd.glob("outputs/*/*/status.json")]
    return bool(status) and status[0]["state"] == "finished"


# --- the law ---


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    room = tmp_path_factory.mktemp("storage")
    with forks(compiled(room)) as made:
        (room / "reference").mkdir()
        done = made.run(room / "reference", *RUN)
        assert done.returncode == 0, done.stdout
        yield Laboratory(made, Place(room / "reference").run, room)


@pytest.mark.parametrize("name", ["a blocking save", "a background save"])
@pytest.mark.slow
def test_killed_at_some_changes_of_a_save(name: str, lab: Laboratory) -> None:
    case = CASES[name]
    start = case.prepared(lab, name, case.overrides)
    events = _events(lab, case, start)
    named = next(event.number for event in events if event.path.endswith("/checkpoints/8"))
    written = {1, *(named * part // 5 for part in (1, 2, 3, 4))}
    for window, numbers in ((ONE_SAVE, sorted(written)), (PUBLISHING, (1, 2, 5, 6, 8, 9, 20))):
        for number in numbers:
            assert _holds(lab, case, start, window, number), (window, number)


def test_all_of_it_is_synced_before_it_has_its_name_and_the_name_before_anything_is_deleted(lab: Laboratory) -> None:
    """A kill loses nothing that the system has not written yet; a power loss does. So the order of calls is looked at."""
    case = CASES["a blocking save"]
    events = _events(lab, case, case.prepared(lab, "synced", case.overrides))
    named = next(event.number for event in events if event.path.endswith("/checkpoints/8"))
    changed: dict[str, int] = {}
    synced: dict[str, int] = {}
    for event in events[: named - 1]:
        path = event.path.rpartition(" -> ")[2].replace(".orbax-checkpoint-tmp", "").removesuffix(".__lock")
        # A process writes under a name of its own, `8-01ab23cd`.
        path = re.sub(r"/\.writing/8-[0-9a-f]{8}", "/.writing/8", path)
        (synced if event.kind == "fsync" else changed)[path.partition("/checkpoints/")[2]] = event.number
    files = {path for path in changed if path.startswith(".writing/8")}
    assert {".writing/8", ".writing/8/holdfast.json", ".writing/8/state/d", ".writing/8/state/manifest.ocdbt"} <= files
    assert {path for path in files if synced.get(path, 0) < changed[path]} == set()
    assert {str(Path(path).parent) for path in files} - {".writing"} <= synced.keys()
    after = [event for event in events if event.number > named]
    assert (after[0].kind, after[0].path.rpartition("/")[2]) == ("fsync", "checkpoints")
    assert [event.kind for event in after].index("unlink") > 0


@pytest.mark.parametrize("name", ["the beginning", "a resume", "the end"])
def test_killed_at_a_change_around_saves(name: str, lab: Laboratory) -> None:
    case = CASES[name]
    start = case.prepared(lab, name, case.overrides)
    assert _holds(lab, case, start, case.window, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_change(name: str, lab: Laboratory, capsys: pytest.CaptureFixture[str]) -> None:
    case, began = CASES[name], time.perf_counter()
    start = case.prepared(lab, f"every one of {name}", case.overrides)
    kills: list[Event] = []
    untouched = 0
    for number in count(1):
        fatal = _holds(lab, case, start, case.window, number)
        kills += [fatal] if fatal else []
        untouched = 0 if fatal else untouched + 1
        if untouched == SURVIVORS:
            break
    kinds = ", ".join(f"{many} {kind}" for kind, many in Counter(fatal.kind for fatal in kills).most_common())
    with capsys.disabled():
        print(f"\n{name}: {len(kills)} kills, before {kinds}; all resumed ({time.perf_counter() - began:.0f} s)")
    assert len(kills) >= (30 if case.window is ONE_SAVE else 10)
