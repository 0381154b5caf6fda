"""A program whose step is traced to something else in another process, though nothing of it has changed, is told."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest

from runner.session import attempt
from runner.trace import trace_digest

FACTS = {
    "external": {"program.target": {"target": "own.py:Program", "file": "own.py", "hash": "1"}},
    "drift": [],
    "packages": {"jax": "1"},
    "python": "3",
    "code": "c",
}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function: (earlier attempts, digest now, other facts) → what is said."""

    def compare_traces(before: list[dict[str, Any]], traced: str, **other: Any) -> list[str]:
        said: list[str] = []
        facts = {**FACTS, **other}
        log = SimpleNamespace(record=lambda **more: facts.update(more), facts=facts)
        monkeypatch.setattr(attempt, "read_attempts", lambda run_dir: before)
        monkeypatch.setattr(attempt, "describe_hardware", lambda built: "1 × cpu")
        context = SimpleNamespace(attempt=log, run_dir=None, console=SimpleNamespace(say=said.append))
        attempt._compare_traces(context, SimpleNamespace(traced=traced))  # type: ignore[arg-type]
        assert facts["traced"] == traced
        return said

    return compare_traces


def test_another_trace_of_the_same_code_is_told(compare: Any) -> None:
    earlier = {**FACTS, "attempt": 3, "traced": "a", "hardware": "1 × cpu"}
    (line,) = compare([earlier, {"attempt": 4}], "b")
    assert "step computes something else than in attempt 3" in line
    assert compare([earlier], "a") == []
    assert compare([], "b") == []
    assert compare([{"attempt": 1}], "b") == []


@pytest.mark.parametrize(
    "changed",
    [
        {"external": {}},
        {"drift": ["program.options.lr: 1 → 2"]},
        {"packages": {"jax": "2"}},
        {"python": "4"},
        {"code": "d"},
    ],
)
def test_what_has_changed_is_told_elsewhere(compare: Any, changed: dict[str, Any]) -> None:
    assert compare([{**FACTS, "attempt": 1, "traced": "a", "hardware": "1 × cpu"}], "b", **changed) == []
    assert compare([{**FACTS, "attempt": 1, "traced": "a", "hardware": "2 × cpu"}], "b") == []


class Name(str):
    """A text whose place in a set is given, as another process gives it another one."""

    place = 0

    def __hash__(self) -> int:
        return self.place


def test_the_order_of_a_set_is_no_part_of_a_digest() -> None:
    digests = []
    for places in ((0, 1), (1, 0)):
        names = [Name("data"), Name("model")]
        for name, place in zip(names, places, strict=True):
            name.place = place
        digest = hashlib.sha256()
        trace_digest._add(digest, frozenset(names))
        digests.append((repr(frozenset(names)), digest.hexdigest()))
    assert digests[0][0] != digests[1][0]
    assert digests[0][1] == digests[1][1]
