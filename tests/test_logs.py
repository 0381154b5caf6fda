"""Logs hold each step once, over any number of attempts; a mirror that fails does not stop training."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import BinaryIO

import pytest

from runner.errors import StorageError
from runner.log import Fanout
from runner.log.jsonl import Jsonl, cut
from tests.conftest import SMALL, Door


def test_a_log_is_cut_back_to_the_restored_step_and_the_rest_is_kept(tmp_path: Path) -> None:
    log, aside = tmp_path / "metrics.jsonl", tmp_path / "cut.jsonl"
    sink = Jsonl(log, print)
    for step in (5, 10, 15):
        sink.log(step, "train", {"loss": 1.0 / step})
    sink.close()
    whole = log.read_bytes()
    with log.open("a") as out:
        out.write('{"step": 20, "spl')  # torn by a kill
    cut(log, 10, aside)
    assert log.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    assert aside.read_text().splitlines() == [whole.decode().splitlines()[2], '{"step": 20, "spl']
    cut(log, 10, aside)  # nothing more to cut
    assert len(aside.read_text().splitlines()) == 2


def test_a_line_that_came_late_is_kept(tmp_path: Path) -> None:
    """timing.jsonl tells of a background save when it is durable, some steps after it was made."""
    log = tmp_path / "timing.jsonl"
    log.write_text('{"step": 10}\n{"step": 13}\n{"step": 11}\n')
    cut(log, 11, tmp_path / "cut.jsonl")
    assert log.read_text() == '{"step": 10}\n{"step": 11}\n'


class Broken:
    def log(self, step: int, split: str, metrics: object) -> None:
        raise OSError("the server is gone")

    def flush(self) -> bool:
        return False

    def close(self) -> None:
        raise OSError("still gone")


def test_a_mirror_that_fails_is_told_once_and_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    fanout = Fanout(Jsonl(tmp_path / "m.jsonl", print), [Broken()], told.append)
    fanout.log(1, "train", {"loss": 1.0})
    fanout.log(2, "train", {"loss": 0.5})
    fanout.close()
    assert told == ["warning: Broken stopped logging at step 1: the server is gone"]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


def test_the_truth_may_stop_a_run() -> None:
    with pytest.raises(OSError, match="gone"):
        Fanout(Broken(), [], print).log(1, "train", {})


class Full:
    """A file on a disk that takes so many bytes more."""

    def __init__(self, file: BinaryIO, room: int):
        self._file, self.room = file, room

    def write(self, content: bytes) -> int:
        taken = content[: self.room]
        self.room -= len(taken)
        if content and not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(taken)

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()


def test_lines_wait_for_a_full_disk_and_none_is_torn_or_lost(tmp_path: Path) -> None:
    told: list[str] = []
    log = tmp_path / "metrics.jsonl"
    sink = Jsonl(log, told.append)
    sink.log(1, "train", {"loss": 1.0})
    whole = log.read_bytes()
    sink._out = full = Full(sink._out, room=20)  # type: ignore[assignment]
    for step in (2, 3):
        sink.log(step, "train", {"loss": 1.0})
        assert not sink.flush()
        assert log.read_bytes() == whole  # what got through of a line was taken back
    assert told == ["warning: metrics.jsonl cannot be written (No space left on device); its lines wait in memory"]
    full.room = 10**6
    assert sink.flush()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    sink.close()


def test_a_truth_that_is_not_complete_is_an_error_at_the_end(tmp_path: Path) -> None:
    sink = Jsonl(tmp_path / "m.jsonl", print)
    sink._out = Full(sink._out, room=0)  # type: ignore[assignment]
    fanout = Fanout(sink, [], print)
    fanout.log(1, "train", {"loss": 1.0})
    with pytest.raises(StorageError, match="last lines of metrics.jsonl"):
        fanout.close()


def test_metrics_hold_no_clock(door: Door) -> None:
    assert door.run(*SMALL, "train.steps=10").returncode == 0
    lines = [json.loads(line) for line in (door.the_run / "logs/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(5, "train"), (10, "train"), (10, "eval")]
    assert lines[0].keys() == {"step", "split", "loss", "bits_per_byte", "grad_norm", "lr"}
    timing = [json.loads(line) for line in (door.the_run / "logs/timing.jsonl").read_text().splitlines()]
    assert {line["event"] for line in timing} == {"train", "eval", "save"}


def test_tensorboard_and_offline_wandb_hold_each_step_once_after_a_kill(door: Door) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small = [override for override in SMALL if not override.startswith("log.")]
    command = (*small, "log=wandb", "log.wandb.mode=offline", "ckpt.save.periodic.steps=10")
    door.kill_at(35, *command)
    done = door.run(*command)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(door.the_run / "logs/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(5, 61, 5))
    assert [event.step for event in events.Scalars("eval/loss")] == list(range(10, 61, 10))
    wandb = door.the_run / "logs/wandb"
    run_id = (wandb / "run_id").read_text()
    runs = [path.name for path in (wandb / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(runs) == 2  # one a process; one id, so that one run arrives
    assert all(name.endswith(run_id) for name in runs)
