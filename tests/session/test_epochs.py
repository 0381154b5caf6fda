"""A run of so many epochs: bit for bit the run of as many steps, also where it is killed and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import Door, assert_same
from tests.laws.faults import Forks

# 1,437 examples to train on in batches of 64: 2.5 epochs are 56.1 batches, so 57 steps.
RUN = (
    *(
        "model=mlp",
        "data=digits",
        "model.width=16",
        "train.log_steps=3",
        "train.eval_steps=10",
        "log.tensorboard=false",
    ),
    *("schedule=cosine", "ckpt.save.periodic.steps=7"),
)
STEPS = 57


def test_epochs_are_steps(tmp_path: Path, served: Forks) -> None:
    doors = [Door(tmp_path / name, served) for name in ("steps", "epochs")]
    for door in doors:
        door.cwd.mkdir()
    by_steps, by_epochs = doors
    assert by_steps.run(*RUN, f"train.steps={STEPS}").returncode == 0
    by_epochs.kill_at(21, *RUN, "train.epochs=2.5")
    status = json.loads((by_epochs.the_run / "status.json").read_text())
    assert status["steps"] == STEPS
    done = by_epochs.run(*RUN, "train.epochs=2.5")
    assert done.returncode == 0, done.stderr
    assert "train.epochs=2.5: 57 steps of 64 of 1,437 training examples" in done.stdout
    assert_same(by_epochs.the_run, by_steps.the_run, STEPS)
    # Finished: told from data.json, without reading the data or starting jax.
    again = by_epochs.run(*RUN, "train.epochs=2.5")
    assert f"is finished: {STEPS} steps" in again.stdout
    # Longer, by either key; the other one that the run was begun with is not in the way.
    run = by_epochs.the_run
    more = by_epochs.run(f"dir={run}", "train.epochs=2.6")
    assert (more.returncode, json.loads((run / "status.json").read_text())["step"]) == (0, 59), more.stderr
    more = by_epochs.run(f"dir={run}", "train.steps=61")
    assert (more.returncode, json.loads((run / "status.json").read_text())["step"]) == (0, 61), more.stderr
