"""The laws of trouble: a loss that is not finite, a step that crashes, a step that hangs. Each fault is planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Door, assert_same, checkpoint, plant

pytestmark = pytest.mark.forked

RUN = (
    *("model=mlp", "data=digits", "data.batch_size=16", "model.num_layers=2", "model.width=32", "train.steps=60"),
    *("train.log_steps=10", "train.eval_steps=20", "ckpt=periodic", "ckpt.save.periodic.steps=8", "retention=all"),
    "log.tensorboard=false",
)
# {when} sees `number`, which counts batches from 0: step n is made of batch n - 1.
FAULT = """
import data.pipeline as module
original = module.ShuffledBatches.__getitem__
def faulty(self, number):
    batch = original(self, number)
    if {when}:
        {what}
    return batch
module.ShuffledBatches.__getitem__ = faulty
"""
NAN = "batch = {**batch, 'inputs': batch['inputs'] * float('nan')}"


def fault(when: str, what: str) -> str:
    return FAULT.format(when=when, what=what)


def status(door: Door) -> dict[str, Any]:
    return json.loads((door.the_run / "status.json").read_text())


def lines(door: Door) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]


def steps(door: Door, split: str) -> list[int]:
    logged = [json.loads(line) for line in (door.the_run / "logs/metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in logged if line["split"] == split]


def test_a_poisoned_batch_is_skipped_after_going_back(door: Door, make_door: Any, tmp_path: Path) -> None:
    poisoned = plant(tmp_path, fault("number == 32", NAN))
    done = door.run(*RUN, **poisoned)
    assert done.returncode == 0, done.stderr
    assert "step 33: loss is nan: going back" in done.stdout
    assert "restored step 32" in done.stdout
    assert status(door)["skipped"] == [{"batch": 32, "step": 33, "why": "step 33: loss is nan"}]
    assert [line["rollbacks"] for line in lines(door)] == [1]
    assert steps(door, "train") == [10, 20, 30, 40, 50, 60]
    assert steps(door, "eval") == [20, 40, 60]
    last = checkpoint(door.the_run / "checkpoints/60")
    assert last["progress"]["position"] == {"next_index": 61}  # one batch was passed over

    # Killed between the rollback and the next checkpoint: the same batch is skipped, and the end is the same.
    other = make_door("poisoned-and-killed")
    environment = plant(other.cwd, fault("number == 32", NAN) + KILL_ONCE.format(number=36, folder=str(other.cwd)))
    process = other.run(*RUN, **environment)
    assert process.returncode == -9, (process.returncode, process.stdout, process.stderr)
    assert status(other)["skipped"][0]["batch"] == 32
    assert other.run(*RUN, **environment).returncode == 0
    assert_same(other.the_run, door.the_run, 60)


KILL_ONCE = """
import os, pathlib, signal
poisoned = module.ShuffledBatches.__getitem__
landed = pathlib.Path({folder!r}) / "landed"
seen = []
def deadly(self, number):
    seen.append(number)
    if seen.count({number}) == 2 and not landed.exists():
        landed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return poisoned(self, number)
module.ShuffledBatches.__getitem__ = deadly
"""


def test_a_loss_that_stays_bad_ends_with_4(door: Door, tmp_path: Path) -> None:
    done = door.run(*RUN, **plant(tmp_path, fault("number >= 32", NAN)))
    assert done.returncode == 4, (done.stdout, done.stderr)
    assert "error: step 33: loss is nan; batch 35; 3 of 3 rollbacks are used up" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    now = status(door)
    assert (now["state"], now["step"], [skipped["batch"] for skipped in now["skipped"]]) == (
        "diverged",
        32,
        [32, 33, 34],
    )
    kept = sorted(int(path.name) for path in (door.the_run / "checkpoints").glob("[0-9]*"))
    assert max(kept) == 32  # nothing that is not finite was saved
    assert door.run(*RUN, "train.max_rollbacks=0", **plant(tmp_path, fault("number >= 32", NAN))).returncode == 4
    # The cause is gone, and so much patience is allowed: the same run goes on.
    done = door.run(*RUN, "train.max_rollbacks=4")
    assert done.returncode == 0, done.stderr
    assert steps(door, "train") == [10, 20, 30, 40, 50, 60]


def test_poisoned_parameters_are_never_saved(door: Door, tmp_path: Path) -> None:
    """The loss of the step that overflows is finite still: only a look at the parameters tells."""
    planted = """
import runner.train.step as module
original = module.make_train_step
def poisoned(*words):
    import jax
    step = original(*words)
    def train_step(state, batch, lr):
        new, metrics = step(state, batch, lr)
        bad = jax.numpy.where(state["step"] == 31, jax.numpy.inf, 1.0)
        return {**new, "params": jax.tree.map(lambda leaf: leaf * bad, new["params"])}, metrics
    return train_step
module.make_train_step = poisoned
"""
    done = door.run(*RUN, "train.max_rollbacks=0", **plant(tmp_path, planted))
    assert done.returncode == 4
    assert "step 32: the parameters are not finite" in done.stderr
    assert max(int(path.name) for path in (door.the_run / "checkpoints").glob("[0-9]*")) == 24


@pytest.mark.slow
def test_the_same_crash_is_not_repeated_for_ever(door: Door, untouched: Any, tmp_path: Path) -> None:
    broken = plant(tmp_path, fault("number == 32", "raise RuntimeError('boom')"))
    tried = [door.run(*RUN, **broken) for _ in range(5)]
    assert [done.returncode for done in tried] == [1] * 5
    assert all("RuntimeError: boom" in done.stderr for done in tried[:4])
    assert "training failed here several times: going back from step 32 to step 24" in tried[3].stdout
    assert [line.get("stepped_back") for line in lines(door)] == [None, None, None, 32]
    assert "failed 4 times in a row after step 32, the last time from an older checkpoint" in tried[4].stderr
    assert len(tried[4].stderr.strip().splitlines()) == 1
    assert "Traceback" not in tried[4].stderr
    assert len(lines(door)) == 4  # the fifth time nothing was tried
    assert status(door)["gave_up"] is True
    assert "RuntimeError: boom" in (door.the_run / "logs/run.log").read_text()
    reference = untouched(*RUN)
    done = door.run(*RUN, "train.max_crashes=5")  # the cause is gone
    assert done.returncode == 0, done.stderr
    assert_same(door.the_run, reference.the_run, 60)
    assert "gave_up" not in status(door)


def test_a_step_that_hangs_ends_with_1_and_the_stacks(door: Door, tmp_path: Path) -> None:
    hanging = plant(tmp_path, fault("number == 32", "__import__('time').sleep(600)"))
    done = door.run(*RUN, "train.hang_seconds=2", **hanging)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "no sign of life for 2 s during data, after step 3" in done.stdout
    log = (door.the_run / "logs/run.log").read_text()
    assert "in faulty" in log  # the frame that hangs
    assert "Thread" in log
    (line,) = lines(door)
    assert line["ending"] == "failed"
    assert 30 <= line["to_step"] <= 32  # two steps may be under way
    assert door.run(*RUN).returncode == 0


def test_a_long_evaluation_is_no_hang(door: Door, tmp_path: Path) -> None:
    planted = """
import time
import data.pipeline as module
original = module.iterate_in_order
def slow(*words, **options):
    for batch in original(*words, **options):
        time.sleep(0.6)
        yield batch
module.iterate_in_order = slow
"""
    done = door.run(
        *RUN, "train.hang_seconds=4", "train.eval_steps=60", "train.eval_batches=8", **plant(tmp_path, planted)
    )
    assert done.returncode == 0, (done.stdout, done.stderr)


@pytest.mark.parametrize("ending", ["failed", "preempted", "killed", "finished"])
def test_what_counts_as_the_same_failure(ending: str) -> None:
    from runner.rundir.crash_loop import find_repeated_failure

    def line(step: int, ending: str = "failed", code: str = "a", **more: Any) -> dict[str, Any]:
        return {"from_step": 10, "to_step": step, "ending": ending, "code": code, "why": "boom", **more}

    assert find_repeated_failure([], "a") is None
    assert find_repeated_failure([line(33)] * 2, "b") is None  # other code
    again = find_repeated_failure([line(20), line(33), line(33)], "a")
    assert again is not None
    assert (again.step, again.count, again.move(3), again.move(2), again.move(1)) == (
        33,
        2,
        "try",
        "step back",
        "give up",
    )
    between = find_repeated_failure([line(33), line(31, ending), line(33)], "a")
    assert between is not None
    assert between.count == {"failed": 1, "finished": 1}.get(ending, 2)
    back = find_repeated_failure([line(33), line(33), line(25, "killed", stepped_back=32)], "a")
    assert back is not None
    assert back.move(2) == "try"  # it was killed before it could show whether that helped
