"""When a metric has stopped improving: a pure function of what was measured so far."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from runner.checkpoint.record import Mode
from runner.config.early_stop import EarlyStop, count_unimproved, explain_early_stop, read_history
from runner.config.identity import hash_config
from runner.errors import ConfigError
from tests.conftest import composed

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "mode", "least", "count"),
    [
        ([], "min", 0.0, 0),
        ([3.0, 2.0, 1.0], "min", 0.0, 0),
        ([3.0, 2.0, 2.0, 2.0], "min", 0.0, 2),  # equal is no improvement
        ([3.0, 2.0, 2.5, 1.9], "min", 0.0, 0),
        ([0.1, 0.2, 0.3], "max", 0.0, 0),
        ([0.3, 0.2, 0.1], "max", 0.0, 2),
        ([NAN, NAN], "min", 0.0, 2),  # never finite
        ([NAN, 5.0, NAN], "min", 0.0, 1),
        ([5.0, NAN, 4.0], "min", 0.0, 0),
        ([1.0, -INF], "min", 0.0, 1),  # infinitely good is no measurement
        ([1.0, INF], "max", 0.0, 1),
        ([1.0, None, None], "min", 0.0, 2),  # missing
        ([1.0, 0.95, 0.9], "min", 0.1, 2),  # by exactly as much is not more
        ([1.0, 0.95, 0.8], "min", 0.1, 0),
        ([1.0, 0.95, 0.90, 0.85], "min", 0.12, 0),  # small steps add up: compared with the last improvement
        ([0.5, 0.55, 0.45], "max", 0.1, 2),
    ],
)
def test_evaluations_since_the_last_improvement(
    values: list[float | None], mode: Mode, least: float, count: int
) -> None:
    assert count_unimproved(values, mode, least) == count


@pytest.mark.parametrize(
    ("option", "values", "reason"),
    [
        (EarlyStop(metric="eval/loss", patience=1), [1.0], ""),
        (EarlyStop(metric="eval/loss", patience=1), [1.0, 1.0], "eval/loss has not improved in 1 evaluation"),
        (EarlyStop(metric="eval/loss", patience=2), [1.0, 1.0], ""),
        (EarlyStop(metric="eval/loss", patience=2), [1.0, 1.0, 2.0], "eval/loss has not improved in 2 evaluations"),
        (EarlyStop(metric="eval/loss", patience=1, min_improvement=0.5), [1.0, 0.6], "improved by more than 0.5 in 1"),
        (EarlyStop(metric="eval/acc", patience=1, mode="max"), [1.0, 2.0], ""),
        (EarlyStop(metric="eval/acc", patience=1, mode="max"), [2.0, 1.0], "eval/acc has not improved"),
        (EarlyStop(), [1.0] * 99, ""),
    ],
)
def test_training_ends_when_patience_is_used_up(option: EarlyStop, values: list[float], reason: str) -> None:
    found = explain_early_stop(option, "min", values)
    assert reason in found
    assert bool(reason) == bool(found)


def test_the_mode_is_that_of_the_score_unless_one_is_said() -> None:
    values = [1.0, 2.0, 3.0]
    assert explain_early_stop(EarlyStop(metric="e/x", patience=2), "min", values)
    assert not explain_early_stop(EarlyStop(metric="e/x", patience=2), "max", values)
    assert explain_early_stop(EarlyStop(metric="e/x", patience=2, mode="min"), "max", values)


def test_the_history_is_that_of_the_log(tmp_path: Path) -> None:
    """Of its own evaluation alone; numbers that are not finite, of this version and of older ones, and torn lines."""
    log = tmp_path / "metrics.jsonl"
    assert list(read_history(log, "eval/loss")) == []
    log.write_text(
        '{"step": 1, "split": "train", "loss": 9}\n'
        '{"step": 1, "split": "eval", "loss": 3}\n'
        '{"step": 1, "split": "ema", "loss": 8}\n'
        '{"step": 2, "split": "eval", "loss": "NaN"}\n'
        '{"step": 3, "split": "eval", "loss": NaN}\n'
        '{"step": 4, "split": "eval", "accuracy": 1}\n'
        '{"step": 5, "split": "eval", "loss": 2.5}\n'
        '{"step": 6, "split": "eval", "lo'
    )
    assert repr(list(read_history(log, "eval/loss"))) == "[3, nan, nan, None, 2.5]"
    assert list(read_history(log, "ema/loss")) == [8]


def test_what_can_be_said() -> None:
    """The short form, one key at a time, and nothing, which changes no directory of a run."""
    plain = composed("model=mlp", "data=digits")
    short = composed("model=mlp", "data=digits", "stop={metric: eval/loss, patience: 3}")
    assert (short.stop.metric, short.stop.patience, short.stop.min_improvement) == ("eval/loss", 3, 0.0)
    keys = composed("model=mlp", "data=digits", "stop.metric=eval/loss", "stop.patience=3")
    assert keys == short
    assert plain.stop == EarlyStop()
    older = {key: value for key, value in plain.document.items() if key != "stop"}
    older["train"] = {key: value for key, value in older["train"].items() if key != "epochs"}
    assert hash_config(older) == hash_config(plain.document) != hash_config(short.document)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("stop.patience=0", "stop.patience: got 0; expected at least 1"),
        ("stop.min_improvement=-0.1", "stop.min_improvement: got -0.1; expected at least 0"),
        ("+stop.patienc=3", "stop.patienc: unknown key; did you mean patience"),
        ("+train.patience=5", "train.patience: unknown key; say stop.metric=eval/loss stop.patience=N"),
        ("+early_stopping=true", "early_stopping: unknown key; say stop.metric=eval/loss stop.patience=N"),
        ("stop.mode=least", 'stop.mode: got "least"; expected one of min, max'),
    ],
)
def test_what_cannot_be_said(word: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        composed("model=mlp", "data=digits", word)
