"""What a restart must know survives whatever becomes of status.json, attempts.jsonl and one copy of the decisions."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from runner import files
from runner.checkpoint.record import Score
from runner.errors import StorageError
from runner.rundir import attempt_log
from runner.rundir.attempt_lines import count_interruptions, parse_attempt_lines, read_attempts
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.crash_loop import find_repeated_failure
from runner.rundir.decisions import Decisions, read_decisions, write_decisions
from runner.rundir.layout import RunDir, find_run_dir

SKIPPED = {"batch": 7, "step": 8, "why": "loss is nan"}
COPY = ".decisions.copy.json"


@pytest.fixture(autouse=True)
def _no_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking git and hashing all code takes a tenth of a second."""
    monkeypatch.setattr(attempt_log, "collect_provenance", lambda own_files: {"host": "here"})


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run whose second attempt was taken back to step 30, skips a batch, and was killed at step 41."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    first = begin(run)
    first.begin_training(0, None, "cpu")
    first.note(30, {}, 30)
    first.end("preempted", 35, "SIGTERM", 30)
    second = begin(run)
    second.status.set_taken_back_to(30)
    second.skip_batch(7, 8, "loss is nan")
    second.begin_training(30, None, "cpu")
    second.beat(41)
    return run


def begin(run: RunDir) -> AttemptLog:
    attempt = AttemptLog(run, Score(), 100, "identity")
    attempt.begin([], [])
    return attempt


def truncate(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda run: truncate(run.status),
        lambda run: run.status.unlink(),
        lambda run: run.status.write_text("[]"),
        lambda run: (truncate(run.status), flip(run.decisions)),
        lambda run: (truncate(run.status), run.decisions.unlink()),
        lambda run: (run.status.unlink(), flip(run.path / COPY)),
        lambda run: (run.path / COPY).unlink(),
        lambda run: (run.decisions.unlink(), (run.path / COPY).unlink()),  # a run of before there were decisions
    ],
)
def test_what_was_decided_is_known_after_any_one_harm(run_dir: RunDir, harm: Callable[[RunDir], object]) -> None:
    harm(run_dir)
    third = begin(run_dir)
    assert third.number == 3
    assert third.status.taken_back_to == 30
    assert third.status.skipped == [SKIPPED]
    assert third.was_durable
    third.begin_training(30, None, "cpu")
    killed = read_attempts(run_dir)[-1]
    assert (killed["attempt"], killed["ending"], killed["to_step"], killed["lost_steps"]) == (2, "killed", 41, 11)


def test_both_copies_damaged_is_said_and_what_else_there_is_counts(run_dir: RunDir) -> None:
    flip(run_dir.decisions)
    flip(run_dir.path / COPY)
    told = AttemptLog(run_dir, Score(), 100, "identity").begin([], [])
    assert len(told) == 1
    assert "decisions.json and .decisions.copy.json cannot be believed" in told[0]


def test_a_withdrawn_attempt_leaves_the_decisions_as_they_were(run_dir: RunDir) -> None:
    before = run_dir.decisions.read_bytes(), run_dir.status.read_bytes()
    third = begin(run_dir)
    third.begin_training(30, None, "cpu")
    third.withdraw()
    assert (run_dir.decisions.read_bytes(), run_dir.status.read_bytes()) == before


def test_a_seal_alone_does_not_make_decisions(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for odd in ({"attempt": -1}, {"taken_back_to": "../x"}, {"skipped": [{"batch": "7"}]}, {"was_durable": "yes"}):
        write_decisions(run, Decisions(**odd))  # type: ignore[arg-type]
        assert read_decisions(run, {}, []).decisions == Decisions(skipped=[])


def test_damaged_lines_are_set_aside_once_and_said(run_dir: RunDir) -> None:
    good = run_dir.attempts.read_bytes()
    run_dir.attempts.write_bytes(b"\xff\xfe{}\n" + good + b'{}\n{"attempt": "1"}\n{"torn": ')
    told = AttemptLog(run_dir, Score(), 100, "identity").begin([], [])
    assert ["4 of the lines in attempts.jsonl cannot be read" in line for line in told] == [True]
    assert run_dir.attempts.read_bytes() == good
    (aside,) = run_dir.path.glob("attempts.damaged-*.jsonl")
    assert aside.read_bytes().startswith(b"\xff\xfe{}\n")
    assert AttemptLog(run_dir, Score(), 100, "identity").begin([], []) == []


def test_any_mutation_of_any_side_file_leaves_a_run_that_begins(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property: whatever the bytes of the small files are, an attempt begins, trains and ends."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power is cut here
    generator = random.Random(16)
    whole = {path: path.read_bytes() for path in run_dir.path.iterdir() if path.is_file()}
    whole |= {run_dir.heartbeat: run_dir.heartbeat.read_bytes()}
    for _ in range(80):
        for path, content in whole.items():
            path.write_bytes(content)
        for path in generator.sample(sorted(whole), generator.randint(1, len(whole))):
            path.write_bytes(mutate(generator, whole[path]))
        attempt = begin(run_dir)
        assert attempt.number >= 1
        attempt.begin_training(30, None, "cpu")
        attempt.end("finished", 100, "")
        find_repeated_failure(read_attempts(run_dir), "code")
        assert count_interruptions(run_dir)[1] >= 0
        assert begin(run_dir).number > attempt.number
        for path in run_dir.path.glob("attempts.damaged-*"):
            path.unlink()


def mutate(generator: random.Random, content: bytes) -> bytes:
    """Return bytes that a power loss, a bad disk or a person may have left."""
    kind = generator.randrange(7)
    if kind == 0:
        return content[: generator.randrange(len(content) + 1)]
    if kind == 1:
        return bytes(len(content))
    if kind == 2:
        return generator.randbytes(generator.randrange(200))
    if kind == 3:
        return content + content[: generator.randrange(len(content) + 1)]
    if kind == 4:
        odd = generator.choice(
            [b"null", b"[]", b"{}", b'"x"', b"-1", b"1e999", b"NaN", b"9" * 400, b"true", b"[" * 5000]
        )
        lines = content.splitlines()
        place = generator.randrange(len(lines) or 1)
        key = generator.choice(
            [b"attempt", b"step", b"started", b"updated", b"seconds", b"ending", b"best", b"skipped"]
        )
        lines[place : place + 1] = [b'{"%s": %s}' % (key, odd)]
        return b"\n".join(lines)
    flipped = bytearray(content)
    for _ in range(generator.randint(1, 5)):
        if flipped:
            flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
    return bytes(flipped)


def test_a_machine_in_trouble_does_not_count_as_a_failure_of_the_step() -> None:
    failed = {"attempt": 1, "started": "2026-11-30T00:00:00+00:00", "ending": "failed", "to_step": 40, "code": "c"}
    lines = [{**failed, "why": "", "from_step": 40}] * 2
    repeated = find_repeated_failure([*lines, {**failed, "machine_trouble": True}], "c")
    assert repeated is not None
    assert repeated.count == 2


def test_what_failed_before_it_trained_is_no_reason_to_give_up_a_checkpoint() -> None:
    failed = {"attempt": 1, "started": "2026-11-30T00:00:00+00:00", "ending": "failed", "to_step": 40, "code": "c"}
    never_trained = find_repeated_failure([{**failed, "why": ""}] * 3, "c")
    assert never_trained is not None
    assert never_trained.move(3) == "try"
    trained = find_repeated_failure([{**failed, "why": "", "from_step": 30}] * 3, "c")
    assert trained is not None
    assert trained.move(3) == "step back"


def test_a_process_that_goes_again_and_again_from_one_checkpoint_is_a_failure() -> None:
    """Of its memory, say: now a step earlier, now one later. A newer checkpoint begins the count anew."""
    lost = {"ending": "failed", "code": "c", "why": "process 1 is gone", "lost_process": True}
    lines = [
        {**lost, "from_step": 20, "to_step": 40},
        *({**lost, "from_step": 30, "to_step": at} for at in (37, 41, 39)),
    ]
    repeated = find_repeated_failure(lines, "c")
    assert repeated is not None
    assert (repeated.step, repeated.count) == (30, 3)
    # It says nothing about the state: the checkpoint before would lose steps for nothing.
    assert repeated.move(3) == "try"
    assert repeated.move(2) == "give up"
    other = find_repeated_failure([*lines, {"ending": "failed", "code": "c", "why": "", "to_step": 30}], "c")
    assert other is not None
    assert other.count == 1


def test_lines_are_those_of_attempts_whatever_stands_between_them() -> None:
    good = {"attempt": 2, "started": "2026-11-30T00:00:00.000+00:00", "ending": "killed", "to_step": 3, "drift": [1]}
    lines, damaged = parse_attempt_lines(b"\n".join([b"{}", json.dumps(good).encode(), b"\xff", b"", b"[" * 9999]))
    assert damaged == 3
    assert [(line["attempt"], line["drift"]) for line in lines] == [(2, [])]


def test_a_file_that_cannot_be_read_now_is_trouble_and_no_empty_run(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else attempts would count from 1 again, and a run that was taken back be taken back again."""
    whole = files.read_file

    def read(path: Path, limit: int = files.READ_LIMIT) -> bytes:
        if path == run_dir.decisions:
            raise OSError(5, "Input/output error", str(path))
        return whole(path, limit)

    monkeypatch.setattr(files, "read_file", read)
    with pytest.raises(OSError, match="Input/output error"):
        begin(run_dir)


def test_a_folder_of_runs_that_cannot_be_listed_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the same run would be begun a second time, under another name."""
    (tmp_path / "typed-otherwise-0123abcd").mkdir()
    assert find_run_dir(tmp_path, "x", "0123abcd").path.name == "typed-otherwise-0123abcd"
    assert find_run_dir(tmp_path / "none", "x", "0123abcd").path.name == "x-0123abcd"

    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(StorageError, match="cannot be listed"):
        find_run_dir(tmp_path, "x", "0123abcd")


def test_a_start_that_is_no_time_is_not_believed(tmp_path: Path) -> None:
    """A checksum is no signature: the file of somebody else may say that an attempt began at `$(rm -rf ~)`."""
    run_dir = RunDir(tmp_path)
    write_decisions(run_dir, Decisions(attempt=2, started="$(rm -rf ~)", from_step=3))
    found = read_decisions(run_dir, {}, [])
    assert (found.decisions.attempt, found.decisions.started) == (0, "")
    assert found.trouble is not None


def test_the_first_save_is_remembered_where_all_else_is_lost(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    first = begin(run)
    first.begin_training(0, None, "cpu")
    assert not first.was_durable
    first.note(20, {}, 20)
    truncate(run.status)
    assert begin(run).was_durable
