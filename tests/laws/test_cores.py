"""The law: a run goes on with fewer or more cores, and is what it would have been without the kill, bit for bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import Door, assert_same

# Products of a size that XLA divides among threads: with another number of them the bits are others (seen).
WIDE = (
    *("model=mlp", "model.width=512", "data=digits", "data.batch_size=256", "log.tensorboard=false"),
    *("train.steps=30", "train.eval_steps=10", "train.eval_batches=1", "train.log_steps=1"),
    *("ckpt=combined", "ckpt.save.periodic.steps=4"),
)
# The model that `python run.py` trains.
DEFAULT = (
    *("train.steps=12", "train.eval_steps=6", "train.eval_batches=1", "train.log_steps=1", "log.tensorboard=false"),
    *("ckpt=combined", "ckpt.save.periodic.steps=3"),
)
ALL = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="needs two cores that a process may use")


@pytest.fixture(autouse=True)
def _nobody_asks_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NPROC", "HOLDFAST_NPROC"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """What starts meanwhile may use so many cores, as under `taskset`."""
    os.sched_setaffinity(0, ALL[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, ALL)


def obey(make_door: Callable[[str], Door], run: tuple[str, ...], before: int, after: int, kill: int) -> Door:
    """Kill a run with `before` cores, go on with `after`, and compare it with one that had `after` all the time."""
    whole, killed = make_door("whole"), make_door("killed")
    with cores(after):
        done = whole.run(*run)
        assert done.returncode == 0, done.stderr
    with cores(before):
        killed.kill_at(kill, *run)
    with cores(after):
        done = killed.run(*run)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (killed.the_run / "attempts.jsonl").read_text().splitlines()]
    assert [line["ending"] for line in lines] == ["killed", "finished"]
    assert lines[1]["from_step"] > 0
    assert lines[0]["threads"] == lines[1]["threads"]
    assert_same(killed.the_run, whole.the_run, lines[1]["to_step"])
    return killed


def test_a_run_that_lost_a_core_is_bit_identical(make_door: Callable[[str], Door]) -> None:
    obey(make_door, WIDE, before=2, after=1, kill=12)


@pytest.mark.slow
@pytest.mark.parametrize("run", [WIDE, DEFAULT], ids=["mlp", "gpt"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_any_number_of_cores(
    run: tuple[str, ...], before: int, after: int, make_door: Callable[[str], Door]
) -> None:
    killed = obey(make_door, run, before, after, kill=7)
    # And evaluated with any number it says the same.
    found = []
    for count in (1, 2):
        with cores(count):
            assert killed.run(f"dir={killed.the_run}", "train.steps=0").returncode == 0
        (results,) = killed.the_run.glob("eval/*/results.json")
        found.append(results.read_bytes())
    assert found[0] == found[1]


@pytest.mark.slow
def test_without_a_written_number_the_bits_would_differ(make_door: Callable[[str], Door]) -> None:
    """What these laws are worth: on this machine the number of threads does decide."""
    two, one = make_door("two"), make_door("one")
    for door, threads in ((two, "2"), (one, "1")):
        assert door.run(*WIDE, NPROC=threads).returncode == 0
    with pytest.raises(AssertionError):
        assert_same(two.the_run, one.the_run, 30)
