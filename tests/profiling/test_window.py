"""Which steps are traced, and what is told where these are others than was asked for."""

from __future__ import annotations

import pytest

from runner.profiling.options import Profile
from runner.profiling.window import Window, plan_window


@pytest.mark.parametrize(
    ("start", "steps", "step", "done", "window", "told"),
    [
        (None, 5, 0, set(), None, ""),
        (100, 5, 0, set(), (100, 104), ""),
        (1, 1, 0, set(), (1, 1), ""),
        (200, 1, 199, set(), (200, 200), ""),
        # Near the end, and beyond it.
        (198, 5, 0, set(), (198, 200), "profile.steps=5: training ends at step 200; traced: steps 198 to 200"),
        (201, 5, 0, set(), None, "profile.start=201: training ends at step 200; nothing is traced"),
        # Training goes on from later than that: after a kill in the middle of the trace, or with another command.
        (100, 5, 102, set(), (103, 107), "profile.start=100: step 100 is past; traced: steps 103 to 107"),
        (100, 5, 102, {100}, None, ""),
        (100, 5, 102, {50}, (103, 107), "profile.start=100: step 100 is past; traced: steps 103 to 107"),
        (100, 5, 200, set(), None, ""),
    ],
)
def test_which_steps_are_traced(
    start: int | None, steps: int, step: int, done: set[int], window: tuple[int, int] | None, told: str
) -> None:
    expected = None if window is None else Window(*window, asked=start)
    assert plan_window(Profile(start=start, steps=steps), step, 200, done) == (expected, told)
