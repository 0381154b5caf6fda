"""A run that goes on on other devices is told that it is no longer the same bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from runner.session.attempt import describe_move

ONE, FOUR = {"hardware": "1 × cpu"}, {"hardware": "4 × cpu (fsdp 4)"}


@pytest.mark.parametrize(
    ("attempts", "before"),
    [
        ([], ""),
        ([{}], ""),
        ([ONE], ""),
        ([FOUR, ONE], ""),
        ([FOUR], "4 × cpu (fsdp 4)"),
        ([ONE, FOUR], "4 × cpu (fsdp 4)"),
        # One that ended before it trained has none.
        ([FOUR, {}], "4 × cpu (fsdp 4)"),
    ],
)
def test_the_newest_attempt_that_trained_counts(attempts: list[Any], before: str) -> None:
    line = f"on 1 × cpu, and on {before} before: from here on it is the same to rounding, not bit for bit"
    assert describe_move(attempts, "1 × cpu") == (line if before else "")
