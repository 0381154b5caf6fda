"""The law: after any number of kills every curve has each step once, with the same values, wherever one looks.

The short form kills a run four times; `pytest -m slow tests/laws/test_logs.py` ten times, and before every single
change that a resume makes to the logs.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import curves
from tests.conftest import SMALL, Door, last_logged, plant
from tests.laws.faults import compiled, forks, missing
from tests.laws.test_stop import SLOW_EVALUATION, slow, wait_until
from tests.laws.test_storage import RUN, Laboratory, Place, Window
from tests.laws.test_trouble import NAN, fault
from tests.laws.test_trouble import RUN as DIGITS
from tests.wandb_standin import serving

pytestmark = pytest.mark.forked

COMMAND = (
    *(override for override in SMALL if not override.startswith("log.")),
    *("ckpt=periodic", "ckpt.save.periodic.steps=7", "log=wandb", "log.wandb.mode=offline"),
)
TENSORBOARDS = (curves.concatenated, curves.accumulator, curves.multiplexer, curves.data_server)


# --- where a run is killed: asked again and again, with the logs as they were when the process started ---


def _logged(step: int) -> Callable[[Door, set[Path]], bool]:
    """While it trains: it has opened its logs, and logged a step."""
    return lambda door, before: _opening(door, before) and last_logged(door.cwd) >= step


def _opening(door: Door, before: set[Path]) -> bool:
    """When it has cut its logs back, at the latest."""
    return bool(_event_files(door) - before)


def _filling(door: Door, before: set[Path]) -> bool:
    """While the offline data of before is out of the way, and the new is not complete."""
    return _opening(door, before) and (door.the_run / "logs/wandb/.superseded").exists()


FOUR = (_logged(20), _filling, _logged(30), _logged(45))
TEN = (
    *(_logged(5), _logged(10), _opening, _logged(20), _filling),
    *(_logged(30), _opening, _logged(40), _filling, _logged(45)),
)


def _event_files(door: Door) -> set[Path]:
    return set(door.cwd.glob("outputs/*/*/logs/tensorboard/*tfevents*"))


def _killed(door: Door, when: Callable[[Door, set[Path]], bool]) -> None:
    """Start the run, SIGKILL it when it is there, and assert that it landed."""
    before = _event_files(door)
    process = door.start(*COMMAND)
    while not when(door, before):
        assert process.poll() is None, f"ended before the kill: {process.communicate()}"
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module", params=[4, pytest.param(10, marks=pytest.mark.slow)])
def killed(request: pytest.FixtureRequest, make_door: Callable[[str], Door]) -> Path:
    """The logs of a run that was killed so many times, and finished."""
    door = make_door("killed")
    for when in {4: FOUR, 10: TEN}[request.param]:
        _killed(door, when)
    done = door.run(*COMMAND)
    assert done.returncode == 0, done.stderr
    assert len((door.the_run / "attempts.jsonl").read_text().splitlines()) == request.param + 1
    return door.the_run / "logs"


def test_metrics_are_those_of_an_uninterrupted_run(killed: Path, untouched: Callable[..., Door]) -> None:
    door = untouched(*SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=7")
    assert (killed / "metrics.jsonl").read_bytes() == (door.the_run / "logs/metrics.jsonl").read_bytes()
    assert list(killed.glob("metrics.cut-*.jsonl"))  # something was done again


@pytest.mark.parametrize("reader", TENSORBOARDS, ids=lambda reader: reader.__name__)
def test_tensorboard_shows_each_step_once(killed: Path, reader: Callable[[Path], curves.Curves]) -> None:
    assert reader(killed) == curves.as_float32(curves.metrics(killed))


def test_offline_wandb_holds_each_step_once_in_one_run(killed: Path) -> None:
    assert curves.wandb_offline(killed) == curves.metrics(killed)
    assert len(list((killed / "wandb/wandb").glob("offline-run-*"))) == 1  # a sync of a second one replaces the first
    assert not (killed / "wandb/.superseded").exists()


def test_an_evaluation_that_a_stop_and_a_kill_cut_short_is_there_once(killed: Path, door: Door, tmp_path: Path) -> None:
    """Stopped while it evaluates, killed when it has made up for that and has not saved it."""
    command = (*SMALL, "log.tensorboard=true", "ckpt=periodic", "ckpt.save.periodic.steps=7")
    stopped = door.start(*command, **plant(tmp_path, SLOW_EVALUATION))
    wait_until(stopped, door, "eval")
    stopped.terminate()
    stopped.communicate()
    assert stopped.returncode == 75
    doomed = door.start(*command, **plant(tmp_path, slow("runner.checkpoint.seal", "seal_checkpoint", 600)))
    wait_until(doomed, door, "save", "seal")
    doomed.kill()
    doomed.communicate()
    logs = door.the_run / "logs"
    assert logs.joinpath("metrics.jsonl").read_text().count('"eval"') == 1
    assert door.run(*command).returncode == 0
    assert (logs / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    assert curves.concatenated(logs) == curves.as_float32(curves.metrics(logs))


POISONED = fault("number == 26", NAN)  # step 27: back to 20
SKIPPING = (*(one for one in DIGITS if not one.startswith("log.")), "train.log_steps=1", "ckpt.save.periodic.steps=10")


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_run_that_went_back_and_skipped_a_batch_has_each_step_once(door: Door, tmp_path: Path, mode: str) -> None:
    """The logs are opened again in the same process, at an older step; what comes now is different."""
    with serving(rewinds=True) as server:
        there = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, **plant(tmp_path, POISONED)}
        done = door.run(*SKIPPING, "log=wandb", f"log.wandb.mode={mode}", **there)
    assert done.returncode == 0, done.stderr
    assert "restored step 20" in done.stdout
    logs = door.the_run / "logs"
    assert [step for step, _ in curves.metrics(logs)["train/loss"]] == list(range(1, 61))
    assert curves.concatenated(logs) == curves.data_server(logs) == curves.as_float32(curves.metrics(logs))
    if mode == "offline":
        assert curves.wandb_offline(logs) == curves.metrics(logs)
    else:
        assert server.curves((logs / "wandb/run_id").read_text()) == curves.metrics(logs)
        assert "mutation RewindRun" in server.asked


# --- before every change ---

TENSORBOARD = (*RUN, "log.tensorboard=true")
REOPENING = Window("/logs/timing.jsonl", "/.writing/")  # cut back from step 8 to 6, and on to the next save
SOME = (2, 9, 12, 21, 24, 33)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    if reason := missing():
        pytest.skip(reason)
    room = tmp_path_factory.mktemp("logs")
    with forks(compiled(room)) as served:
        reference = Door(room / "reference")
        reference.cwd.mkdir()
        assert served.run(reference.cwd, *TENSORBOARD).returncode == 0
        yield Laboratory(served, reference.the_run, room)


@pytest.fixture(scope="module")
def start(lab: Laboratory) -> Place:
    """A run that was killed before its save at 8: its logs are two steps ahead of its checkpoints."""
    place = lab.place("start")
    assert lab.killed(place, TENSORBOARD, Window("/.writing/8"), 1)
    return place


def _holds(lab: Laboratory, start: Place, at: int, cwd: Path) -> bool:
    """Whether a kill landed before this change; the run then goes on, and its curves are looked at."""
    place = start.copied(cwd / f"{at}")
    fatal = lab.killed(place, TENSORBOARD, REOPENING, at)
    assert lab.forks.run(place.cwd, *TENSORBOARD).returncode == 0
    logs = place.run / "logs"
    assert (logs / "metrics.jsonl").read_bytes() == (lab.reference / "logs/metrics.jsonl").read_bytes(), fatal
    assert curves.concatenated(logs) == curves.as_float32(curves.metrics(logs)), fatal
    return fatal is not None


@pytest.mark.parametrize("at", SOME)
def test_logs_killed_before_a_change(lab: Laboratory, start: Place, tmp_path: Path, at: int) -> None:
    assert _holds(lab, start, at, tmp_path)


@pytest.mark.slow
def test_logs_killed_before_every_change(lab: Laboratory, start: Place, tmp_path: Path) -> None:
    at = 1
    while _holds(lab, start, at, tmp_path):
        at += 1
    assert at > max(SOME)
