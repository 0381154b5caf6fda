"""A run that goes on on other devices is told that it is no longer the same bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from runner.session.moved_devices import describe_move

ONE, FOUR = {"hardware": "1 × cpu", "from_step": 0}, {"hardware": "4 × cpu (fsdp 4)", "from_step": 0}
NOT_TRAINED = {"hardware": "4 × cpu (fsdp 4)"}


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
        ([ONE, NOT_TRAINED], ""),
    ],
)
def test_the_newest_attempt_that_trained_counts(attempts: list[Any], before: str) -> None:
    line = f"on 1 × cpu, and on {before} before: from here on it is the same to rounding, not bit for bit"
    assert describe_move(attempts, "1 × cpu", "0.10.2", in_parts=False) == (line if before else "")


def test_parts_are_the_same_on_any_number_of_devices_of_one_kind() -> None:
    """Another kind of device, and another XLA, compute other bits all the same."""
    assert describe_move([FOUR], "1 × cpu", "0.10.2", in_parts=True) == ""
    assert "on 1 × H200, and on 4 × cpu (fsdp 4) before" in describe_move([FOUR], "1 × H200", "0.10.2", in_parts=True)
    older = [{**ONE, "packages": {"jaxlib": "0.10.1"}}]
    for in_parts in (False, True):
        line = describe_move(older, "1 × cpu", "0.10.2", in_parts=in_parts)
        assert line.startswith("with jaxlib 0.10.2, and 0.10.1 before: from here on it is the same to rounding")
