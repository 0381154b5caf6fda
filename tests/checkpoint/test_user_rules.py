"""Rules of the user's own: what they are given, what they may return, and that none of them ends training."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoint.record import Record, Score, list_records
from runner.checkpoint.retention import DiskBudget, ExternalRetention, KeepAll, KeepLast, max_kept, select_survivors
from runner.checkpoint.strategy import ExternalSave, History, SaveRule, find_save_reason
from runner.checkpoint.user_rules import ask_user_rules, clean_line
from runner.values import StepInfo
from tests.checkpoint.test_checkpointer import Fake, items, saver

SCORE = Score()
RECORDS = tuple(Record(step, "test", {"eval/loss": 9.0 - step}, 0.0, num_bytes=10) for step in (1, 2, 3, 4))
HISTORY = History(RECORDS, tried_step=4)
INFO = StepInfo(5, {"eval/loss": 1.0}, 10.0, [3.0, 2.0])

# Each says the line in which it is wrong, or nothing where it is right.
SAVES = {
    "lambda info, history: info.step == 5 and history.last_step == 4": ("rules.py:rule", ""),
    "lambda info, history: 'a\\nreason \\x1b[31m\\ud800' * 90": ("a reason", ""),
    "lambda info, history: None": (None, ""),
    "lambda info, history: ''": (None, ""),
    "lambda info, history: np.float32(1) < 2": ("rules.py:rule", ""),
    "lambda info, history: np.zeros(()) > 2": (None, ""),
    "lambda info, history: 1 / 0": (None, "ZeroDivisionError: division by zero (rules.py, line 4)"),
    "lambda info, history: float('nan')": (None, "gave nan of type float; expected a reason, true, or nothing"),
    "lambda info, history: 10 ** 5000": (None, "gave a int; expected a reason"),
    "lambda info, history: [1, 2]": (None, "gave a list; expected a reason"),
    "lambda info, history: np.zeros(3) < 1": (None, "gave a ndarray; expected a reason"),
    "lambda info, history: (x for x in 'ab')": (None, "gave a generator; expected a reason"),
    "lambda info, history: sys.exit(3)": (None, "SystemExit: 3 (rules.py, line 4)"),
    "lambda info: True": (None, "TypeError: rule() takes 1 positional argument but 2 were given (rules.py, line 4)"),
    "lambda info, history: info.metrics.clear() or info.losses.append(1)": (None, "AttributeError: 'tuple' object"),
    "lambda info, history: history.records[0].metrics.clear()": (None, "TypeError: a rule may not change what it is"),
    "lambda info, history: setattr(info, 'step', 1)": (None, "FrozenInstanceError: cannot assign to field 'step'"),
    "lambda info, history: (_ for _ in ()).throw(Mute)": (None, "Mute (rules.py, line 4)"),
    "lambda info, history: rule(info, history)": (None, "RecursionError: maximum recursion depth exceeded"),
}
KEEPS = {
    "lambda records: [1, 3]": ([1, 3, 4], ""),
    "lambda records: np.array([1, 3])": ([1, 3, 4], ""),
    "lambda records: {np.int64(2): 'because', 99: 'gone'}": ([2, 4], ""),
    "lambda records: (record for record in records if record.step < 3)": ([1, 2, 4], ""),
    "lambda records: [10 ** 400, -1, 77]": ([4], ""),
    "lambda records: []": ([4], ""),
    "lambda records: None": ([1, 2, 3, 4], "gave a NoneType; expected the steps to keep, as whole numbers"),
    "lambda records: 'newest'": ([1, 2, 3, 4], "gave 'newest' of type str; expected the steps"),
    "lambda records: ['1']": ([1, 2, 3, 4], "gave '1' of type str; expected the steps"),
    "lambda records: [float('nan')]": ([1, 2, 3, 4], "gave nan of type float; expected the steps"),
    "lambda records: [r.step > 2 for r in records]": ([1, 2, 3, 4], "gave False of type bool; expected the steps"),
    "lambda records: (1 // (2 - r.step) for r in records)": ([1, 2, 3, 4], "ZeroDivisionError: integer division or"),
    "lambda records: itertools.count()": ([1, 2, 3, 4], "gave 1,000,000 steps or more; expected those to keep"),
    "lambda records: records.clear()": ([1, 2, 3, 4], "AttributeError: 'tuple' object has no attribute 'clear'"),
    "lambda records: [records[0].metrics.update(x=1)]": ([1, 2, 3, 4], "TypeError: a rule may not change what it is"),
    "lambda records: exit()": ([1, 2, 3, 4], "SystemExit: None (rules.py, line 4)"),
    "lambda: [1]": ([1, 2, 3, 4], "TypeError: rule() takes 0 positional arguments but 1 was given (rules.py, line 4)"),
}


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a rule to a file; each time a new one, for a file is imported once."""
    files: list[str] = []

    def write(source: str) -> str:
        folder = tmp_path / f"rules{len(files)}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        files.append(source)
        lines = (
            "import itertools, sys, numpy as np",
            "class Mute(Exception):",
            "    __str__ = None",
            f"rule = {source}",
        )
        (folder / "rules.py").write_text("\n".join(lines) + "\n")
        return str(folder / "rules.py") + ":rule"

    return write


@pytest.mark.parametrize("source", list(SAVES))
def test_when_to_save(source: str, named: Callable[[str], str]) -> None:
    wanted, line = SAVES[source]
    told: list[str] = []
    target, before = named(source), copy.deepcopy((INFO, HISTORY))
    rules, _ = ask_user_rules({"mine": ExternalSave(target=target)}, {}, told.append)
    reasons = {find_save_reason(rules, INFO, HISTORY) for _ in range(3)}
    (reason,) = reasons
    assert before == (INFO, HISTORY)
    if wanted is None or reason is None:
        assert reason == wanted
    else:
        assert wanted in reason
        assert (len(reason) <= 200, reason.isprintable(), reason.encode() != b"") == (True, True, True)
    # Once, however often it is asked.
    assert len(told) == bool(line)
    if line:
        assert told[0].startswith(f"warning: ckpt.save.mine: {target}: ")
        assert line in told[0].replace("<lambda>", "rule")
        assert told[0].endswith("; it saves nothing; told once")
        assert "\n" not in told[0]


@pytest.mark.parametrize("source", list(KEEPS))
def test_which_stay(source: str, named: Callable[[str], str]) -> None:
    """The newest, which is the best here, stays whatever a rule says."""
    wanted, line = KEEPS[source]
    told: list[str] = []
    target, before = named(source), copy.deepcopy(RECORDS)
    _, rules = ask_user_rules({}, {"mine": ExternalRetention(target=target)}, told.append)
    for _ in range(2):
        assert list(select_survivors(rules, RECORDS, SCORE)) == wanted
    assert before == RECORDS
    assert len(told) == bool(line)
    if line:
        assert line in told[0].replace("<lambda>", "rule")
        assert told[0].endswith("; every checkpoint stays; told once")


def test_options_are_given_each_time_as_they_are_written(named: Callable[[str], str]) -> None:
    target = named("lambda info, history, seen: seen.append(1) or f'{len(seen)} seen, {sum(seen[0])}'")
    rules, _ = ask_user_rules({"mine": ExternalSave(target=target, options={"seen": [{"3": "a"}]})}, {}, print)
    # Whole numbers that are keys are text in a document.
    assert [find_save_reason(rules, INFO, HISTORY) for _ in range(2)] == ["2 seen, 3"] * 2


def test_copies_of_records_are_plain_and_made_once(named: Callable[[str], str]) -> None:
    """A rule is asked after every step, and a run may have thousands of checkpoints."""
    seen: list[Any] = []
    target = named("lambda info, history, **more: seen(history.records)")
    rules, _ = ask_user_rules({"mine": ExternalSave(target=target)}, {}, print)
    sys.modules[target.rpartition(":")[0]].seen = lambda records: seen.append(records)  # type: ignore[attr-defined]
    for records in (RECORDS, RECORDS, RECORDS[:2]):
        find_save_reason(rules, INFO, replace(HISTORY, records=records))
    assert seen[0] is seen[1]
    assert (seen[0], seen[2]) == (RECORDS, RECORDS[:2])
    assert asdict(seen[0][0]) == asdict(RECORDS[0])
    assert type(copy.deepcopy(seen[0][0]).metrics) is dict


def test_an_option_runs_no_code_and_keeps_everything() -> None:
    """What looks at somebody else's run has options alone; a budget drops nothing where it is not known of what."""
    keep = {"mine": ExternalRetention(target="evil:rule"), "last": KeepLast(n=1), "budget": DiskBudget(bytes=20)}
    kept = select_survivors(keep, RECORDS, SCORE)
    assert list(kept) == [1, 2, 3, 4]
    assert kept[1] == "evil:rule is asked in training alone"
    assert max_kept(keep, 100) is None
    assert find_save_reason({"mine": ExternalSave(target="evil:rule")}, INFO, HISTORY) is None


def test_a_budget_holds_where_a_rule_is_asked(named: Callable[[str], str]) -> None:
    for source in ("lambda records: [1, 2, 3]", "lambda records: 1 / 0"):
        keep = {"mine": ExternalRetention(target=named(source)), "budget": DiskBudget(bytes=20)}
        _, rules = ask_user_rules({}, keep, lambda line: None)
        assert list(select_survivors(rules, RECORDS, SCORE)) == [3, 4]


@pytest.mark.parametrize("background", [False, True])
def test_the_checkpointer_asks_and_tells(tmp_path: Path, named: Callable[[str], str], background: bool) -> None:
    """Also what a rule of retention has to tell, which is asked in the background: from the training thread, once."""
    when, which = named("lambda info, history: info.step % 2 == 0"), named("lambda records: ['x']")
    made, told, _ = saver(
        tmp_path / "saved",
        {"mine": ExternalRetention(target=which)},
        save={"mine": ExternalSave(target=when)},
        background=background,
        bytes_=Fake(),
    )
    for step in range(1, 7):
        info = StepInfo(step, {"eval/loss": 1.0 / step})
        if reason := made.due(info):
            assert reason == when
            made.save(reason, info, items(step))
    made.close()
    assert [record.step for record in list_records(tmp_path / "saved")] == [2, 4, 6]
    (line,) = told
    assert line.startswith(f"warning: retention.mine: {which}: gave 'x' of type str")


def test_one_is_asked_at_every_step_while_a_save_is_under_way(tmp_path: Path, named: Callable[[str], str]) -> None:
    """Training waits where it says yes: of `step % 3 == 0` no later step is one. What is being written counts as there."""
    for source, saved in {
        "lambda info, history: info.step % 3 == 0": [3, 6, 9],
        "lambda info, history: info.step >= 3 + max((r.step for r in history.records), default=0)": [3, 6, 9],
    }.items():
        store, folder = Fake(), tmp_path / str(len(list(tmp_path.iterdir())))
        save: dict[str, SaveRule] = {"mine": ExternalSave(target=named(source))}
        made, told, _ = saver(folder, {"all": KeepAll()}, save=save, background=True, bytes_=store)
        for step in range(1, 10):
            info = StepInfo(step, {})
            if step % 3 == 0:
                # At once, or when training has waited a little.
                threading.Timer(0.05, store.gate.set).start()
            if reason := made.due(info):
                made.save(reason, info, items(step))
                store.gate.clear()
            elif step > 3:
                assert not store.gate.is_set()
        store.gate.set()
        made.close()
        assert ([record.step for record in list_records(folder)], told) == (saved, [])


def test_a_line_of_somebody_is_a_line() -> None:
    assert clean_line("a\n b\t\x1b[1m\ud800" + "c" * 999) == "a b ·[1m?" + "c" * 190 + "…"
