"""Logs hold each step once, over any number of attempts; a mirror that fails does not stop training."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pytest

from runner.errors import StorageError
from runner.log import wandb_sink
from runner.log.console import QuietConsole
from runner.log.fanout import MetricFanout, open_or_warn, open_sinks
from runner.log.jsonl import JsonLinesFile, cut_json_lines
from runner.log.options import LogOptions, WandbOptions
from runner.log.sinks import CutPoint, MetricSink, SinkContext
from tests import curves
from tests.conftest import SMALL, Door
from tests.wandb_standin import Server, serving


def test_a_log_is_cut_back_to_the_restored_step_and_the_rest_is_kept(tmp_path: Path) -> None:
    log, aside = tmp_path / "metrics.jsonl", tmp_path / "cut.jsonl"
    sink = JsonLinesFile(log, print)
    for step in (5, 10, 15):
        sink.log(step, "train", {"loss": 1.0 / step})
    sink.close()
    whole = log.read_bytes()
    with log.open("a") as out:
        out.write('{"step": 20, "spl')  # torn by a kill
    cut_json_lines(log, CutPoint(10), aside)
    assert log.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    assert aside.read_text().splitlines() == [whole.decode().splitlines()[2], '{"step": 20, "spl']
    cut_json_lines(log, CutPoint(10), aside)  # nothing more to cut
    assert len(aside.read_text().splitlines()) == 2


def test_a_line_that_came_late_is_kept(tmp_path: Path) -> None:
    """timing.jsonl tells of a background save when it is durable, some steps after it was made."""
    log = tmp_path / "timing.jsonl"
    log.write_text('{"step": 10}\n{"step": 13}\n{"step": 11}\n')
    cut_json_lines(log, CutPoint(11), tmp_path / "cut.jsonl")
    assert log.read_text() == '{"step": 10}\n{"step": 11}\n'


class Broken:
    name = "broken"

    def open(self, context: object) -> MetricSink:
        return self

    def catch_up(self) -> None:
        raise OSError("still gone")

    def log(self, step: int, split: str, metrics: object) -> None:
        raise OSError("the server is gone")

    def flush(self) -> bool:
        return False

    def close(self) -> None:
        raise OSError("still gone")


def test_a_mirror_that_fails_is_told_once_and_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    fanout = MetricFanout(JsonLinesFile(tmp_path / "m.jsonl", print), [Broken()], told.append)
    fanout.log(1, "train", {"loss": 1.0})
    fanout.log(2, "train", {"loss": 0.5})
    fanout.close()
    assert told == ["warning: broken stopped logging at step 1: the server is gone"]
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 2


def test_the_truth_may_stop_a_run() -> None:
    with pytest.raises(OSError, match="gone"):
        MetricFanout(Broken(), [], print).log(1, "train", {})


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
    sink = JsonLinesFile(log, told.append)
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
    sink = JsonLinesFile(tmp_path / "m.jsonl", print)
    sink._out = Full(sink._out, room=0)  # type: ignore[assignment]
    fanout = MetricFanout(sink, [], print)
    fanout.log(1, "train", {"loss": 1.0})
    with pytest.raises(StorageError, match="last lines of metrics.jsonl"):
        fanout.close()


@pytest.mark.forked(quick=True)
def test_metrics_hold_no_clock(door: Door) -> None:
    assert door.run(*SMALL, "train.steps=10").returncode == 0
    lines = [json.loads(line) for line in (door.the_run / "logs/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(5, "train"), (10, "train"), (10, "eval")]
    assert lines[0].keys() == {"step", "split", "loss", "bits_per_byte", "grad_norm", "lr"}
    timing = [json.loads(line) for line in (door.the_run / "logs/timing.jsonl").read_text().splitlines()]
    assert {line["event"] for line in timing} == {"train", "eval", "save"}


def test_a_line_torn_in_the_middle_of_the_end_is_dropped(tmp_path: Path) -> None:
    """What a kill leaves while the end of a log is being rewritten, or a power loss."""
    log = tmp_path / "timing.jsonl"
    log.write_bytes(b'{"step": 10, "event": "train"}\n\0\0\0\n{"step": 11}\nvent": "save"}\n{"step": 10}\n')
    cut_json_lines(log, CutPoint(10), tmp_path / "cut.jsonl")
    assert log.read_text() == '{"step": 10, "event": "train"}\n{"step": 10}\n'
    assert len((tmp_path / "cut.jsonl").read_bytes().splitlines()) == 3


def test_an_evaluation_that_is_owed_is_no_longer_there(tmp_path: Path) -> None:
    """A stop came while it was made, it was made up for, and a kill came before that was saved: it is made again."""
    sinks = Sinks(tmp_path)
    sinks.logged(0, 4, 1.0)
    fanout = sinks.opened(CutPoint(4, owes=True), "1.0", mirrors=True)
    fanout.log(4, "eval", {"loss": 4.0})
    fanout.log(5, "train", {"loss": 0.2})
    fanout.close()
    sinks.agree()
    assert curves.metrics(tmp_path)["eval/loss"] == [(2, 2.0), (4, 4.0)]
    assert curves.metrics(tmp_path)["train/loss"][-2:] == [(4, 0.25), (5, 0.2)]


def test_a_long_log_is_cut_at_its_end(tmp_path: Path) -> None:
    """Over the boundaries of blocks, and without a look at what is older: a torn line there would be dropped as well."""
    log = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "split": "train", "loss": "x" * (step % 97)}) + "\n" for step in range(5000)]
    log.write_text("torn\n" + "".join(whole))
    cut_json_lines(log, CutPoint(1000), tmp_path / "cut.jsonl")
    assert log.read_text() == "torn\n" + "".join(whole[:1001])
    assert (tmp_path / "cut.jsonl").read_text() == "".join(whole[1001:])


def test_lines_are_durable_before_a_checkpoint_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, synced = JsonLinesFile(tmp_path / "metrics.jsonl", print), []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    sink.log(1, "train", {"loss": 1.0})
    assert synced == []  # not for each line
    assert sink.flush()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size]
    monkeypatch.setattr("os.fsync", _refuse)
    assert not sink.flush()


def _refuse(_: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


@pytest.fixture(autouse=True)
def _no_wandb_service_is_left() -> Iterator[None]:
    """A run that a later test starts would use it, and its data would not die with the run."""
    yield
    wandb_sink.wandb.teardown()


@dataclass(frozen=True)
class Sinks:
    """metrics.jsonl and its mirrors, opened as a run opens them after it has restored a step."""

    logs: Path

    mode: str = "offline"
    told: list[str] = field(default_factory=list)

    def opened(self, until: CutPoint, lineage: str, *, mirrors: bool) -> MetricFanout:
        document = {"lineage": lineage}
        context = SinkContext(self.logs / "metrics.jsonl", until, 1, document, lineage, self.told.append)
        wandb = WandbOptions(project="test", mode=self.mode) if mirrors else None  # type: ignore[arg-type]
        return open_sinks(LogOptions(tensorboard=mirrors, wandb=wandb), context, QuietConsole(self.logs / "run.log"))

    def logged(self, restored: int, last: int, scale: float, *, mirrors: bool = True) -> None:
        """Train to a step, with values that come from `scale`."""
        fanout = self.opened(CutPoint(restored), str(scale), mirrors=mirrors)
        for step in range(restored + 1, last + 1):
            fanout.log(step, "train", {"loss": scale / step, "lr": 0.1})
            if step % 2 == 0:
                fanout.log(step, "eval", {"loss": scale * step})
        fanout.close()

    def agree(self) -> None:
        wandb_sink.wandb.teardown()  # as the end of a process does: it waits until all is in the file
        truth = curves.metrics(self.logs)
        assert curves.concatenated(self.logs) == curves.accumulator(self.logs) == curves.as_float32(truth)
        assert curves.wandb_offline(self.logs) == truth


def test_sinks_opened_again_at_a_lower_step_hold_the_new_values_once(tmp_path: Path) -> None:
    """As after a step back: in one process, within a second, and what is done again comes out different."""
    sinks = Sinks(tmp_path)
    for restored, last, scale in ((0, 9, 1.0), (4, 8, 2.0), (6, 7, 3.0), (2, 5, 4.0), (0, 3, 5.0), (3, 10, 6.0)):
        sinks.logged(restored, last, scale)
    sinks.agree()
    losses = dict(curves.metrics(tmp_path)["train/loss"])
    assert losses[3] == 5.0 / 3
    assert losses[4] == 6.0 / 4
    assert len(list((tmp_path / "tensorboard").glob("*tfevents*"))) == 6  # none was written over


def test_what_a_mirror_has_missed_is_filled_in(tmp_path: Path) -> None:
    """It was not wanted, or not there, or had stopped."""
    sinks = Sinks(tmp_path)
    sinks.logged(0, 3, 1.0, mirrors=False)
    sinks.logged(3, 6, 1.0)
    sinks.logged(5, 9, 1.0, mirrors=False)
    sinks.logged(8, 12, 1.0)
    sinks.agree()


@pytest.mark.parametrize("proven_bytes", [0, 1 << 16])
@pytest.mark.parametrize("end", ["torn", "half", "zeros", "flipped"])
def test_an_event_torn_by_a_kill_or_a_power_loss_is_dropped_and_filled_in(
    tmp_path: Path, end: str, proven_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if end == "flipped" and not proven_bytes:
        pytest.skip("only a checksum can tell")
    monkeypatch.setattr("runner.log.tensorboard_sink.PROVEN_BYTES", proven_bytes)
    sinks = Sinks(tmp_path)
    sinks.logged(0, 6, 1.0)
    (path,) = (tmp_path / "tensorboard").glob("*tfevents*")
    whole = path.read_bytes()
    ends = {
        "torn": whole[:-5],
        "half": whole[:-20] + bytes(20),
        "zeros": whole[:-47] + bytes(47),
        "flipped": whole[:-6] + b"\0" + whole[-5:],
    }
    path.write_bytes(ends[end])
    sinks.logged(6, 8, 1.0)
    sinks.agree()
    assert (tmp_path / "tensorboard/cut-1.events").stat().st_size > 0


def test_a_tensorboard_that_is_looking_forgets_what_was_cut(tmp_path: Path) -> None:
    """`tensorboard --load_fast=false` takes no notice of the first START it meets: so each file has one."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    sinks = Sinks(tmp_path)
    sinks.logged(0, 9, 1.0)
    looking = EventMultiplexer(tensor_size_guidance={"scalars": 0})
    looking.AddRunsFromDirectory(str(tmp_path / "tensorboard")).Reload()
    sinks.logged(4, 6, 2.0)
    looking.Reload()
    (run,) = looking.Runs()
    assert [event.step for event in looking.Tensors(run, "train/loss")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """What wandb sends to; with or without rewinding."""
    wandb_sink.wandb.teardown()
    with serving(rewinds=request.param) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server
        wandb_sink.wandb.teardown()


@pytest.mark.parametrize("server", [False], indirect=True)
def test_online_wandb_gets_each_line_once_without_rewinding(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has and what is computed again is passed over; what it lacks is filled in."""
    numbers, log = [], wandb_sink.wandb.Run.log

    def spied(run: wandb_sink.wandb.Run, data: dict, *, step: int, commit: bool) -> None:
        numbers.append(step)
        log(run, data, step=step, commit=commit)

    monkeypatch.setattr(wandb_sink.wandb.Run, "log", spied)
    sinks = Sinks(tmp_path, "online")
    for restored, last in ((0, 6), (4, 5), (2, 8)):
        sinks.logged(restored, last, 1.0)
    sinks.logged(8, 10, 1.0, mirrors=False)
    sinks.logged(9, 12, 1.0)
    assert server.curves(run_id := (tmp_path / "wandb/run_id").read_text()) == curves.metrics(tmp_path)
    assert server.runs.keys() == {run_id}
    assert numbers == list(range(len(server.runs[run_id])))
    assert "mutation RewindRun" not in server.asked


@pytest.mark.parametrize("server", [True], indirect=True)
def test_online_wandb_rewinds_where_values_come_out_different(tmp_path: Path, server: Server) -> None:
    sinks = Sinks(tmp_path, "online")
    for restored, last, scale in ((0, 9, 1.0), (4, 6, 2.0), (5, 8, 2.0), (2, 5, 3.0), (5, 7, 4.0)):
        sinks.logged(restored, last, scale)
        assert server.curves((tmp_path / "wandb/run_id").read_text()) == curves.metrics(tmp_path)
    assert len(server.runs) == 1
    assert server.asked.count("mutation RewindRun") == 2  # not where it holds nothing past our lines


@pytest.mark.parametrize("server", [False], indirect=True)
def test_online_wandb_gets_a_new_run_where_it_cannot_rewind(tmp_path: Path, server: Server) -> None:
    sinks = Sinks(tmp_path, "online")
    sinks.logged(0, 9, 1.0)
    before = (tmp_path / "wandb/run_id").read_text()
    sinks.logged(4, 6, 2.0)
    after = (tmp_path / "wandb/run_id").read_text()
    assert server.curves(after) == curves.metrics(tmp_path)
    assert server.runs.keys() == {before, after}
    (told,) = sinks.told
    assert f"{before} keeps what was taken back" in told
    assert f"goes on as {after}" in told


@pytest.mark.parametrize("server", [False], indirect=True)
def test_a_sync_of_offline_data_sends_each_line_once(tmp_path: Path, server: Server) -> None:
    sinks = Sinks(tmp_path)
    for restored, last, scale in ((0, 6, 1.0), (4, 9, 2.0)):
        sinks.logged(restored, last, scale)
    sinks.agree()
    command = [sys.executable, "-m", "wandb", "sync", *map(str, tmp_path.glob("wandb/wandb/offline-run-*"))]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert server.curves((tmp_path / "wandb/run_id").read_text()) == curves.metrics(tmp_path)


def test_a_mirror_that_cannot_be_had_is_told_and_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    context = SinkContext(tmp_path / "metrics.jsonl", CutPoint(0), 1, {}, "", told.append)
    assert open_or_warn("wandb", Broken(), context) is None
    assert told == ["warning: wandb is left out: still gone"]


@pytest.mark.slow
def test_a_run_taken_back_has_the_new_curves_once(door: Door) -> None:
    """Every fourth step is logged now, and no longer every fifth."""
    small = [override for override in SMALL if not override.startswith("log.")]
    command = (*small, "log=wandb", "log.wandb.mode=offline", "ckpt.save.periodic.steps=10", "retention.last.n=3")
    assert door.run(*command).returncode == 0
    logs, run_id = door.the_run / "logs", (door.the_run / "logs/wandb/run_id").read_text()
    done = door.run(*command, f"dir={door.the_run}", "step=40", "train.log_steps=4")
    assert done.returncode == 0, done.stderr
    assert [step for step, _ in curves.metrics(logs)["train/loss"]] == [*range(5, 41, 5), *range(44, 61, 4)]
    assert curves.data_server(logs) == curves.as_float32(curves.metrics(logs)) == curves.concatenated(logs)
    assert curves.wandb_offline(logs) == curves.metrics(logs)
    assert (logs / "wandb/run_id").read_text() == run_id


def test_a_mirror_shows_no_file_of_another_place(tmp_path: Path) -> None:
    """metrics.jsonl may come from somebody else: a name in it leads to files of the run alone, and never through a link."""
    run, told = tmp_path / "run", list[str]()
    (run / "logs").mkdir(parents=True)
    (run / "media").mkdir()
    (tmp_path / "outside.txt").write_text("what lies outside")
    (run / "media/mine.txt").write_text("a `sample`\n```\n# not a title")
    (run / "media/linked.txt").symlink_to(tmp_path / "outside.txt")
    (run / "media/short.png").write_bytes(b"\x89PNG")
    os.mkfifo(run / "media/pipe.txt")
    names = ["media/linked.txt", "../outside.txt", str(tmp_path / "outside.txt"), "media/../../outside.txt"]
    names += ["media/pipe.txt", "media", "", "a\0b", "media/short.png", "media/mine.txt"]
    context = SinkContext(run / "logs/metrics.jsonl", CutPoint(0), 1, {}, "", told.append)
    assert [context.read_media(name) for name in names[:-2]] == [None] * (len(names) - 2)
    lines = [{"step": number, "split": "text", "file": name} for number, name in enumerate(names, 1)]
    context.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for option in (LogOptions(wandb=WandbOptions(project="test", mode="offline")), LogOptions(tensorboard=True)):
        for name, each in option.chosen_sinks().items():
            sink = open_or_warn(name, each, context)
            assert sink is not None, told
            sink.close()
    wandb_sink.wandb.teardown()
    written = [path.read_bytes() for path in (run / "logs").rglob("*") if path.is_file()]
    assert not any(b"what lies outside" in content for content in written)
    assert any(b"a `sample`" in content for content in written)


def test_a_mirror_writes_through_no_link(tmp_path: Path) -> None:
    """The folder of events may be a link, or a file in it: nothing outside is cut, begun or deleted."""
    outside, logs, told = tmp_path / "outside", tmp_path / "run/logs", list[str]()
    outside.mkdir()
    logs.mkdir(parents=True)
    (outside / "events.out.tfevents.1.host").write_bytes(b"mine")
    (outside / "run_id").write_text("mine")
    context = SinkContext(logs / "metrics.jsonl", CutPoint(0), 1, {}, "", told.append)
    option = LogOptions(wandb=WandbOptions(project="test", mode="offline"), tensorboard=True)
    for folder in ("tensorboard", "wandb"):
        (logs / folder).symlink_to(outside)
    for name, each in option.chosen_sinks().items():
        assert open_or_warn(name, each, context) is None
    assert len(told) == 2
    assert all("is a link" in line for line in told), told
    (logs / "tensorboard").unlink()
    (logs / "tensorboard").mkdir()
    (logs / "tensorboard/events.out.tfevents.1.host").symlink_to(outside / "events.out.tfevents.1.host")
    assert open_or_warn("tensorboard", option.chosen_sinks()["tensorboard"], context) is None
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {
        "events.out.tfevents.1.host": b"mine",
        "run_id": b"mine",
    }
