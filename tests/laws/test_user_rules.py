"""Rules and a logger of the user's own in one run: killed and gone on with, it saves, keeps, logs and ends the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.checkpoint.record import list_records
from tests.conftest import SMALL, Door, assert_same, write_corpus
from tests.laws.faults import Forks

RULES = """
def when(info, history, every):
    return f"mine, every {every}" if info.step % every == 0 else None

def keep(records, at):
    return {record.step: f"mine, of {at}" for record in records if record.step % at == 0}

def enough(history, evaluations):
    return f"{len(history)} evaluations" if len(history) >= evaluations else None

class Sink:
    def __init__(self, run_dir, attempt):
        self.out = open(run_dir / "mine.txt", "a")
        print("attempt", attempt, file=self.out, flush=True)
    def log(self, step, split, metrics):
        print(step, split, metrics["loss"], file=self.out, flush=True)
"""
RUN = (
    *(*SMALL, "train.steps=90"),
    *(
        "ckpt=none",
        "+ckpt.save.mine={kind: external, target: rules:when, options: {every: 8}}",
        "ckpt.write=blocking",
        "ckpt.last=true",
    ),
    *("retention=pinned", "+retention.mine={kind: external, target: rules:keep, options: {at: 16}}"),
    "+stop.rules.mine={kind: external, target: rules:enough, options: {evaluations: 5}}",
    "+log.sinks.mine={kind: external, target: rules:Sink}",
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, served: Forks) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    write_corpus(folder)
    (folder / "rules.py").write_text(RULES)
    door = Door(folder, served)
    ended = door.run(*RUN)
    assert ended.returncode == 0, ended.stderr
    assert "stopped early at step 50 of 90: 5 evaluations" in ended.stdout
    assert "warning" not in ended.stdout
    return door.the_run


def test_killed_and_gone_on_with_it_is_the_same(reference: Path, tmp_path: Path, served: Forks) -> None:
    write_corpus(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    door = Door(tmp_path, served)
    door.kill_at(30, *RUN)
    steps = [record.step for record in list_records(door.the_run / "checkpoints")]
    assert steps, "the kill must come after a save, and before the end"
    assert max(steps) < 50
    ended = door.run(*RUN)
    assert ended.returncode == 0, ended.stderr
    assert "stopped early at step 50 of 90: 5 evaluations" in ended.stdout
    assert_same(door.the_run, reference, 50)
    saved = [
        {record.step: record.reason for record in list_records(run / "checkpoints")}
        for run in (door.the_run, reference)
    ]
    assert saved[0] == saved[1]
    assert {16, 32, 48, 50} <= saved[0].keys() <= {8, 16, 24, 32, 40, 48, 50}
    assert saved[0][48] == "mine, every 8"
    # The logger, which cannot catch up, had each line of each process, the new ones after the old ones.
    first, second = (door.the_run / "mine.txt").read_text().split("attempt")[1:]
    whole = (reference / "mine.txt").read_text().partition("\n")[2]
    assert whole.startswith(first.partition("\n")[2])
    assert whole.endswith(second.partition("\n")[2])
    lines = [json.loads(line) for line in (reference / "logs/metrics.jsonl").read_text().splitlines()]
    assert [f"{line['step']} {line['split']} {line['loss']}" for line in lines] == whole.splitlines()


def test_typed_again_it_is_finished_and_without_the_rule_it_goes_on(reference: Path, served: Forks) -> None:
    door, lines = Door(reference.parents[2], served), (reference / "logs/metrics.jsonl").read_bytes()
    again = door.run(*RUN)
    assert again.returncode == 0, again.stderr
    assert "is finished: 50 steps, stopped early (5 evaluations)" in again.stdout
    assert again.stdout.rstrip().endswith(" stop.rules={} --trust")
    # Another rule, or another file of the same name, is asked.
    with (door.cwd / "rules.py").open("a") as file:
        file.write("# changed\n")
    again = door.run(*RUN)
    assert again.returncode == 0, again.stderr
    assert "stopped early at step 50 of 90: 5 evaluations" in again.stdout
    assert (reference / "logs/metrics.jsonl").read_bytes() == lines
    for words, code in (((), 3), (("--trust",), 0)):
        more = door.run(f"dir={reference}", "stop.rules={}", "train.steps=52", *words)
        assert more.returncode == code, more.stderr

    assert json.loads((reference / "status.json").read_text())["step"] == 52
    assert (reference / "logs/metrics.jsonl").read_bytes().startswith(lines)
