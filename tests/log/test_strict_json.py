"""What is not finite is written as JSON has it, and read as a number: in the log, the sidecar, the status, results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.record import Record, Sidecar, encode_sidecar, read_sidecar
from runner.drill.compare_runs import read_loss_curves
from runner.files import append_json_line, format_json, parse_nonfinite
from runner.log.jsonl import JsonLinesFile, read_metric_lines, read_metric_lines_after
from runner.rundir.layout import RunDir
from runner.rundir.readme import write_readme

STRANGE = {"nan": math.nan, "up": math.inf, "down": -math.inf}


def parse_strictly(text: str | bytes) -> Any:
    """Return the value of a JSON text as a strict reader (a browser, jq) would read it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(("number", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_a_number_that_json_does_not_have_is_a_text_and_comes_back(number: float, text: str) -> None:
    """At any depth, and beside numbers that JSON has, which stay as json writes them."""
    found = parse_strictly(format_json({"a": [1.5, {"b": number}], "c": (number,), "d": "NaN?"}))
    assert found == {"a": [1.5, {"b": text}], "c": [text], "d": "NaN?"}
    assert repr(parse_nonfinite(text)) == repr(number)
    assert parse_nonfinite("media/eval/7.png") == "media/eval/7.png"


@pytest.mark.parametrize("value", [{"a": 1, "b": [0.1, -0.0, 1e300, None, True, "ü"]}, [], "x", 3])
def test_what_is_finite_is_written_as_before(value: object) -> None:
    """To the byte: digests of logs and sidecars do not change."""
    assert format_json(value, indent=1) == json.dumps(value, indent=1)


def test_the_log_is_strict_json_and_older_lines_are_read_as_well(tmp_path: Path) -> None:
    """Texts of today and bare words of older versions give the same numbers."""
    path = tmp_path / "logs" / "metrics.jsonl"
    log = JsonLinesFile(path, print)
    log.log(1, "eval", {"loss": 0.5, **STRANGE})
    log.close()
    parse_strictly(path.read_bytes())
    with path.open("a") as file:
        file.write('{"step": 2, "split": "eval", "loss": NaN, "up": Infinity, "down": -Infinity}\n')
    (_, _, first), (step, split, second) = read_metric_lines(path)
    assert repr(first) == repr({"loss": 0.5, **STRANGE})
    assert (step, split, repr(second)) == (2, "eval", "{'loss': nan, 'up': inf, 'down': -inf}")
    assert repr(read_metric_lines_after(path, 1, "eval")) == repr([(2, "eval", second)])


def test_a_sidecar_is_strict_json_and_an_older_one_is_read(tmp_path: Path) -> None:
    """What a checkpoint says it measured comes back as numbers."""
    record = Record(7, "test", {"eval/loss": 0.25, **STRANGE}, 1e9)
    content = encode_sidecar(Sidecar(record, {}, None))
    parse_strictly(content)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "holdfast.json").write_bytes(content)
    assert repr(read_sidecar(tmp_path / "7").record.metrics) == repr(dict(record.metrics))


def test_the_status_keeps_what_was_measured_last(tmp_path: Path) -> None:
    """One metric that is not finite does not take the others away from README.md."""
    run = RunDir(tmp_path)
    status = {"state": "finished", "step": 3, "last": {"eval/loss": 0.5, **STRANGE}, "best": None}
    for content in (format_json(status), json.dumps(status)):
        run.status.write_text(content)
        assert repr(run.read_status()["last"]) == repr(status["last"])
    write_readme(run)
    assert "last: eval/loss 0.5, nan nan, up inf, down -inf" in run.readme.read_text()
    run.status.write_text(format_json({**status, "last": {"eval/loss": "0.5"}}))
    assert "last" not in run.read_status()


def test_lines_of_attempts_and_curves_of_a_drill(tmp_path: Path) -> None:
    """Each is strict JSON, and a curve has numbers alone."""
    append_json_line(tmp_path / "attempts.jsonl", {"attempt": 1, "needs": {"flops": math.inf}})
    assert parse_strictly((tmp_path / "attempts.jsonl").read_bytes())["needs"] == {"flops": "Infinity"}
    run = RunDir(tmp_path)
    log = JsonLinesFile(run.metrics, print)
    log.log(1, "train", {"loss": math.inf})
    log.close()
    assert read_loss_curves(run) == {"train": {1: math.inf}}
