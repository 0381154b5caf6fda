"""Where a rule of the user's own ends training: what it is shown, and that it decides by the log alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from runner.config.early_stop import EarlyStop, ExternalStop, read_evaluations
from runner.preempt.stop import Stopped
from runner.train.early_stopper import EarlyStopper, EndRules, UserStopper
from runner.train.loop import Progress, train
from tests.train.test_early_stopper import LOSSES, Measuring, parts_of, write_log

RULES = """seen = []
def below(history, least=1.2):
    seen.append([(step, dict(measured)) for step, measured in history])
    step, loss = history[-1][0], history[-1][1].get("eval/loss", 9.0)
    return f"loss {loss:g} at step {step}" if loss < least else ""
def five(history): return len(history) >= 5
def spoils(history): history[-1][1].clear(), history.clear()
def breaks(history): return history["x"]
def nonsense(history): return 0.5
def never(history): return False
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.py"
    path.write_text(RULES)
    return path


def stopper(rules: Path, log: Path, *names: str, told: list[str] | None = None) -> UserStopper:
    options = {name: ExternalStop(target=f"{rules}:{name}") for name in names}
    say = [].append if told is None else told.append
    return UserStopper(options, log, ["eval"], lambda step: ["eval", "test"], say)


def ended(rules: Path, log: Path, *names: str, first: int = 0, told: list[str] | None = None) -> tuple[int, Measuring]:
    world = Measuring(save_every=100)
    world.batches = world.landed = first
    rule = EndRules(EarlyStopper(EarlyStop(), "min", log), stopper(rules, log, *names, told=told))
    reached = train(parts_of(world, rule), Progress({"step": first}, first), world.flag)  # type: ignore[arg-type]
    return reached.step, world


def test_it_ends_where_any_rule_says_so(rules: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    step, world = ended(rules, none, "never", "below")
    assert (step, world.saved[6][2]) == (6, "loss 1 at step 6")
    assert ended(rules, none, "five")[0] == 15
    assert ended(rules, none, "never")[0] == 18
    assert ended(rules, none)[0] == 18
    both = EndRules(EarlyStopper(EarlyStop(metric="eval/loss", patience=1), "min", none), stopper(rules, none, "five"))
    for number, loss in enumerate(LOSSES[:5], 1):
        both.observe({"eval/loss": loss}, number * 3)
    assert both.reason == f"eval/loss has not improved in 3 evaluations; {rules}:five"


@pytest.mark.parametrize("restored", range(5))
def test_it_decides_by_the_log_from_wherever_it_goes_on(rules: Path, tmp_path: Path, restored: int) -> None:
    log = write_log(tmp_path / "metrics.jsonl", LOSSES[:restored])
    assert ended(rules, log, "five", first=restored * 3)[0] == 15
    # What is there may say so already: nothing is trained.
    done = write_log(tmp_path / "done.jsonl", LOSSES[:5])
    assert ended(rules, done, "five", first=15)[0] == 15


def test_a_rule_is_shown_each_evaluation_and_no_test_set(rules: Path, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step": 3, "split": "train", "loss": 9}\n'
        '{"step": 3, "split": "eval", "loss": 3, "sample": "media/x.png"}\n'
        '{"step": 3, "split": "ema", "loss": 2.5}\n'
        '{"step": 6, "split": "test", "loss": 8}\n'
        '{"step": 9, "split": "eval", "loss": "NaN"}\n'
        '{"step": 9, "split": "rare", "loss": 1.0}\n'
        '{"step": 12, "split": "eval", "lo'
    )
    found = read_evaluations(log, ["eval", "ema", "rare"])
    assert repr(found) == "[(3, {'eval/loss': 3.0, 'ema/loss': 2.5}), (9, {'eval/loss': nan, 'rare/loss': 1.0})]"
    # Of the step where training goes on, what was measured only because it seemed to be the last is not shown.
    target = ExternalStop(target=f"{rules}:below")
    made = UserStopper({"mine": target}, log, ["eval", "rare"], lambda step: ["eval"], print)
    made.observe({"eval/loss": 5.0, "test/loss": 1.0, "rare/loss": 2.0}, 12)
    made.observe({"test/loss": 1.0}, 15)
    seen: list[Any] = _read_seen(rules)
    assert repr(seen[0]) == "[(3, {'eval/loss': 3.0}), (9, {'eval/loss': nan})]"
    assert seen[1][-1] == (12, {"eval/loss": 5.0, "rare/loss": 2.0})
    assert len(seen[-1]) == 3


def test_one_that_fails_or_spoils_what_it_gets_goes_on(rules: Path, tmp_path: Path) -> None:
    told: list[str] = []
    assert ended(rules, tmp_path / "none", "spoils", "breaks", "nonsense", "five", told=told)[0] == 15
    first, second = sorted(told)
    assert first.startswith(f"warning: stop.rules.breaks: {rules}:breaks: TypeError: list indices must be integers")
    assert first.endswith("rules.py, line 8); training goes on; told once")
    assert "gave 0.5 of type float; expected a reason, true, or nothing" in second


def test_a_stop_before_the_rest_is_measured_asks_again(rules: Path, tmp_path: Path) -> None:
    """The evaluation is owed then, and none of it is in the log: whoever goes on measures, and asks."""
    world = Measuring(save_every=100)
    world.stop_in_rest = 6
    rule = stopper(rules, tmp_path / "none", "below")
    try:
        reached = train(parts_of(world, rule), Progress({"step": 0}, 0), world.flag)  # type: ignore[arg-type]
    except Stopped:  # pragma: no cover
        pytest.fail("there was time to save")
    assert (reached.step, reached.owes) == (6, True)


def _read_seen(rules: Path) -> list[Any]:
    seen: list[Any] = sys.modules[str(rules)].seen
    return seen
