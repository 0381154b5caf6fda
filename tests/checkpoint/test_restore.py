"""Every way to go on from a checkpoint, through the door: the newest, a step, the best, another run's, an older format."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.checkpoint.record import READABLE_FORMATS, list_records, list_steps, read_sidecar
from tests.conftest import REPO, Door, assert_same, checkpoint, fail_loudly
from tests.laws.faults import Forks

pytestmark = pytest.mark.forked

# Losses fall and the score asks for the highest: so the best is early, and the newest is not it.
FAST = (
    *("model=mlp", "data=synthetic", "data.gives=features", "data.size=64", "data.num_features=8", "data.batch_size=8"),
    *("model.width=16", "model.dropout=0.1", "train.steps=40", "train.eval_steps=5", "train.eval_batches=2"),
    *("ckpt.save.periodic.steps=10", "retention=all", "log.tensorboard=false", "score.mode=max"),
)


@pytest.fixture(scope="module")
def finished(make_door: Callable[..., Door], served: Forks) -> Door:
    door = make_door("finished", served)
    done = door.run(*FAST)
    assert done.returncode == 0, done.stderr
    return door


@pytest.fixture
def copied(finished: Door, door: Door) -> Door:
    """The finished run in a directory of its own, to be changed."""
    shutil.copytree(finished.cwd / "outputs", door.cwd / "outputs", symlinks=True)
    return door


def best_step(run: Path) -> int:
    return int((run / "checkpoints/best").readlink().name)


def planted(door: Door, code: str) -> dict[str, str]:
    """The environment in which a process runs this code before anything else."""
    (door.cwd / "sitecustomize.py").write_text(fail_loudly(code))
    return {"PYTHONPATH": f"{door.cwd}{os.pathsep}{REPO}"}


def test_the_best_is_not_the_newest_here(finished: Door) -> None:
    assert best_step(finished.the_run) < 40


def test_a_run_is_taken_back_once_and_ends_as_it_would_have(copied: Door, finished: Door) -> None:
    back = copied.run(*FAST, "step=20")
    assert back.returncode == 0, back.stderr
    assert "taken back to step 20: " in back.stdout
    assert "restored step 20 " in back.stdout
    assert_same(copied.the_run, finished.the_run, 40)
    aside = {path.name.split("-")[0] for path in (copied.the_run / "quarantine").iterdir()}
    assert {"30", "40"} <= aside
    again = copied.run(*FAST, "step=20")  # the same command goes on: here it has nothing left to do
    assert again.returncode == 0
    assert "is finished: 40 steps" in again.stdout
    further = copied.run(f"dir={copied.the_run}", "step=20", "train.steps=50")
    assert "was taken back to step 20 already: going on from the newest" in further.stdout
    assert "restored step 40 " in further.stdout
    assert copied.run(f"dir={copied.the_run}", "train.steps=60").returncode == 0  # without step=, all is forgotten
    assert "taken back to step 20: " in copied.run(f"dir={copied.the_run}", "step=20", "train.steps=60").stdout


def test_the_best_can_be_gone_back_to(copied: Door, finished: Door) -> None:
    best = best_step(copied.the_run)
    done = copied.run(*FAST, "step=best")
    assert f"restored step {best} " in done.stdout
    assert_same(copied.the_run, finished.the_run, 40)


def test_a_step_that_is_not_there_or_not_good_fails_loudly_and_changes_nothing(copied: Door) -> None:
    data = max((copied.the_run / "checkpoints/20").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1])
    before = list_steps(copied.the_run / "checkpoints")
    for step, said in {"20": "bytes instead of", "77": "has no checkpoint '77'; it has 5, 10,"}.items():
        done = copied.run(*FAST, f"step={step}")
        assert done.returncode == 3, done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert list_steps(copied.the_run / "checkpoints") == before
    assert not (copied.the_run / "quarantine").exists()


def test_weights_of_another_run_begin_a_new_one(copied: Door) -> None:
    source = copied.the_run
    done = copied.run(*FAST, "name=warm", "train.steps=5", f"init_from={source}@best")
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/{best_step(source)}: 6 arrays as they are" in done.stdout
    (warm,) = copied.cwd.glob("outputs/warm/*/config.yaml")
    cold = copied.run(*FAST, "name=cold", "train.steps=5")
    assert cold.returncode == 0
    shutil.rmtree(source)  # a run that has begun needs it no more
    more = copied.run(f"dir={warm.parent}", "train.steps=8")
    assert more.returncode == 0, more.stderr
    assert "restored step 5 " in more.stdout


def test_weights_that_do_not_fit_are_refused_and_nothing_is_left(copied: Door) -> None:
    before = copied.tree()
    done = copied.run(*FAST, "name=warm", "model.width=8", f"init_from={copied.the_run}")
    assert done.returncode == 3
    assert "do not fit this model: params.head.kernel is reshaped: float32[16, " in done.stderr
    assert "init_from.partial=true" in done.stderr
    assert copied.run(*FAST, "name=warm", f"init_from={copied.the_run}@77").returncode == 3
    assert copied.run(*FAST, "name=warm", "init_from=nowhere").returncode == 3
    assert copied.tree() == before


def test_a_layer_can_be_added_and_the_old_weights_kept(copied: Door) -> None:
    source = copied.the_run
    done = copied.run(
        *FAST, "name=more", "model.num_layers=3", "train.steps=1", f"init_from={source}", "init_from.partial=true"
    )
    assert done.returncode == 0, done.stderr
    assert "missing there, fresh here: params.hidden.2.linear.bias float32[16], params.hidden.2." in done.stdout
    grown = copied.run(
        *FAST, "name=gone", "model.num_layers=1", "train.steps=1", f"init_from={source}", "init_from.partial=true"
    )
    assert "unexpected, left there: params.hidden.1." in grown.stdout


def test_weights_are_taken_bit_for_bit(copied: Door) -> None:
    """A step with a learning rate of almost nothing leaves them as they were, to rounding."""
    import numpy as np

    source = copied.the_run
    done = copied.run(
        *FAST, "name=same", "train.steps=1", "optim.lr=1e-30", "optim.weight_decay=0", f"init_from={source}@40"
    )
    assert done.returncode == 0, done.stderr
    (same,) = copied.cwd.glob("outputs/same/*/checkpoints/1")
    mine, theirs = checkpoint(same), checkpoint(source / "checkpoints/40")
    weights = [name for name in theirs if name.startswith("['params']")]
    assert len(weights) == 6
    assert all(np.array_equal(mine[name], theirs[name]) for name in weights)


def test_a_finished_run_can_end_on_its_best_weights(door: Door, finished: Door) -> None:
    done = door.run(*FAST, "train.final=best")
    assert done.returncode == 0, done.stderr
    best = best_step(door.the_run)
    (record,) = (record for record in list_records(door.the_run / "checkpoints") if record.step == best)
    assert f"ends on the best weights, of step {best}: " in done.stdout
    assert f"loss {record.metrics['eval/loss']:.4f}" in done.stdout.split("ends on the best weights")[1].splitlines()[0]
    status = json.loads((door.the_run / "status.json").read_text())
    assert status["final_step"] == best
    assert_same(door.the_run, finished.the_run, 40)  # training is what it would have been


def test_a_model_that_has_changed_is_refused_with_the_difference(copied: Door) -> None:
    """Same configuration, other code: only the checkpoint can tell."""
    environment = planted(
        copied,
        "import models\n"
        "build = models.Mlp.build\n"
        "def changed(self, *args, **kwargs):\n"
        "    import jax.numpy as jnp; from flax import nnx\n"
        "    model = build(self, *args, **kwargs)\n"
        "    model.scale = nnx.Param(jnp.ones(3))\n"
        "    return model\n"
        "models.Mlp.build = changed\n",
    )
    before = list_steps(copied.the_run / "checkpoints")
    done = copied.run(f"dir={copied.the_run}", "train.steps=50", **environment)
    assert done.returncode == 3
    assert "checkpoint 40: opt." in done.stderr
    assert "is absent on disk and float32[3] in this configuration (and 2 more)" in done.stderr
    assert "init_from=RUN init_from.partial=true" in done.stderr
    assert list_steps(copied.the_run / "checkpoints") == before
    assert copied.run(f"dir={copied.the_run}", "train.steps=50").returncode == 0  # with the old code it goes on


def test_an_exception_leaves_a_checkpoint_that_only_step_goes_back_to(door: Door) -> None:
    command = (*FAST, "ckpt=on_error", "ckpt.write=blocking", "train.eval_steps=20")
    environment = planted(
        door,
        "import os, runner.values\n"
        "if os.environ.get('BREAK'):\n"
        "    import runner.train.step as steps\n"
        "    real = steps.make_eval_step\n"
        "    def broken(*args):\n"
        "        raise KeyError('boom')\n"
        "    steps.make_eval_step = lambda *args: broken\n",
    )
    broken = door.run(*command, "ckpt.save.periodic.steps=7", BREAK="1", **environment)
    assert broken.returncode == 1
    assert "left checkpoint 20 to look at, marked; step=20 restores it" in broken.stdout
    marked = read_sidecar(door.the_run / "checkpoints/20")[0]
    assert (marked.mark, marked.reason) == ("error", "error after step 20: KeyError: 'boom'")
    copy = door.cwd / "copy"
    shutil.copytree(door.the_run, copy, symlinks=True)
    healed = door.run(*command, "ckpt.save.periodic.steps=7")
    assert healed.returncode == 0, healed.stderr
    assert "checkpoint 20 is passed over (error after step 20: KeyError: 'boom')" in healed.stdout
    assert "restored step 14 " in healed.stdout
    assert read_sidecar(door.the_run / "checkpoints/20")[0].mark == ""  # done again, and saved as the best so far
    asked = door.run(f"dir={copy}", "step=20")
    assert asked.returncode == 0, asked.stderr
    assert "restored step 20 (saved: error after step 20: KeyError: 'boom')" in asked.stdout
    mine, theirs = (checkpoint(path / "checkpoints/40") for path in (copy, door.the_run))
    assert all(
        str(mine[name]) == str(theirs[name]) for name in theirs if name != "progress"
    )  # only that eval is missing


@pytest.mark.parametrize("number", READABLE_FORMATS)
def test_a_run_of_each_format_goes_on(door: Door, number: int) -> None:
    run = Path(shutil.copytree(REPO / f"tests/fixtures/format{number}", door.cwd / "old"))
    done = door.run(f"dir={run}", "train.steps=24")
    assert done.returncode == 0, done.stderr
    assert "restored step 20 " in done.stdout
    assert "finished 24 steps" in done.stdout
    assert not (run / "quarantine").exists()
