"""Show a person how a sweep stands: a live table on a terminal, a plain line for each change elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from runner.launch.sweep_members import MemberResult, MemberState, SweepMember
from runner.screen import can_draw, fix_unknown_size, stdout_state
from runner.text import format_duration, format_table

HEAD = ("run", "state", "step", "best", "left", "job", "why")
DRAW_SECONDS = 0.5
# More rows do not fit a terminal: the runs that go, failed or wait come first.
MAX_ROWS = 40

# The order in which states are counted, and which of them a person wants to see first.
URGENCY: dict[MemberState, int] = {
    "running": 0,
    "failed": 1,
    "in use": 1,
    "stopped": 1,
    "queued": 2,
    "waiting": 2,
    "finished": 3,
}


class StatusLines:
    """Print a plain line for each change, for pipes and job logs."""

    def __init__(self, members: Sequence[SweepMember], total: int):
        self._members, self._total = members, total

    def show_change(self, number: int, result: MemberResult) -> None:
        """Print the run that stands otherwise than before."""
        print(f"[{number + 1}/{self._total}] {format_status_line(self._members[number], result)}", flush=True)

    def show(self, results: Sequence[MemberResult]) -> None:
        """Print nothing: the changes say all."""

    def close(self) -> None:
        """Do nothing: there is no table to take away."""


class StatusTable(StatusLines):
    """Draw a table anew in place; what ended badly also leaves a line that stays."""

    def __init__(self, members: Sequence[SweepMember], total: int):
        # Here, because a sweep that writes to a pipe or a job log needs no rich.
        from rich.console import Console
        from rich.live import Live

        super().__init__(members, total)
        self._draw_at, self._paces = 0.0, {number: StepPace() for number in range(len(members))}
        width, height = fix_unknown_size()
        console = Console(highlight=False, width=width, height=height)
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def show_change(self, number: int, result: MemberResult) -> None:
        """Draw at the next look, and print the run above the table where it ended badly."""
        self._draw_at = 0.0
        if result.why and result.state != "stopped":
            line = format_status_line(self._members[number], result)
            self._live.console.print(line, markup=False, soft_wrap=True)

    def show(self, results: Sequence[MemberResult]) -> None:
        """Draw the table, now and then."""
        # While nobody takes what is drawn, a table of later is better than all those of now, one after the other.
        if time.monotonic() < self._draw_at or stdout_state() != "works":
            return
        self._draw_at = time.monotonic() + DRAW_SECONDS
        self._live.update("\n".join(format_status_table(self._members, results, self._paces)), refresh=True)

    def close(self) -> None:
        """Take the table away."""
        self._live.stop()


class StepPace:
    """How fast a run goes, from what its status.json said when it was looked at."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def time_left(self, step: int, steps: int) -> str:
        """Return the time to its end, `2m05s`; nothing while that is not known."""
        now = time.monotonic()
        # Counted from the first look, and anew after a rollback or a restart took it back.
        if self._first is None or step < self._first[1]:
            self._first = (now, step)
        since, done = now - self._first[0], step - self._first[1]
        return format_duration(since / done * (steps - step)) if done > 0 and step < steps else ""


def choose_display(members: Sequence[SweepMember], total: int | None = None) -> StatusLines:
    """Return a live table on a terminal, plain lines elsewhere; `total` where more members are to come."""
    return (StatusTable if can_draw() else StatusLines)(members, total or len(members))


def format_status_table(
    members: Sequence[SweepMember], results: Sequence[MemberResult], paces: Mapping[int, StepPace] | None = None
) -> list[str]:
    """Return the lines of a table, a row a run, and a line of counts.

    With `paces` (by the number of a run) it is a live one: with the time left, and at most so many rows as fit.
    """
    numbers = list(range(len(members)))
    if paces:
        numbers = sorted(sorted(numbers, key=lambda number: URGENCY[results[number].state])[:MAX_ROWS])
    rows = [_table_row(members[number], results[number], paces[number] if paces else None) for number in numbers]
    counts = Counter(result.state for result in results)
    tally = ", ".join(f"{counts[state]} {state}" for state in URGENCY if counts[state])
    # Of the words of a run the last tell it from others: the key that they begin with is mostly the same.
    table = format_table(HEAD, rows, right=HEAD[2:5], flexible=("run", "why"), ends=("run",))
    return [*table, f"{len(members)} runs: {tally}"]


def format_status_line(member: SweepMember, result: MemberResult) -> str:
    """Return one run in a line: `ckpt=best remat=full  finished  600 steps, best eval/loss 1.54, 2m05s`."""
    status, again = member.read_status(), f" (try {result.tries})" if result.tries > 1 else ""
    if result.state == "finished":
        best = status.get("best")
        score = f", best {best['metric']} {best['value']:.4f}" if best else ""
        took = f", {format_duration(result.seconds)}" if result.tries else " already"
        return f"{member.name}  finished{again}  {status.get('step', 0)} steps{score}{took}"
    why = f"  {result.why}" if result.why else ""
    state = f"{result.state}, to be tried again" if result.state == "waiting" and result.tries else result.state
    return f"{member.name}  {state}{again}{why}"


def _table_row(member: SweepMember, result: MemberResult, pace: StepPace | None) -> tuple[str, ...]:
    status = member.read_status()
    step, steps, best = int(status.get("step", 0)), _count_steps(member, status), status.get("best")
    left = pace.time_left(step, steps) if pace and steps and result.state == "running" else ""
    score = f"{best['value']:.4f}" if best else ""
    why = result.why if result.state in ("failed", "in use", "queued", "waiting") else ""
    return member.name, result.state, f"{step}/{steps or '?'}", score, left, result.job, why


def _count_steps(member: SweepMember, status: Mapping[str, Any]) -> int | None:
    """Return how long a run is; None while it is not known, for it is so many epochs of data that is not read yet."""
    steps = member.config.train.steps
    return status.get("steps") if steps is None else steps
