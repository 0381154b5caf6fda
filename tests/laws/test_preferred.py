"""The laws of a run that compares its model with what it was: that is stored once, and it keeps every promise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runner.inspect.load_model import load_model
from tests.conftest import SMALL, Door, assert_same, checkpoint
from tests.laws.test_tuned import base_of, flip, largest
from tests.places import a_preferences

pytestmark = pytest.mark.forked

DPO = (
    *(word for word in SMALL if not word.startswith("data.")),
    *("data=preferences", "data.seq_len=63", "data.batch_size=8", "train.steps=30", "optim.lr=1e-2"),
    *("ckpt.save.periodic.steps=7", "ckpt.write=blocking", "train.microbatches=2", "optim.ema=0.9"),
)
TUNED = {"whole": (), "lora": ("tune=lora", "tune.rank=2"), "freeze": ("tune=freeze", "tune.train=[norm,blocks.1.*]")}


@pytest.fixture
def source(make_door: Callable[..., Door], door: Door) -> Door:
    """A run on bytes, whose weights answers are compared with."""
    made = make_door("source", door.forks)
    assert made.run(*SMALL, "train.steps=10", "seed=5").returncode == 0
    return made


def name_values(folder: Path, prefix: str) -> dict[str, np.ndarray]:
    """Return arrays by their name behind a prefix, as plain Orbax reads them."""
    found = {name: leaf for name, leaf in checkpoint(folder).items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): np.asarray(leaf) for name, leaf in found.items()}


@pytest.mark.parametrize("tuned", TUNED)
def test_killed_twice_is_bit_identical_without_what_it_began_with(
    tuned: str, source: Door, door: Door, make_door: Callable[..., Door]
) -> None:
    words = (*DPO, *TUNED[tuned], f"data.path={a_preferences(door.cwd).path}", f"init_from={source.the_run}")
    whole = make_door("whole", door.forks)
    done = whole.run(*words)
    assert done.returncode == 0, done.stderr
    began = name_values(source.the_run / "checkpoints/10", "['params']")
    door.kill_at(10, *words)
    # What it is compared with is its own by now.
    shutil.move(source.the_run, door.cwd / "gone")
    door.kill_at(20, *words, delay=0.02)
    done = door.run(*words)
    assert done.returncode == 0, done.stderr
    assert "restored step" in done.stdout
    assert_same(door.the_run, whole.the_run, 30)
    mine = base_of(door.the_run)
    assert mine.name == base_of(whole.the_run).name
    saved = checkpoint(door.the_run / "checkpoints/30")
    assert not any("reference" in name or "frozen" in name for name in saved)
    kept = name_values(mine, "['reference']['params']")
    trained = name_values(door.the_run / "checkpoints/30", "['params']")
    # As much of the model as trains, and as it was.
    assert kept.keys() == trained.keys()
    assert any(not np.array_equal(kept[name], trained[name]) for name in kept)
    if tuned == "whole":
        assert kept.keys() == began.keys()
        assert all(np.array_equal(kept[name], began[name]) for name in kept)
    elif tuned == "lora":
        assert all(not leaf.any() for name, leaf in kept.items() if name.endswith("['lora_b']"))
    # Compared with what it was, and not with what it is.
    lines = [json.loads(line) for line in (door.the_run / "logs/metrics.jsonl").read_text().splitlines()]
    assert [line["margin"] for line in lines if line["split"] == "eval"][-1] != 0.0
    model, _ = load_model(str(door.the_run))
    assert model is not None


def test_a_flipped_byte_of_it_is_noticed(source: Door, door: Door) -> None:
    words = (*DPO, f"data.path={a_preferences(door.cwd).path}", f"init_from={source.the_run}")
    door.kill_at(20, *words)
    base, place = base_of(door.the_run), source.the_run
    flip(largest(base))
    shutil.move(place, door.cwd / "gone")
    steps = {path.name for path in (door.the_run / "checkpoints").iterdir()}
    done = door.run(*words)
    assert done.returncode == 3, (done.stdout, done.stderr)
    assert {path.name for path in (door.the_run / "checkpoints").iterdir()} == steps
    # With what it began with it is made again.
    shutil.move(door.cwd / "gone", place)
    done = door.run(*words)
    assert done.returncode == 0, done.stderr
    assert "made again, with the same digest" in done.stdout
    assert "restored step" in done.stdout


def test_others_begin_with_what_it_has_learnt(source: Door, door: Door) -> None:
    pairs = f"data.path={a_preferences(door.cwd).path}"
    done = door.run(*DPO, pairs, f"init_from={source.the_run}", "train.steps=7", "name=first")
    assert done.returncode == 0, done.stderr
    (first,) = (door.cwd / "outputs/first").iterdir()
    done = door.run(*DPO, pairs, f"init_from={first}", "train.steps=7", "name=second")
    assert done.returncode == 0, done.stderr
    (second,) = (door.cwd / "outputs/second").iterdir()
    learnt = name_values(first / "checkpoints/7", "['params']")
    kept = name_values(base_of(second), "['reference']['params']")
    assert all(np.array_equal(kept[name], learnt[name]) for name in learnt)


def test_nothing_to_begin_with_is_told(door: Door) -> None:
    done = door.run(*DPO, f"data.path={a_preferences(door.cwd).path}", "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert "objective=dpo without init_from" in done.stdout + done.stderr
