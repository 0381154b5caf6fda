"""What only the lead of a run's processes does, and what all of them agree on: each place asks runner/hosts.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner import hosts
from runner.checkpoint import checkpointer
from runner.checkpoint.record import Score
from runner.log.fanout import open_sinks
from runner.log.options import LogOptions
from runner.log.sinks import CutPoint, SinkContext
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import is_in_use, lock_run
from tests.train.test_loop import World


@pytest.fixture
def follower(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, as one that does not lead."""
    monkeypatch.setattr(hosts, "is_lead", lambda: False)


def test_one_process_leads_agrees_and_waits_for_nobody() -> None:
    assert hosts.is_lead()
    assert hosts.agree({"step": 3}) == {"step": 3}
    hosts.barrier("nobody else", seconds=0.0)
    hosts.publish("key", [1, 2])
    assert hosts.read_published("key") == [1, 2]
    assert hosts.read_published("another") is None


def test_only_the_lead_locks_a_run(tmp_path: Path, follower: None) -> None:
    run_dir = RunDir(tmp_path / "run")
    with lock_run(run_dir), lock_run(run_dir):  # the second would be refused if the first held it
        assert not is_in_use(run_dir)
    assert not run_dir.path.exists()


def test_all_wait_until_the_run_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, waited = RunDir(tmp_path / "run"), []
    monkeypatch.setattr(hosts, "barrier", lambda name, seconds: waited.append((name, is_in_use(run_dir))))
    with lock_run(run_dir):
        assert waited == [("run is locked", True)]
    monkeypatch.setattr(hosts, "is_lead", lambda: False)
    with lock_run(run_dir):
        assert [name for name, _ in waited] == ["run is locked"] * 2


def test_only_the_lead_writes_the_record_of_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(run_dir: RunDir) -> None:
        run_dir.path.mkdir()
        attempt = AttemptLog(run_dir, Score(), 10, "identity")
        attempt.begin([], [])
        attempt.begin_training(0, None, "1 × cpu")
        attempt.end("finished", 10, "")

    lead, other = RunDir(tmp_path / "lead"), RunDir(tmp_path / "other")
    work(lead)
    monkeypatch.setattr(hosts, "is_lead", lambda: False)
    work(other)
    assert json.loads(lead.status.read_text())["state"] == "finished"
    assert len(lead.attempts.read_text().splitlines()) == 1
    assert not other.status.exists()
    assert not other.attempts.exists()


def test_only_the_lead_opens_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log_one_line(folder: Path) -> bool:
        context = SinkContext(folder / "metrics.jsonl", CutPoint(0), 1, {}, "", print)
        sinks = open_sinks(LogOptions(tensorboard=False), context, Console())
        sinks.log(1, "train", {"loss": 1.0})
        held = sinks.flush()
        sinks.close()
        return held

    assert log_one_line(tmp_path / "lead")
    assert (tmp_path / "lead/metrics.jsonl").read_text().count("\n") == 1
    monkeypatch.setattr(hosts, "is_lead", lambda: False)
    assert log_one_line(tmp_path / "other")
    assert not (tmp_path / "other").exists()


class Console:
    name = "console"

    def catch_up(self) -> None: ...

    def log(self, step: int, split: str, metrics: Any) -> None: ...

    def close(self) -> None: ...


def test_only_the_lead_prunes(tmp_path: Path, follower: None, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[Path] = []
    monkeypatch.setattr(checkpointer, "delete_checkpoint", deleted.append)
    monkeypatch.setattr(checkpointer, "list_records", lambda folder: [Record(1), Record(2)])
    monkeypatch.setattr(checkpointer, "select_survivors", lambda *_: {2})
    policy: Any = Policy()
    left, trouble = checkpointer._prune(tmp_path, policy, 2)
    assert [record.step for record in left] == [2]  # it knows what is gone
    assert (deleted, trouble) == ([], None)
    monkeypatch.setattr(hosts, "is_lead", lambda: True)
    checkpointer._prune(tmp_path, policy, 2)
    assert deleted == [tmp_path / "1"]


class Record:
    def __init__(self, step: int):
        self.step, self.metrics, self.mark = step, {}, ""


class Policy:
    keep: Any = ()
    score = Score()


def test_all_stop_and_save_where_they_have_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lead was asked to stop at step 7, and to save at step 4; this process was not."""
    world = World(save_every=100)
    asked: list[Any] = []

    def agree(value: Any) -> Any:
        asked.append(value)
        step = world.batches
        if len(asked) % 2:  # whether to stop, before each step
            return "the lead was told to stop" if step == 7 else value
        return "the lead saves" if step == 4 else value

    monkeypatch.setattr(hosts, "agree", agree)
    assert world.train().step == 7
    assert set(world.saved) == {4, 7}
