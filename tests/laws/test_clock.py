"""The law: a clock that is set, between attempts or while training, changes no result and makes no command fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.__main__ import main
from runner.inspect.goodput_table import read_account
from runner.rundir.attempt_lines import count_interruptions, read_attempts
from runner.rundir.layout import RunDir
from tests.conftest import Door, assert_same, plant

STEPS = 40
RUN = (
    *("model=mlp", "data=digits", "model.width=16", f"train.steps={STEPS}", "train.eval_steps=10", "train.log_steps=2"),
    *("ckpt=adaptive", "retention=time", "log.tensorboard=false"),
)
YEARS = 365 * 86400.0
# Longer than any attempt took, and shorter than any jump.
LONG = 1000.0
# Both clocks that Python has: `time.time`, and the `datetime` by which lines are dated.
CLOCK = """
import datetime, os, signal, time
import runner.text
import runner.train.loop as module
real, shift = time.time, {shift}
time.time = lambda: real() + shift
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(time.time(), tz)
runner.text.datetime = Shifted
original = module.PendingSteps.add
def jump(self, step, metrics):
    global shift
    original(self, step, metrics)
    if step == {at}:
        shift += {jump}
    if step == {at} + 4 and {number}:
        os.kill(os.getpid(), {number})
module.PendingSteps.add = jump
"""
VERBS = (["ls"], ["show"], ["why"], ["verify"], ["goodput"], ["prune", "--dry-run"])


def clock(folder: Path, shift: float, jump: float = 0.0, at: int = 0, number: int = 0) -> dict[str, str]:
    """The environment of a run whose clock is wrong, is set at a step, and which gets a signal four steps later."""
    return plant(folder, CLOCK.format(shift=shift, jump=jump, at=at, number=number))


def test_a_clock_that_is_set_again_and_again(door: Door, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Set back by ten years and killed; begun twenty years ago, set forward by thirty and stopped; set back again."""
    reference = Door(tmp_path / "reference")
    reference.cwd.mkdir()
    assert reference.run(*RUN).returncode == 0

    killed = door.run(*RUN, **clock(tmp_path, 0.0, -10 * YEARS, 12, 9))
    assert killed.returncode == -9, killed.stderr
    stopped = door.run(*RUN, **clock(tmp_path, -20 * YEARS, 30 * YEARS, 22, 15))
    assert (stopped.returncode, "Traceback" in stopped.stderr) == (75, False), stopped.stderr
    done = door.run(*RUN, **clock(tmp_path, 0.0, -10 * YEARS, 32))
    assert done.returncode == 0, done.stderr

    said = re.search(r"finished 40 steps in (\S+) s", done.stdout)
    assert said is not None
    assert 0.0 < float(said[1]) < LONG
    assert stopped.stdout.count("the clock of this machine was set forward by") == 1
    assert done.stdout.count("the clock of this machine was set back by") == 1
    assert_same(door.the_run, reference.the_run, STEPS)

    run = RunDir(door.the_run)
    for line in read_attempts(run):
        assert all(0.0 <= spent < LONG for spent in line["seconds"].values()), line
        assert 0.0 <= line.get("first_step_seconds", 0.0) < LONG
    count, worked = count_interruptions(run)
    assert (count, 0.0 < worked < LONG) == (1, True)
    account = read_account(run)
    assert [span.number for span in account.spans] == [1, 2, 3]
    assert 0 < account.clock < LONG * 1000
    for verb in VERBS:
        assert main([verb[0], str(run), *verb[1:]]) == 0, verb
    assert main(["report", str(run), "--to", str(tmp_path / "page.html")]) == 0
    assert "-" not in re.findall(r"goodput .*", capsys.readouterr().out)[-1]
