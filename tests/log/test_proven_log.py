"""metrics.jsonl is the truth, and proven: each checkpoint knows it up to its step, and any other byte is told."""

from __future__ import annotations

import json
import os
import random
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xxhash

from runner.checkpoint.record import list_records
from runner.log.console import QuietConsole
from runner.log.fanout import MetricFanout, open_sinks
from runner.log.jsonl import (
    JsonLinesFile,
    cut_json_lines,
    find_log_damage,
    hash_log,
    open_json_lines,
    parse_metric_line,
    read_metric_lines,
    read_metric_lines_after,
)
from runner.log.options import LogOptions
from runner.log.sinks import CutPoint, LogDigest, SinkContext
from tests.conftest import SMALL, Door

SPLITS = ("train", "eval")


@dataclass
class Training:
    """Lines as a run logs them, the digest of each saved step, and restarts from any of them."""

    logs: Path
    tensorboard: bool = False
    known: list[tuple[int, LogDigest]] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> Path:
        return self.logs / "metrics.jsonl"

    def opened(self, cut_point: CutPoint) -> MetricFanout:
        self.known = [one for one in self.known if one[0] <= cut_point.step]
        context = SinkContext(self.metrics, cut_point, 1, {}, "", self.told.append, self.known)
        return open_sinks(LogOptions(tensorboard=self.tensorboard), context, QuietConsole(self.logs / "run.log"))

    def logged(self, restored: int, last: int, *, owes: bool = False, owed: int | None = None) -> None:
        """Train to a step, evaluate each second one and save each third; leave the evaluation of one step owed."""
        log = self.opened(CutPoint(restored, owes))
        for step in range(restored + (not owes), last + 1):
            if step > restored:
                log.log(step, "train", {"loss": 1.0 / step})
            if step % 2 == 0 and step != owed:
                log.log(step, "eval", {"loss": float(step)})
            if step % 3 == 0:
                assert log.flush()
                digest = log.digest()
                assert digest is not None
                self.known = [one for one in self.known if one[0] != step] + [(step, digest)]
        log.close()


def test_a_digest_is_of_all_bytes_of_the_file_over_any_number_of_starts(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        log = JsonLinesFile(tmp_path / "metrics.jsonl", print)
        log.log(step, "train", {"loss": 1.0})
        assert log.flush()
        content = (tmp_path / "metrics.jsonl").read_bytes()
        assert log.digest() == LogDigest(len(content), xxhash.xxh3_128(content).hexdigest())
        assert hash_log(tmp_path / "metrics.jsonl").digest() == log.digest()
        log.close()


@pytest.mark.parametrize("owes", [False, True])
def test_the_cut_by_lines_is_the_digest_to_the_byte(tmp_path: Path, owes: bool) -> None:
    """The claim that both rest on: what a checkpoint knows is what the log is cut back to, owed evaluations too."""
    training = Training(tmp_path)
    training.logged(0, 7)
    training.logged(6, 12, owed=12 if owes else None)
    saved = dict(training.known)
    # What is owed was made after the start, and a kill came before that was saved.
    log = training.opened(CutPoint(12, owes))
    if owes:
        log.log(12, "eval", {"loss": 0.0})
    for late in (13, 14):
        log.log(late, "train", {"loss": 0.0})
        log.log(late, "eval", {"loss": 0.0})
    log.close()
    whole = training.metrics.read_bytes()
    for step in (3, 6, 9, 12):
        copy = tmp_path / f"copy{step}.jsonl"
        copy.write_bytes(whole)
        cut_json_lines(copy, CutPoint(step, owes=owes and step == 12), tmp_path / "aside")
        assert hash_log(copy).digest() == saved[step]
    assert training.told == []


def test_a_resume_cuts_to_the_byte_whatever_the_lines_after_it_have_become(tmp_path: Path) -> None:
    """A flipped digit makes a late line an early one: by its lines the log would be cut at the wrong place."""
    training = Training(tmp_path)
    training.logged(0, 6)
    good = training.metrics.read_bytes()
    training.logged(6, 8)
    with training.metrics.open("ab") as out:
        out.write(b'{"step": 2, "split": "train", "loss": 0.1}\n\xff\xfe{\n')
    training.logged(6, 6)
    assert training.metrics.read_bytes() == good
    assert training.told == []
    assert b'"step": 2, ' in (tmp_path / "metrics.cut-1.jsonl").read_bytes()


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_is_told_once_with_the_steps_between_which_it_lies(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    training = Training(tmp_path)
    training.logged(0, 12)
    content = bytearray(training.metrics.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    training.metrics.write_bytes(content)
    before = max((step for step, digest in training.known if digest.bytes <= at), default=0)
    after = min(step for step, digest in training.known if digest.bytes > at)
    since = f"after step {before}" if before else "from its beginning"
    said = f"metrics.jsonl is not what was written, {since} up to step {after}"
    assert find_log_damage(training.metrics, training.known) == said
    training.logged(12, 15)
    assert training.told[0] == f"warning: {said}; training goes on, for the state is proven"
    assert len(training.told) <= 2
    assert all("cannot be read and count for nothing" in line for line in training.told[1:])
    # What was trained since is proven, and the same is not said at every start.
    told = list(training.told)
    training.logged(15, 18)
    assert training.told == told
    assert [line[0] for line in read_metric_lines(training.metrics)][-1] == 18


def test_what_is_gone_is_told(tmp_path: Path) -> None:
    for what, said in (
        ("missing", "metrics.jsonl is missing"),
        ("short", "after step 6 up to step 9"),
        ("empty", "from"),
    ):
        training = Training(tmp_path / what)
        training.logged(0, 9)
        if what == "missing":
            training.metrics.unlink()
        else:
            os.truncate(training.metrics, training.metrics.stat().st_size - 1 if what == "short" else 0)
        training.logged(9, 12)
        assert said in training.told[0]
        last = list(read_metric_lines(training.metrics))[-1]
        assert last[:2] == (12, "eval")


def test_a_checkpoint_of_an_older_version_knows_nothing_and_nothing_is_said(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.logged(0, 9)
    training.known = []
    training.logged(9, 12)
    assert training.told == []
    # The newest was made after an error, without its log: the one before it still narrows it down.
    training.known = [one for one in training.known if one[0] <= 3] or [(3, LogDigest(1, "0" * 32))]
    training.logged(12, 13)
    assert "from its beginning up to step 3" in training.told[0]


# --- any bytes ---

STRANGE = (
    *(
        b"",
        b"\n",
        b"\r\n",
        b"\0" * 100 + b"\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
        b"null\n",
        b"1\n",
        b'"x"\n',
        b"{}\n",
    ),
    *(b'{"step": null, "split": "train"}\n', b'{"step": "9", "split": "train"}\n', b'{"step": [], "split": "train"}\n'),
    *(
        b'{"step": true, "split": "train"}\n',
        b'{"step": 1e9, "split": "train"}\n',
        b'{"step": NaN, "split": "train"}\n',
    ),
    *(b'{"step": ' + b"9" * 400 + b', "split": "train"}\n', b'{"step": ' + b"9" * 5000 + b', "split": "eval"}\n'),
    *(
        b'{"step": 5, "split": {}}\n',
        b'{"step": 5, "split": ["train"]}\n',
        b'{"step": 5}\n',
        b'{"step": -1, "split": "eval"}\n',
    ),
    *(b'{"step": 5, "split": "eval", "loss": {}}\n', b'{"step": 5, "split": "eval", "loss": [1]}\n'),
    *(
        b'{"step": 5, "split": "eval", "a": ' + b"9" * 400 + b"}\n",
        b'{"step": 5, "split": "eval", "a": "../../x.png"}\n',
    ),
    *(b'{"step": 5, "split": "eval", "a": "/etc/passwd"}\n', b'{"step": 5, "split": "eval", "a": "\\u0000"}\n'),
    *(b'{"step": 5, "split": "eval", "a": null}\n', b"x" * 300_000, b'{"step": 5, "split": "tr'),
)


@pytest.mark.parametrize("strange", STRANGE, ids=range(len(STRANGE)))
@pytest.mark.parametrize("at_end", [False, True])
def test_no_line_of_any_kind_keeps_a_run_from_going_on(tmp_path: Path, strange: bytes, at_end: bool) -> None:
    """In the log of a run that an older version saved, so that nothing but the lines tells where to cut."""
    training = Training(tmp_path, tensorboard=True)
    training.logged(0, 6)
    training.known = []
    lines = training.metrics.read_bytes().splitlines(keepends=True)
    content = [*lines, strange] if at_end else [*lines[:4], strange, *lines[4:]]
    training.metrics.write_bytes(b"".join(content))
    # The mirror is filled in from the log.
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()
    training.logged(6, 8)
    assert not any("left out:" in line for line in training.told), training.told
    steps = [line[0] for line in read_metric_lines(training.metrics)]
    assert steps[-2:] == [8, 8]
    assert read_metric_lines_after(training.metrics, 6, "eval")[0][:2] == (7, "train")


@pytest.mark.parametrize("seed", range(25))
def test_mutated_logs_are_read_as_far_as_they_can_be(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    training = Training(tmp_path)
    training.logged(0, 9)
    whole, known = training.metrics.read_bytes(), training.known
    for _ in range(12):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at, count = rng.randrange(len(content)), rng.randrange(40)
            content[at : at + count] = rng.choice(
                [b"", b"\n", b"\0" * 9, rng.randbytes(5), b'{"', b"[" * 50_000, content[:60]]
            )
        training.metrics.write_bytes(content)
        training.known, training.told = known, []
        training.logged(rng.choice([0, 3, 6, 9]), 10)
        assert list(read_metric_lines(training.metrics))[-1][:2] == (10, "eval")
        assert all(line.startswith("warning: metrics.jsonl") for line in training.told)


def test_a_value_names_no_file_outside_the_run() -> None:
    """A picture is uploaded and shown: the log of a run from elsewhere must not choose which file of this machine."""
    line = b'{"step": 1, "split": "eval", "a": "%s"}\n'
    assert parse_metric_line(line % b"media/eval/00000001.png") == (1, "eval", {"a": "media/eval/00000001.png"})
    for name in (b"/home/me/.ssh/id", b"../x", b"media/../../x", b".."):
        assert parse_metric_line(line % name) is None


def test_a_line_is_not_swallowed_by_a_torn_one_before_it(tmp_path: Path) -> None:
    """A file that another has written to since; a power cut is cut off at the start."""
    path = tmp_path / "timing.jsonl"
    log = JsonLinesFile(path, print)
    log.write({"step": 1})
    with path.open("ab") as other:
        other.write(b'{"step": 2, "ev')
    log.write({"step": 3})
    log.write({"step": 4})
    log.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "ev\n{"step": 3}\n{"step": 4}\n'
    with path.open("ab") as other:
        other.write(b'{"step": 5, "ev')
    again = JsonLinesFile(path, print)
    again.write({"step": 6})
    again.close()
    assert path.read_bytes().endswith(b'{"step": 5, "ev\n{"step": 6}\n')


def test_a_long_file_without_a_line_is_cut_in_good_time(tmp_path: Path) -> None:
    """Zeros where a power loss has grown a file: each block is looked at once."""
    path = tmp_path / "timing.jsonl"
    path.write_bytes(b'{"step": 1, "event": "train"}\n' + bytes(24 << 20))
    context = SinkContext(tmp_path / "metrics.jsonl", CutPoint(1), 1, {}, "", print)
    log = open_json_lines(path, context)
    log.write({"step": 2})
    log.close()
    assert path.read_bytes() == b'{"step": 1, "event": "train"}\n{"step": 2}\n'


# --- a whole run ---


@pytest.mark.forked(quick=True)
def test_a_damaged_log_is_told_at_the_resume_and_by_verify_and_training_goes_on(door: Door) -> None:
    command = (*SMALL, "train.log_steps=1", "ckpt.save.periodic.steps=10", "retention.last.n=9")
    door.kill_at(45, *command, number=signal.SIGTERM)
    run = door.the_run
    metrics = run / "logs/metrics.jsonl"
    records = list_records(run / "checkpoints")
    whole = metrics.read_bytes()
    for record in records:
        assert record.log is not None
        content = whole[: record.log.bytes]
        assert record.log == LogDigest(len(content), xxhash.xxh3_128(content).hexdigest())
        assert json.loads(content.splitlines()[-1])["step"] == record.step
    assert len(records) >= 4
    at = whole.index(b'"loss": ', whole.index(b'"step": 15,')) + 12
    metrics.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    from runner.__main__ import main as verbs

    assert verbs(["verify", str(run), "--all"]) == 3
    done = door.run(*command)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"warning: metrics.jsonl is not what was written, .*", done.stdout + done.stderr)
    assert said == [
        "warning: metrics.jsonl is not what was written, after step 10 up to step 20; training goes on, for the state "
        "is proven"
    ]
    assert metrics.read_bytes()[: len(whole)] == whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    assert [line[0] for line in read_metric_lines(metrics) if line[1] == "train"] == list(range(1, 61))
