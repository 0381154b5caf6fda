"""Whole runs on data that holds a test set out: looked at once, at the end, of the weights that the run ends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Door
from tests.laws.faults import Forks

RUN = (
    *(
        "model=mlp",
        "data=arrays",
        "data.path=three.npz",
        "data.gives=features",
        "model.width=8",
        "data.batch_size=16",
        "optim.lr=0.3",
    ),
    *("train.steps=24", "train.eval_steps=4", "train.log_steps=4", "log.tensorboard=false", "eval=[metrics,test]"),
    "train.eval_batches=1",
)


@pytest.fixture
def door(tmp_path: Path, served: Forks) -> Door:
    """Return a door beside an archive of 200 examples to train on, 40 to choose by, and 50 to test on."""
    rng = np.random.default_rng(0)
    parts = {}
    for part, size in (("train", 200), ("val", 40), ("test", 50)):
        label = rng.integers(0, 3, size)
        parts[f"x_{part}"] = (rng.normal(size=(size, 5)) + label[:, None]).astype(np.float32)
        parts[f"y_{part}"] = label
    np.savez(tmp_path / "three.npz", **parts)
    return Door(tmp_path, served)


def read_lines(run: Path, split: str) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["split"] == split}


def evaluate(door: Door, which: str) -> dict[str, Any]:
    """Return what an evaluation of one checkpoint finds."""
    from runner.__main__ import run_from_shell

    assert run_from_shell(["eval", f"{door.the_run}@{which}"]) == 0
    (results,) = door.the_run.glob("eval/*/results.json")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def test_a_test_set_is_looked_at_once_and_wholly_at_the_end(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = door.run(*RUN)
    assert ended.returncode == 0, ended.stderr
    assert "· evaluates 16 of 40 held-out examples" in ended.stdout
    assert list(read_lines(door.the_run, "eval")) == [4, 8, 12, 16, 20, 24]
    ((step, line),) = read_lines(door.the_run, "test").items()
    assert step == 24
    # In fiftieths: every example counts once.
    assert line["accuracy"] * 50 == pytest.approx(round(line["accuracy"] * 50))
    monkeypatch.chdir(door.cwd)
    found = evaluate(door, "newest")
    assert found["step"] == 24
    assert found["results"]["test"] == {key: line[key] for key in ("loss", "accuracy")}


def test_the_test_metrics_are_those_of_the_best_weights(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss on one batch gets worse after its best: the run ends on that step's weights, and tests those alone."""
    ended = door.run(*RUN, "train.final=best", "score.mode=max")
    assert ended.returncode == 0, ended.stderr
    status = json.loads((door.the_run / "status.json").read_text())
    best = status["final_step"]
    assert best < 24
    assert read_lines(door.the_run, "test") == {}
    monkeypatch.chdir(door.cwd)
    found = evaluate(door, "best")
    assert found["step"] == best
    assert status["final"] == {
        f"{split}/{name}": value for split, values in found["results"].items() for name, value in values.items()
    }
    assert f"ends on the best weights, of step {best}: eval/" in ended.stdout
    assert f"those of step {best}: " in (door.the_run / "README.md").read_text()
    again = door.run(*RUN, "train.final=best", "score.mode=max")
    assert (again.returncode, "is finished" in again.stdout) == (0, True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("eval.test.split=tset",),
            "eval.test.split=tset: the data has no such set; it has eval, train, test; did you mean",
        ),
        (("score.metric=test/accuracy", "score.mode=max"), "looks at the test set, and nothing is chosen by that"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(door: Door, words: tuple[str, ...], line: str) -> None:
    ended = door.run(*RUN, *words)
    assert ended.returncode == 2
    assert line in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (door.cwd / "outputs").exists()


def test_data_without_such_a_set_is_told_before_training(door: Door) -> None:
    ended = door.run("model=mlp", "data=digits", "eval=[metrics,test]", "train.steps=4")
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: eval.test.split=test: the data has no such set; it has eval, train; leave eval.test out\n",
    )
    assert not (door.cwd / "outputs").exists()
