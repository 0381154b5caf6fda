"""A run that a metric ends early: interrupted and gone on with, it ends at the same step, with the same bits."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from runner.files import format_json
from tests.conftest import Door, assert_same
from tests.laws.faults import Forks

# The loss jumps about: it is best after some 50 steps, and after 15 more there is no patience left.
RUN = (
    *("model=mlp", "data=digits", "model.width=16", "optim.lr=0.5", "train.steps=300", "train.eval_steps=5"),
    *(
        "train.log_steps=5",
        "ckpt.save.periodic.steps=20",
        "log.tensorboard=false",
        "stop={metric: eval/loss, patience: 3}",
    ),
)


def read_status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, served: Forks) -> tuple[Path, int]:
    """Return an uninterrupted run and the step at which it ended."""
    door = Door(tmp_path_factory.mktemp("reference"), served)
    ended = door.run(*RUN)
    assert ended.returncode == 0, ended.stderr
    status = read_status(door.the_run)
    step = status["step"]
    assert 15 < step < 300, "the law needs a run that ends early, and not at once"
    assert (status["state"], status["stopped_early"], status["steps"]) == ("finished", True, 300)
    assert status["why"] == "eval/loss has not improved in 3 evaluations"
    assert f"stopped early at step {step} of 300: {status['why']}" in ended.stdout
    assert (door.the_run / "checkpoints" / str(step)).is_dir()
    assert f"at step {step} of 300, stopped early" in (door.the_run / "README.md").read_text()
    return door.the_run, step


def test_killed_and_gone_on_with_it_ends_at_the_same_step(
    reference: tuple[Path, int], tmp_path: Path, served: Forks
) -> None:
    """Killed once early and once when patience is half used up: the counter is that of the log."""
    run, step = reference
    door = Door(tmp_path, served)
    door.kill_at(15, *RUN)
    door.kill_at(step - 10, *RUN)
    ended = door.run(*RUN)
    assert ended.returncode == 0, ended.stderr
    assert_same(door.the_run, run, step)
    assert read_status(door.the_run)["stopped_early"]


def test_asked_to_stop_and_gone_on_with_it_ends_at_the_same_step(
    reference: tuple[Path, int], tmp_path: Path, served: Forks
) -> None:
    run, step = reference
    door = Door(tmp_path, served)
    door.kill_at(step - 5, *RUN, number=signal.SIGTERM)
    assert "stopped_early" not in read_status(door.the_run)
    assert door.run(*RUN).returncode == 0
    assert_same(door.the_run, run, step)


def test_typed_again_it_is_finished_and_with_more_patience_it_goes_on(
    reference: tuple[Path, int], served: Forks
) -> None:
    run, step = reference
    door, lines = Door(run.parents[2], served), (run / "logs/metrics.jsonl").read_bytes()
    since = time.perf_counter()
    again = door.run(*RUN)
    assert (again.returncode, time.perf_counter() - since < 30) == (0, True)
    assert f"is finished: {step} steps, stopped early (eval/loss has not improved in 3 evaluations)" in again.stdout
    assert again.stdout.rstrip().endswith("stop.patience=6")
    # Killed after its last save, before it said how it ended: nothing is trained, and it says so.
    status = read_status(run)
    del status["stopped_early"]
    (run / "status.json").write_text(format_json({**status, "state": "running"}))
    again = door.run(*RUN)
    assert again.returncode == 0, again.stderr
    assert "stopped early at step" in again.stdout
    assert (run / "logs/metrics.jsonl").read_bytes() == lines
    more = door.run(f"dir={run}", "stop.patience=9", f"train.steps={step + 7}")
    assert more.returncode == 0, more.stderr
    assert "warning: changed: stop.patience: 3 → 9" in more.stdout
    found = read_status(run)
    assert (found["step"], found["state"], "stopped_early" in found) == (step + 7, "finished", False)
    assert (run / "logs/metrics.jsonl").read_bytes().startswith(lines)
