"""The law: a stop is seen wherever a run may be, loses no completed step, and the same command goes on bit for bit.

What lasts milliseconds is made to last longer by a planted `sitecustomize`, so that the signal surely falls into it; the
run's own sign of life (runner/rundir/heartbeat.py) says when it is there.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.preempt.deadline import SaveBudget
from runner.preempt.stop import StopFlag, Stopped
from runner.rundir import heartbeat
from tests.conftest import REPO, SMALL, Door, assert_same, plant

pytestmark = pytest.mark.forked

RUN = (*SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=7")
SLOW = """
def slowed():
    import time
    import {module} as module
    original = module.{name}
    def slow(*words, **options):
        open('there', 'w').close()
        time.sleep({seconds})
        return original(*words, **options)
    module.{name} = slow
slowed()
"""
SLOW_EVALUATION = """
import time
import data.pipeline as module
original = module.iterate_in_order
def slow(*words, **options):
    for batch in original(*words, **options):
        open('there', 'w').close()
        time.sleep(0.5)
        yield batch
module.iterate_in_order = slow
"""
SLOW_FIRST_STEP = """
import time
import runner.train.loop as module
original = module.PendingSteps.add
def slow(self, step, metrics):
    original(self, step, metrics)
    if step == 1:
        open('there', 'w').close()
        time.sleep(1.0)
module.PendingSteps.add = slow
"""
SLOW_DATA = """
import dataclasses, time
import data.text_files as module
original = module.read_text
class Slow:
    def __init__(self, source): self.source, self.count = source, 0
    def __len__(self): return len(self.source)
    def take(self, indices):
        self.count += 1
        # The first look, at what the examples are, is no batch.
        if self.count == 13:
            open('there', 'w').close()
            time.sleep(600)
        return self.source.take(indices)
def slow(*words):
    sources = original(*words)
    return dataclasses.replace(sources, train=Slow(sources.train), waits=True)
module.read_text = slow
"""


def slow(module: str, name: str, seconds: float) -> str:
    return SLOW.format(module=module, name=name, seconds=seconds)


# where: (what is planted, the phase of the training thread, that of the writing thread)
PLACES = {
    "compiling": (slow("runner.train.compile", "compile_step", 600), "compile", ""),
    "the first step": (SLOW_FIRST_STEP, "step", ""),
    "an evaluation": (SLOW_EVALUATION, "eval", ""),
    "slow data": (SLOW_DATA, "data", ""),
    "a save": (slow("runner.checkpoint.seal", "seal_checkpoint", 1.0), "save", "seal"),
    "a restore": (slow("runner.checkpoint.store", "read_state", 600), "restore", ""),
}
# In the short form three of them: jax compiles, training goes on, a checkpoint is on its way.
IN_SHORT = ("compiling", "an evaluation", "a save")
SOME_PLACES = [pytest.param(each, marks=() if each in IN_SHORT else pytest.mark.slow) for each in PLACES]


@pytest.fixture(scope="session")
def reference(untouched: Callable[..., Door]) -> Door:
    return untouched(*RUN)


def wait_until(process: subprocess.Popen[str], door: Door, phase: str, writing: str = "") -> None:
    """Until what is planted is there, and the run is in this phase and has been for a moment."""
    while not (door.cwd / "there").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    while True:
        assert process.poll() is None, process.communicate()
        for path in door.cwd.glob("outputs/*/*/.pulse"):
            beat = heartbeat.read_heartbeat(path)
            if beat and (beat.phase, beat.writing) == (phase, writing) and time.time() - beat.since > 0.05:
                return
        time.sleep(0.001)


@pytest.mark.parametrize("where", SOME_PLACES)
def test_a_stop_is_seen_and_loses_nothing(where: str, door: Door, reference: Door, tmp_path: Path) -> None:
    planted, phase, writing = PLACES[where]
    if where == "a restore":
        door.kill_at(20, *RUN)
    process = door.start(*RUN, **plant(tmp_path, planted))
    wait_until(process, door, phase, writing)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 75, (process.returncode, out, err)
    assert "stopped by SIGTERM" in out
    run = door.the_run
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    line = json.loads((run / "attempts.jsonl").read_text().splitlines()[-1])
    assert (line["ending"], line["lost_steps"], line["to_step"]) == ("preempted", 0, status["step"])
    beat = heartbeat.read_heartbeat(run / ".pulse")
    assert beat is not None
    if status["step"]:
        assert beat.step <= status["step"]
        checked = subprocess.run(
            [sys.executable, "-m", "runner", "verify", str(run), "--all"], cwd=REPO, capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout
        assert f"step {status['step']:>6}  ok" in checked.stdout
    else:
        assert where == "compiling"
        assert not list((run / "checkpoints").glob("[0-9]*"))
    done = door.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert_same(run, reference.the_run, 60)


@pytest.mark.parametrize("where", SOME_PLACES)
def test_a_second_signal_leaves_at_once_wherever_it_is(where: str, door: Door, tmp_path: Path) -> None:
    """What is planted would last ten minutes: whoever waits for it hangs here."""
    planted, phase, writing = PLACES[where]
    for seconds in ("sleep(0.5)", "sleep(1.0)"):
        planted = planted.replace(seconds, "sleep(600)")
    if where == "a restore":
        door.kill_at(20, *RUN)
    process = door.start(*RUN, **plant(tmp_path, planted))
    wait_until(process, door, phase, writing)
    process.send_signal(signal.SIGTERM)
    if where in ("the first step", "a save"):  # elsewhere the first one is enough, and it is gone
        process.send_signal(signal.SIGTERM)  # as `timeout` does: the same wish, told twice
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert process.returncode == 128 + signal.SIGTERM, (process.returncode, out, err)
        assert "leaving at once" in err
    else:
        assert process.wait() == 75


def test_a_save_that_cannot_make_it_is_not_begun(door: Door, tmp_path: Path, reference: Door) -> None:
    """A warning with numbers once it is known what a save takes; at the notice the newest checkpoint is enough."""
    planted = slow("runner.checkpoint.seal", "seal_checkpoint", 5.0) + SLOW_DATA
    process = door.start(*RUN, "preempt.notice_seconds=2", **plant(tmp_path, planted))
    wait_until(process, door, "data")  # of step 12; step 7 is saved
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 75, (out, err)
    assert "warning: a checkpoint takes 5." in out
    assert "SIGTERM (preempt.notice_seconds) leaves 2 s" in out
    assert "at step 11 of 60, checkpoint 7 stands, 4 steps are lost (a save takes 5." in out
    line = json.loads((door.the_run / "attempts.jsonl").read_text().splitlines()[-1])
    assert (line["ending"], line["to_step"], line["lost_steps"]) == ("preempted", 11, 4)
    assert door.run(*RUN).returncode == 0
    assert_same(door.the_run, reference.the_run, 60)


def test_a_save_in_hand_is_finished_and_a_hopeless_one_not_begun() -> None:
    stop_flag, told = StopFlag(), []
    grace = SaveBudget(stop_flag, (30.0, "SIGTERM"), told.append, None)
    grace.raise_if_hopeless()  # nothing is known and nothing is asked
    grace.record_save(12.0)
    stop_flag.request_stop("SIGTERM", 10.0)
    grace.raise_if_hopeless()  # it may make it: a try costs nothing
    assert told == []
    grace.record_save(40.0)
    grace.record_save(41.0)
    assert len(told) == 1
    assert "takes 40 s" in told[0]
    assert "SIGTERM leaves 30 s" in told[0]
    with pytest.raises(Stopped, match=r"a save takes 41 s and (10|9\.\d+) s are left"):
        grace.raise_if_hopeless()


def test_time_that_is_up_ends_what_cannot_be_interrupted(door: Door, tmp_path: Path, reference: Door) -> None:
    """A step that never ends: the newest checkpoint stands, and the exit says how many steps are lost."""
    planted = SLOW_FIRST_STEP.replace("step == 1:", "step == 33:").replace("sleep(1.0)", "sleep(600)")
    process = door.start(*RUN, "preempt.notice_seconds=2", **plant(tmp_path, planted))
    while True:
        beat = next((heartbeat.read_heartbeat(path) for path in door.cwd.glob("outputs/*/*/.pulse")), None)
        if beat and beat.step >= 30 and time.time() - beat.changed > 0.3:
            break
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 75, (process.returncode, out, err)
    assert "time was up during step at step 30" in out or "time was up during step at step 3" in out, out
    assert "checkpoint 28 stands" in out
    line = json.loads((door.the_run / "attempts.jsonl").read_text().splitlines()[-1])
    assert line["ending"] == "preempted"
    assert line["lost_steps"] == line["to_step"] - 28 > 0
    assert door.run(*RUN).returncode == 0
    assert_same(door.the_run, reference.the_run, 60)
