"""A teacher is a constant of every step: not in the state, not in a checkpoint, and the same one after a restart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Door, assert_same

pytestmark = pytest.mark.forked

SHORT = ("log.tensorboard=false", "train.eval_batches=2", "train.log_steps=1", "train.eval_steps=10")
MLP = ("data=digits", "model=mlp", "model.num_layers=1")
EVERY = ("ckpt=periodic", "ckpt.save.periodic.steps=10", "retention=all")
STUDENT = (*MLP, "model.width=8", "objective=distill", "train.microbatches=2", "train.steps=20", *EVERY, *SHORT)


@pytest.fixture
def teacher(door: Door) -> Path:
    """A run of twenty steps, two checkpoints of it kept."""
    done = door.run(*MLP, "model.width=16", "train.steps=20", "name=teacher", *EVERY, *SHORT)
    assert done.returncode == 0, done.stderr
    (run,) = (door.cwd / "outputs/teacher").iterdir()
    return run


def test_it_is_the_same_one_after_a_restart_and_in_no_checkpoint(teacher: Path, door: Door) -> None:
    chosen = f"objective.teacher={teacher}@best"
    for name in ("whole", "halves"):
        first = ("train.steps=20",) if name == "whole" else ("train.steps=10",)
        # A warm-up of so many steps, whatever the length: both begin alike.
        done = door.run(*STUDENT, chosen, f"name={name}", "schedule=constant", "schedule.warmup_steps=2", *first)
        assert done.returncode == 0, done.stderr
    whole, halves = (next((door.cwd / "outputs" / name).iterdir()) for name in ("whole", "halves"))
    # Its best is another one by now: the student stays with the one it has begun with.
    best = teacher / "checkpoints/best"
    other = "10" if best.resolve().name == "20" else "20"
    best.unlink()
    best.symlink_to(other)
    done = door.run(f"dir={halves}", "train.steps=20")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line)["teacher"] for line in (halves / "attempts.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert_same(whole, halves, 20)
    table = json.loads((whole / "checkpoints/20/holdfast.json").read_text())
    assert {name.partition(".")[0] for name in table["arrays"]} == {"params", "opt", "rng", "step"}
    # What was taught needs no teacher any more.
    shutil.move(teacher, door.cwd / "gone")
    from runner import load

    model, _ = load(str(whole))
    assert model is not None
    gone = door.run(f"dir={halves}", "train.steps=30")
    assert gone.returncode == 3
    assert "error: objective.teacher: " in gone.stderr


def test_one_that_was_tuned_teaches_as_the_whole_model(teacher: Path, door: Door) -> None:
    """Its adapters are in its checkpoint, and the rest of it is not."""
    tuned = door.run(
        *MLP, "model.width=16", f"init_from={teacher}", "tune=lora", "train.steps=20", "name=tuned", *EVERY, *SHORT
    )
    assert tuned.returncode == 0, tuned.stderr
    (run,) = (door.cwd / "outputs/tuned").iterdir()
    done = door.run(*STUDENT, f"objective.teacher={run}@20", "name=student")
    assert done.returncode == 0, done.stderr


def test_other_weights_are_refused(teacher: Path, door: Door) -> None:
    assert door.run(*STUDENT, f"objective.teacher={teacher}@20", "name=student").returncode == 0
    (run,) = (door.cwd / "outputs/student").iterdir()
    shutil.rmtree(teacher)
    again = door.run(*MLP, "model.width=16", "train.steps=20", "seed=1", "name=other", *EVERY, *SHORT)
    assert again.returncode == 0, again.stderr
    shutil.copytree(next((door.cwd / "outputs/other").iterdir()), teacher, symlinks=True)
    done = door.run(f"dir={run}", "train.steps=30")
    assert done.returncode == 3
    assert "is not what this run was trained with: its weights have changed" in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("data=digits", "model=mlp", "objective.teacher=nowhere@best"), 3, "nowhere"),
        (
            ("data=synthetic", "data.gives=features", "data.num_features=32", "model=mlp"),
            2,
            "choose a teacher of the same data",
        ),
        (("data=digits", "model=vae"), 2, "objective=distill"),
        (("data=digits", "model=mlp", "train.parts=2"), 2, "does not train in parts"),
        (("data=digits", "model=mlp", "objective.teacher=s3://bucket/x/y@best"), 2, "copy that run here first"),
    ],
)
def test_what_cannot_teach_is_refused_and_nothing_is_left(
    words: tuple[str, ...], code: int, said: str, teacher: Path, door: Door
) -> None:
    done = door.run(
        "objective=distill", f"objective.teacher={teacher}@best", *words, *SHORT, "name=student", "train.steps=2"
    )
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert not [*(door.cwd / "outputs").glob("student/*/checkpoints/*")]
