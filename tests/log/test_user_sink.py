"""Loggers of the user's own: how they are made, what they are given, and that none of them stops a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runner.config.schema import validate_config
from runner.config.user_code import import_targets
from runner.errors import ConfigError
from runner.log.console import QuietConsole
from runner.log.fanout import fill_in_sinks, open_sinks
from runner.log.options import ExternalSink, LogOptions
from runner.log.sinks import CutPoint, SinkContext
from tests.config.test_config import DOCUMENT, changed

LOGGERS = '''import json, sys

class Lines:
    """Appends what it is asked for to a file beside the run."""
    def __init__(self, run_dir, config, attempt, say, end="."):
        self.out, self.end = open(run_dir / "mine.txt", "a"), end
        say(f"{config['name']} {attempt}")
        config.clear()
    def log(self, step, split, metrics):
        print(step, split, json.dumps(metrics), end=self.end + chr(10), file=self.out, flush=True)
        metrics.clear()
    def close(self): print("closed", file=self.out)

class CatchesUp(Lines):
    def catch_up(self, lines):
        print("caught up", file=self.out)
        for line in lines: self.log(*line)

class Later:
    def __init__(self): self.log = print

def make(run_dir, **options): return Lines(run_dir, {"name": options["name"]}, 0, print)
def log(step, split, metrics, file): open(file, "a").write(f"{step} {split} {metrics.pop('loss')}\\n")
def breaks(step, split, metrics): metrics["none"]
def ends(step, split, metrics): sys.exit(1)
def nothing(): return None
def raises(): raise OSError("no server")
def mute():
    class Mute(Exception):
        __str__ = None
    raise Mute
def catches(): return Catches()
class Catches(Later):
    def catch_up(self, lines): next(lines) and 1 / 0
class NoLog: pass
class Short:
    def log(self, step, metrics): pass
def lazy(step, split, metrics): yield print(step)
async def waits(step, split, metrics): print(step)
class Static(Later):
    @staticmethod
    def log(step, split, metrics): pass
'''


class Run:
    """A run's folder of logs, whose sinks are opened as training opens them."""

    def __init__(self, folder: Path):
        self.folder, self.told = folder, list[str]()
        (folder / "logs").mkdir()
        self.file = folder / "loggers.py"
        self.file.write_text(LOGGERS)

    def context(self, step: int = 0, attempt: int = 1) -> SinkContext:
        document = {"name": "it"}
        return SinkContext(
            self.folder / "logs/metrics.jsonl", CutPoint(step), attempt, document, "same", self.told.append
        )

    def options(self, name: str, /, **options: Any) -> LogOptions:
        sink = ExternalSink(target=f"{self.file}:{name}", options=options)
        return LogOptions(tensorboard=False, sinks={"mine": sink})

    def train(self, first: int, last: int, options: LogOptions, attempt: int = 1) -> None:
        context = self.context(first - 1, attempt)
        fanout = open_sinks(options, context, QuietConsole(self.folder / "run.log"))
        for step in range(first, last + 1):
            fanout.log(step, "train", {"loss": 1.0 / step})
        fanout.close()
        assert context.document == {"name": "it"}

    @property
    def logged(self) -> list[int]:
        """The steps in metrics.jsonl."""
        return [json.loads(line)["step"] for line in (self.folder / "logs/metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_it_is_made_with_what_its_parameters_are_named_after_and_gets_each_line(run: Run) -> None:
    run.train(1, 2, run.options("Lines", end="!"))
    run.train(2, 3, run.options("Lines"), attempt=2)
    lines = (run.folder / "mine.txt").read_text().splitlines()
    assert lines == [
        *('1 train {"loss": 1.0}!', '2 train {"loss": 0.5}!', "closed"),
        # Without `catch_up` only what comes: here what was cut off was logged before.
        *('2 train {"loss": 0.5}.', '3 train {"loss": 0.3333333333333333}.', "closed"),
    ]
    assert run.told == ["it 1", "it 2"]
    # Neither the other sinks nor the truth saw what it did to its copies.
    assert run.logged == [1, 2, 3]


def test_it_catches_up_once_before_the_first_line(run: Run) -> None:
    run.train(1, 3, run.options("Lines"))
    (run.folder / "mine.txt").unlink()
    run.train(3, 3, run.options("CatchesUp"))
    lines = (run.folder / "mine.txt").read_text().splitlines()
    assert [line.partition(" {")[0] for line in lines] == ["caught up", "1 train", "2 train", "3 train", "closed"]


def test_a_function_and_a_factory_will_do_as_well(run: Run) -> None:
    run.train(1, 2, run.options("log", file=str(run.folder / "plain.txt")))
    assert (run.folder / "plain.txt").read_text() == "1 train 1.0\n2 train 0.5\n"
    run.train(3, 3, run.options("make", name="x"))
    assert (run.folder / "mine.txt").read_text().startswith("3 train")
    assert run.logged == [1, 2, 3]
    assert run.told == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("breaks", r"mine stopped logging at step 1: \S+:breaks: KeyError: 'none' \(\S*loggers.py, line \d+\)"),
        ("ends", r"mine stopped logging at step 1: \S+:ends: SystemExit: 1 \(\S*loggers.py, line \d+\)"),
        (
            "nothing",
            r"mine is left out: \S+:nothing: made a NoneType, which has no log\(step, split, metrics\); give it",
        ),
        (
            "lazy",
            r"mine stopped logging at step 1: \S+:lazy: TypeError: gave a generator, which does nothing by itself; ",
        ),
        ("waits", r"mine stopped logging at step 1: \S+:waits: TypeError: gave a coroutine, which does nothing by "),
        ("raises", r"mine is left out: \S+:raises: OSError: no server \(\S*loggers.py, line \d+\)"),
        ("mute", r"mine is left out: \S+:mute: Mute \(\S*loggers.py, line \d+\)"),
        ("catches", r"mine is left out: \S+:catches: ZeroDivisionError: division by zero \(\S*loggers.py, line"),
        ("gone", r"mine is left out: \S+:gone: AttributeError: module .* has no attribute 'gone'"),
    ],
)
def test_one_that_fails_is_left_out_and_told_once(run: Run, name: str, line: str) -> None:
    run.train(1, 1, LogOptions(tensorboard=False))
    run.train(1 + (name == "catches"), 3, run.options(name))
    (told,) = run.told
    assert re.match(f"warning: {line}", told), told
    assert run.logged == [1, 2, 3]
    assert json.loads((run.folder / "logs/lacking.json").read_text()) == {"lacking": ["mine"]}


def test_a_finished_run_is_filled_in_where_its_logger_takes_lines(run: Run) -> None:
    run.train(1, 2, run.options("raises"))
    run.told.clear()
    fill_in_sinks(run.options("CatchesUp"), run.context(2))
    assert run.told == ["it 1", "mine has every line now"]
    assert (run.folder / "mine.txt").read_text().count("train") == 2
    run.train(3, 3, run.options("raises"))
    run.told.clear()
    fill_in_sinks(run.options("Lines"), run.context(3))
    # One that cannot be filled in lacks what it lacks: nothing is claimed.
    assert run.told == ["it 1"]


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("Lines", {"ned": 1}, "log.sinks.mine.options.ned: {target} has no such option; did you mean end?"),
        ("log", {}, "log.sinks.mine.target: {target}(step, split, metrics, file) cannot be called as (step, split, "),
        ("NoLog", {}, "log.sinks.mine.target: {target} has no log(step, split, metrics); give it one"),
        ("Short", {}, "log.sinks.mine.target: {target}.log(self, step, metrics) cannot be called as log(step, split, "),
        ("Gone", {}, "log.sinks.mine.target: {target}: {file} has no 'Gone'"),
    ],
)
def test_what_cannot_be_called_is_refused_in_a_line(run: Run, name: str, options: dict[str, Any], line: str) -> None:
    target = f"{run.file}:{name}"
    sinks = {"mine": {"kind": "external", "target": target, "options": options}}
    config = validate_config(changed(log__sinks=sinks))
    with pytest.raises(ConfigError) as raised:
        import_targets(config, for_training=True)
    assert str(raised.value).startswith(line.format(target=target, file=run.file))


def test_what_can_be_called_is_let_pass(run: Run) -> None:
    for name, options in (
        ("Lines", {"end": ""}),
        ("Later", {}),
        ("Static", {}),
        ("make", {"name": 1, "x": 2}),
        ("log", {"file": ""}),
    ):
        sink = {"kind": "external", "target": f"{run.file}:{name}", "options": options}
        import_targets(validate_config(changed(log__sinks={"mine": sink})), for_training=True)


def test_a_name_of_our_own_is_refused() -> None:
    for name in ("console", "tensorboard", "wandb"):
        with pytest.raises(ConfigError, match=f"log.sinks.{name}: this name is taken by Holdfast's own"):
            validate_config(changed(log__sinks={name: {"kind": "external", "target": "a:b"}}))
    assert "sinks" in validate_config(DOCUMENT).document["log"]
