"""What a person sees of a sweep: a live table on a terminal, a plain line for each change elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from runner.launch.members import Member, Result, State
from runner.text import format_duration, format_table

HEAD = ("run", "state", "step", "best", "left", "job", "why")
DRAW_SECONDS = 0.5
MOST_ROWS = 40  # more do not fit a terminal: those that go, failed or wait first


class Lines:
    """A plain line for each change, for pipes and job logs."""

    def __init__(self, members: Sequence[Member], total: int):
        self._members, self._total = members, total

    def changed(self, number: int, result: Result) -> None:
        print(f"[{number + 1}/{self._total}] {line(self._members[number], result)}", flush=True)

    def show(self, results: Sequence[Result]) -> None:
        return None

    def close(self) -> None:
        return None


class Live(Lines):
    """A table that is drawn anew in place; what ended badly also leaves a line that stays."""

    def __init__(self, members: Sequence[Member], total: int):
        from rich.console import Console
        from rich.live import Live

        super().__init__(members, total)
        self._next, self._paces = 0.0, {number: Pace() for number in range(len(members))}
        self._live = Live(console=Console(highlight=False), auto_refresh=False, transient=True)
        self._live.start()

    def changed(self, number: int, result: Result) -> None:
        self._next = 0.0
        if result.why and result.state != "stopped":
            self._live.console.print(f"{line(self._members[number], result)}", markup=False, soft_wrap=True)

    def show(self, results: Sequence[Result]) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + DRAW_SECONDS
        self._live.update("\n".join(drawn(self._members, results, self._paces)), refresh=True)

    def close(self) -> None:
        self._live.stop()


class Pace:
    """How fast a run goes, from what its status.json said when it was looked at."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def left(self, step: int, steps: int) -> str:
        """The time to its end, `2m05s`; nothing while that is not known."""
        now = time.monotonic()
        if self._first is None or step < self._first[1]:
            self._first = (now, step)
        since, done = now - self._first[0], step - self._first[1]
        return format_duration(since / done * (steps - step)) if done > 0 and step < steps else ""


def choose(members: Sequence[Member], total: int | None = None) -> Lines:
    """A live table on a terminal, plain lines elsewhere; `total` where more of them are to come."""
    return (Live if sys.stdout.isatty() else Lines)(members, total or len(members))


def drawn(members: Sequence[Member], results: Sequence[Result], paces: dict[int, Pace] | None = None) -> list[str]:
    """The table, a row a run, and a line of counts. With `paces` it is a live one: at most so many rows."""
    order: dict[State, int] = {
        "running": 0,
        "failed": 1,
        "in use": 1,
        "stopped": 1,
        "queued": 2,
        "waiting": 2,
        "finished": 3,
    }
    numbers = range(len(members))
    chosen = sorted(numbers, key=lambda number: order[results[number].state])[:MOST_ROWS] if paces else numbers
    rows = [_row(members[number], results[number], paces[number] if paces else None) for number in sorted(chosen)]
    counts = Counter(result.state for result in results)
    tally = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
    return [*format_table(HEAD, rows, right=HEAD[2:5], flexible=("run", "why")), f"{len(members)} runs: {tally}"]


def line(member: Member, result: Result) -> str:
    """One run in a line: `ckpt=best remat=full  finished  600 steps, best eval/loss 1.54, 2m05s`."""
    status, again = member.status(), f" (try {result.tries})" if result.tries > 1 else ""
    if result.state == "finished":
        best = status.get("best")
        score = f", best {best['metric']} {best['value']:.4f}" if best else ""
        took = f", {format_duration(result.seconds)}" if result.tries else " already"
        return f"{member.name}  finished{again}  {status.get('step', 0)} steps{score}{took}"
    why = f"  {result.why}" if result.why else ""
    state = f"{result.state}, to be tried again" if result.state == "waiting" and result.tries else result.state
    return f"{member.name}  {state}{again}{why}"


def _row(member: Member, result: Result, pace: Pace | None) -> tuple[str, ...]:
    status: dict[str, Any] = member.status()
    step, steps, best = int(status.get("step", 0)), member.config.train.steps, status.get("best")
    left = pace.left(step, steps) if pace and result.state == "running" else ""
    score = f"{best['value']:.4f}" if best else ""
    why = result.why if result.state in ("failed", "in use", "queued", "waiting") else ""
    return member.name, result.state, f"{step}/{steps}", score, left, result.job, why
