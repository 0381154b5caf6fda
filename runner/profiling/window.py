"""Which steps are traced, and what a person is told where these are others than was asked for: pure functions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from runner.profiling.options import Profile


@dataclass(frozen=True)
class Window:
    """The steps that are traced.

    Attributes:
        first: the first of them.
        last: the last of them.
        asked: the step that `profile.start` names; None where the file RUN/PROFILE asked.
    """

    first: int
    last: int
    asked: int | None

    def __str__(self) -> str:
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"


def plan_window(options: Profile, step: int, last_step: int, done: Collection[int]) -> tuple[Window | None, str]:
    """Return which steps to trace, where training goes on from `step`, and a line for a person; both may be nothing.

    `done`: the steps that `profile.start` named when this run was traced before: each is traced once.
    """
    start = options.start
    if start is None or start in done or step >= last_step:
        return None, ""
    if start > last_step:
        return None, f"profile.start={start}: training ends at step {last_step}; nothing is traced"
    first = max(start, step + 1)
    window = Window(first, min(first + options.steps - 1, last_step), start)
    if first > start:
        return window, f"profile.start={start}: step {start} is past; traced: {window}"
    if window.last < first + options.steps - 1:
        return window, f"profile.steps={options.steps}: training ends at step {last_step}; traced: {window}"
    return window, ""
