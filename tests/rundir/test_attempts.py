"""Attempts get one line each, however they end; every moment counts towards one bucket; the pulse outlives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.record import Score
from runner.rundir import heartbeat
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.heartbeat import HeartbeatWriter
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import is_in_use, lock_run, run_state
from runner.rundir.time_buckets import TimeBuckets
from tests.conftest import REPO


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def begun(run: RunDir, began: float | None = None) -> AttemptLog:
    attempt = AttemptLog(run, Score(), 100, "identity", began)
    attempt.begin(["seed=1"], [])
    return attempt


def test_every_moment_counts_towards_one_bucket(tmp_path: Path) -> None:
    watch = TimeBuckets(HeartbeatWriter(tmp_path / "pulse"), time.time() - 2.0)
    start = time.perf_counter()
    with watch.time_in("step"):
        time.sleep(0.02)
        with watch.time_in("data"):
            time.sleep(0.03)
            assert heartbeat.read_heartbeat(tmp_path / "pulse").phase == "data"  # type: ignore[union-attr]
        assert heartbeat.read_heartbeat(tmp_path / "pulse").phase == "step"  # type: ignore[union-attr]
    elapsed = time.perf_counter() - start
    seconds = watch.read()
    assert seconds["data"] >= 0.03
    assert seconds["step"] >= 0.02
    assert seconds["import"] == pytest.approx(2.0, abs=0.1)
    assert seconds["total"] == pytest.approx(
        sum(spent for bucket, spent in seconds.items() if bucket != "total"), abs=0.005
    )
    assert seconds["step"] + seconds["data"] <= elapsed + 0.002  # nested, not twice


def test_a_killed_attempt_gets_its_line_from_the_next_one(run: RunDir) -> None:
    """Status says step 40 as of a second ago; the sign of life knows better."""
    first = begun(run, time.time() - 10)
    first.begin_training(20, None, "cpu")
    first.note(40, {}, 20)
    first.write("running")
    with first.time_in("eval"):
        first.heartbeat.beat(47)
        first.heartbeat.set_writer_phase("seal")
        left_behind = run.heartbeat.read_bytes()  # what a SIGKILL leaves
    run.heartbeat.write_bytes(left_behind)
    second = begun(run)  # killed before it restored anything: also that is on record
    assert read_attempts(run) == []
    third = begun(run)
    third.begin_training(30, None, "cpu")
    one, two = read_attempts(run)
    assert (one["ending"], one["during"], one["from_step"], one["to_step"]) == (
        "killed",
        "eval, seal a checkpoint",
        20,
        47,
    )
    assert one["lost_steps"] == 17
    trained = sum(one["seconds"].get(bucket, 0) for bucket in ("step", "data", "eval", "save"))
    assert one["lost_seconds"] == pytest.approx(trained * 17 / 27, abs=0.002)
    assert (two["attempt"], two["ending"], two["during"], two["lost_steps"]) == (2, "killed", "startup", 0)
    assert "from_step" not in two
    third.end("finished", 100, "")
    assert [line["attempt"] for line in read_attempts(run)] == [1, 2, 3]
    assert begun(run).number == 4
    assert len(read_attempts(run)) == 3  # buried once
    assert second.number == 2


def test_an_attempt_ends_once_and_says_what_is_lost(run: RunDir) -> None:
    attempt = begun(run)
    attempt.begin_training(10, None, "cpu")
    attempt.note(25, {}, 20)
    attempt.end("preempted", 25, "SIGTERM", durable_step=20)
    attempt.end("failed", 25, "too late", durable_step=20)
    (line,) = read_attempts(run)
    assert (line["ending"], line["to_step"], line["lost_steps"]) == ("preempted", 25, 5)
    assert (run.read_status()["state"], run.read_status()["step"]) == ("preempted", 20)


def test_what_a_start_that_was_refused_leaves(run: RunDir) -> None:
    attempt = begun(run)
    attempt.begin_training(10, None, "cpu")
    attempt.end("preempted", 10, "SIGTERM", durable_step=10)
    before = run.status.read_bytes()
    refused = begun(run)
    assert run.status.read_bytes() != before
    refused.withdraw()
    assert run.status.read_bytes() == before
    assert len(read_attempts(run)) == 1


def test_a_stop_before_training_loses_nothing_of_its_own(run: RunDir) -> None:
    """The steps that are gone were lost by the one that was killed, and are counted there."""
    killed = begun(run)
    killed.begin_training(0, None, "cpu")
    killed.note(25, {}, 20)
    killed.write("running")
    stopped = begun(run)
    stopped.end("preempted", stopped.step, "SIGTERM", durable_step=20)
    first, second = read_attempts(run)
    assert (first["ending"], first["lost_steps"]) == ("killed", 5)
    assert (second["ending"], second["lost_steps"], second["to_step"]) == ("preempted", 0, 20)


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"holdfast", None])
def test_a_pulse_that_is_none(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "pulse").write_bytes(content)
    assert heartbeat.read_heartbeat(tmp_path / "pulse") is None


def test_a_pulse_where_the_disk_has_no_room() -> None:
    beating = HeartbeatWriter(Path("/proc/nowhere/pulse"))
    beating.beat(3)
    assert beating.read().step == 3


def test_a_pulse_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from runner.rundir.heartbeat import HeartbeatWriter\n"
        "pulse = HeartbeatWriter(Path(sys.argv[1])); pulse.set_phase('save'); pulse.set_writer_phase('publish'); step = 0\n"
        "while True:\n    step += 1; pulse.beat(step)\n    if step == 1000: print('there', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pulse")], cwd=REPO, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    beat = heartbeat.read_heartbeat(tmp_path / "pulse")
    assert beat is not None
    assert beat.step >= 1000
    assert (beat.phase, beat.writing) == ("save", "publish")


def test_a_run_whose_process_is_gone_is_called_killed(run: RunDir) -> None:
    run.status.write_text(json.dumps({"state": "running"}))
    with lock_run(run):
        assert is_in_use(run)
        assert run_state(run) == "running"
    assert not is_in_use(run)
    assert run_state(run) == "killed"
    run.status.write_text(json.dumps({"state": "finished"}))
    assert run_state(run) == "finished"


def test_when_this_process_began() -> None:
    from runner.rundir.provenance import process_start_time

    code = "from runner.rundir.provenance import process_start_time; print(process_start_time())"
    before = time.time()
    answers = [
        float(subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout)
    ]
    assert before - 0.1 <= answers[0] <= time.time()
    assert process_start_time() < before
    assert os.getpid()


def test_changed_code_has_another_hash(tmp_path: Path, monkeypatch: Any) -> None:
    import runner.rundir.provenance as provenance

    (tmp_path / "runner").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "runner/rundir/provenance.py"))
    empty = provenance.hash_code()
    (tmp_path / "runner/x.py").write_text("1")
    one = provenance.hash_code()
    (tmp_path / "runner/x.py").write_text("2")
    assert len({empty, one, provenance.hash_code()}) == 3


def test_a_reader_of_a_pulse_never_finds_it_cleared(tmp_path: Path) -> None:
    """A kill at any moment leaves what a reader at that moment sees."""
    code = (
        "import sys; from pathlib import Path; from runner.rundir.heartbeat import HeartbeatWriter\n"
        "pulse = HeartbeatWriter(Path(sys.argv[1])); pulse.beat(1); print('there', flush=True); step = 1\n"
        "while True:\n    step += 1; pulse.beat(step); pulse.set_phase('save')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "pulse")], cwd=REPO, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        last = 0
        for _ in range(20_000):
            beat = heartbeat.read_heartbeat(tmp_path / "pulse")
            assert beat is not None
            assert beat.step >= max(last, 1)
            assert beat.changed > 0
            last = beat.step
    finally:
        process.kill()
        process.wait()
    assert last > 1000


def test_what_a_rollback_does_again_is_counted(run: RunDir) -> None:
    """Also in the line of an attempt that is killed later."""
    attempt = begun(run)
    attempt.begin_training(10, None, "cpu")
    attempt.note(35, {}, 20)
    attempt.begin_training(20, None, "cpu")
    attempt.note(40, {}, 40)
    attempt.write("running")
    later = begun(run)
    later.begin_training(40, None, "cpu")
    (line,) = read_attempts(run)
    assert (line["from_step"], line["redone_steps"], line["lost_steps"]) == (10, 15, 0)
    later.end("finished", 50, "")
    assert "redone_steps" not in read_attempts(run)[1]
