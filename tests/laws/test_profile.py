"""The law: tracing looks at steps and does not touch them; a trace is there as a whole or not at all."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.profiling.profile_record import HIDDEN, list_profiles
from runner.rundir.layout import RunDir
from tests.conftest import SMALL, Door, assert_same
from tests.laws.faults import Forks

SAVES = ("ckpt.save.periodic.steps=7",)
TRACED = (*SMALL, *SAVES, "profile={start: 20, steps: 20}")


@pytest.fixture(scope="module")
def plain(untouched: Callable[..., Door]) -> Door:
    """An uninterrupted run without a trace."""
    return untouched(*SMALL, *SAVES)


def windows(run: Path) -> list[tuple[int, int]]:
    found = list_profiles(RunDir(run).profile)
    assert all(record.summary and list(record.folder.glob("plugins/profile/*/*.xplane.pb")) for record in found)
    return [(record.window.first, record.window.last) for record in found]


def test_a_traced_run_is_the_same_run(served: Forks, door: Door, plain: Door) -> None:
    done = served.run(door.cwd, *TRACED)
    assert done.returncode == 0, done.stdout
    assert door.the_run.name.rpartition("-")[2] == plain.the_run.name.rpartition("-")[2]
    assert_same(door.the_run, plain.the_run, 60)
    assert windows(door.the_run) == [(20, 39)]
    (record,) = list_profiles(RunDir(door.the_run).profile)
    assert record.summary is not None
    assert record.summary.shares["matmul"] > 0
    # Operations of the step alone, and each of these in all of its steps: evaluations are in the trace as well.
    assert {operation.count % 20 for operation in record.summary.operations} == {0}
    (line,) = (json.loads(each) for each in RunDir(door.the_run).attempts.read_text().splitlines())
    assert line["seconds"]["profile"] > 0
    assert "steps 20 to 39" in RunDir(door.the_run).log.read_text()


def test_a_kill_while_tracing_leaves_no_half_trace(served: Forks, door: Door, plain: Door) -> None:
    assert served.run(door.cwd, *TRACED, kill_at=30).returncode == -signal.SIGKILL
    assert (RunDir(door.the_run).profile / HIDDEN).is_dir()
    assert windows(door.the_run) == []
    # Killed again when all is written but its name.
    killing = (
        "import os, runner.profiling.profile_record as room; room.rename_path = lambda *_: os.kill(os.getpid(), 9)"
    )
    again = served.run(door.cwd, *TRACED, planted=killing)
    assert again.returncode == -signal.SIGKILL
    assert "a trace that was cut short is removed" in again.stdout
    assert windows(door.the_run) == []
    done = served.run(door.cwd, *TRACED)
    assert done.returncode == 0, done.stdout
    assert_same(door.the_run, plain.the_run, 60)
    assert not (RunDir(door.the_run).profile / HIDDEN).exists()
    ((first, last),) = windows(door.the_run)
    assert 20 <= first <= last <= 60


def test_the_file_profile_traces_the_next_steps(served: Forks, door: Door, plain: Door) -> None:
    words = (*SMALL, *SAVES, "profile.steps=2")
    assert served.run(door.cwd, *words, kill_at=30).returncode == -signal.SIGKILL
    request = RunDir(door.the_run).profile_request
    request.touch()
    at_once = "import runner.profiling.step_profiler as room; room.REQUEST_SECONDS = 0.001"
    done = served.run(door.cwd, *words, planted=at_once)
    assert done.returncode == 0, done.stdout
    assert not request.exists()
    ((first, last),) = windows(door.the_run)
    began = json.loads(RunDir(door.the_run).attempts.read_text().splitlines()[-1])["from_step"]
    assert began < first
    assert last == first + 1
    assert_same(door.the_run, plain.the_run, 60)


def test_a_run_that_is_stopped_while_tracing_keeps_nothing(served: Forks, door: Door) -> None:
    stopping = (
        "import os, signal\n"
        "from runner.rundir.attempt_log import AttemptLog\n"
        "beat = AttemptLog.beat\n"
        "AttemptLog.beat = lambda self, step: (beat(self, step), step == 25 and os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    stopped = served.run(door.cwd, *TRACED, planted=stopping)
    assert stopped.returncode == 75, stopped.stdout
    assert "training did not come to the end of steps 20 to 39; nothing is kept" in stopped.stdout
    assert not list(RunDir(door.the_run).profile.iterdir())


def test_a_trace_that_cannot_begin_stops_no_run(served: Forks, door: Door) -> None:
    failing = "import jax.profiler, tempfile; jax.profiler.start_trace(tempfile.mkdtemp())"
    done = served.run(door.cwd, *TRACED, planted=failing)
    assert done.returncode == 0, done.stdout
    assert "warning: profile: not traced: steps 20 to 39: RuntimeError" in done.stdout
    assert windows(door.the_run) == []
