"""What the loop and the attempt do together with other processes: each place asks runner/hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner import hosts
from runner.checkpoint.record import Score
from runner.log.fanout import open_sinks
from runner.log.options import LogOptions
from runner.log.sinks import CutPoint, SinkContext
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.layout import RunDir
from tests.train.test_loop import World


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


def test_all_save_where_they_have_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lead saves at step 4, and not at the end; this process would not, and would."""
    world = World(save_every=100, stop_at=7)

    def agree(key: str, value: Any) -> Any:
        if key == "save":
            return "the lead saves" if world.batches == 4 else None
        return True if key == "saved" else value

    monkeypatch.setattr(hosts, "agree", agree)
    assert world.train().step == 7
    assert set(world.saved) == {4}


def test_nobody_saves_where_the_log_of_the_lead_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(save_every=5)
    monkeypatch.setattr(hosts, "agree", lambda key, value: False if key == "log is whole" else value)
    world.train()
    assert world.saved == {}
