"""What a person sees: lines that stay, and on a terminal a progress bar below them. Every line also goes to run.log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from runner.log.sinks import MetricSink
from runner.text import format_duration, utc_now
from runner.values import MetricValues

PLAIN_SECONDS = 10.0  # without a terminal: at most one progress line in this time


class Console(MetricSink, Protocol):
    """Tell a person how a run goes. It is a sink as well: evaluations are worth a line that stays."""

    def say(self, line: str) -> None:
        """Tell a line, or several, that stay."""

    def begin(self, step: int, steps: int) -> None:
        """Take note that training goes on from a step, towards so many."""

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None:
        """Tell how far training is: the completed steps, the last logged metrics, the newest durable step."""


class QuietConsole:
    """Say nothing on the terminal; run.log has the lines all the same."""

    name = "console"

    def __init__(self, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log

    def say(self, line: str) -> None:
        """Append a line to run.log, with the time of day."""
        # Opened for each line, so that no line is in a buffer when a kill comes. A full disk is told by who needs it.
        with suppress(OSError), self._log.open("a") as out:
            out.write("".join(f"{utc_now()} {part}\n" for part in line.splitlines()))

    def begin(self, step: int, steps: int) -> None:
        """Take note that training goes on from a step, towards so many."""
        self._steps, self._first, self._since = steps, step, time.monotonic()

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None:
        """Do nothing: nobody looks."""

    def catch_up(self) -> None:
        """Do nothing: what a person has read stays read."""

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Tell what an evaluation measured; training tells of itself in `tick`."""
        if split != "train":
            self.say(f"step {step:>6}  {split}  {_format_values(metrics)}")

    def close(self) -> None:
        """Do nothing: no file is open."""

    def _steps_per_second(self, step: int) -> float:
        """Return the mean speed since training began, or went on."""
        return (step - self._first) / max(time.monotonic() - self._since, 1e-9)


class PlainConsole(QuietConsole):
    """Print plain lines at a steady cadence, for pipes and job logs."""

    _next_tick = 0.0

    def say(self, line: str) -> None:
        """Print a line, and append it to run.log."""
        super().say(line)
        _print_unless_closed(line)

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None:
        """Print how far training is, now and then; run.log does not get these lines."""
        if time.monotonic() < self._next_tick:
            return
        self._next_tick = time.monotonic() + PLAIN_SECONDS
        speed = self._steps_per_second(step)
        left = format_duration((self._steps - step) / speed) if speed else "?"
        risk = step - (durable_step or 0)
        saved = f"saved {durable_step}, {risk} at risk" if durable_step is not None else "nothing saved yet"
        _print_unless_closed(
            f"step {step:>6}/{self._steps}  loss {metrics['loss']:.4f}  {speed:.1f} steps/s  {left} left  {saved}"
        )


class ProgressBarConsole(QuietConsole):
    """Show a live bar on a terminal, with lines that stay above it."""

    def __init__(self, log: Path):
        # Imported here: a job without a terminal starts sooner without it.
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(log)
        self._rich, self._escape = RichConsole(highlight=False), escape
        columns = (
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("[bold]loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} steps/s"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[saved]}"),
        )
        self._progress = Progress(*columns, console=self._rich, refresh_per_second=5, transient=True)

    def say(self, line: str) -> None:
        """Print a line above the bar, and append it to run.log."""
        super().say(line)
        style = "yellow" if line.startswith("warning") else None
        self._rich.print(self._escape(line), style=style, soft_wrap=True)

    def begin(self, step: int, steps: int) -> None:
        """Start the bar at a step."""
        super().begin(step, steps)
        # After a rollback this comes a second time: the bar of before goes.
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._task = self._progress.add_task("", total=steps, completed=step, loss="…", speed="…", saved="")
        self._progress.start()

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None:
        """Move the bar."""
        saved = "nothing saved yet" if durable_step is None else f"saved {durable_step} · {step - durable_step} at risk"
        speed = f"{self._steps_per_second(step):.1f}"
        self._progress.update(self._task, completed=step, loss=f"{metrics['loss']:.4f}", speed=speed, saved=saved)

    def close(self) -> None:
        """Take the bar away; may be called twice."""
        self._progress.stop()


def choose_console(log: Path, *, wanted: bool) -> Console:
    """Return the console for this process: a bar on a terminal, plain lines elsewhere, nothing where none is wanted."""
    if not wanted:
        return QuietConsole(log)
    return ProgressBarConsole(log) if sys.stdout.isatty() else PlainConsole(log)


def _print_unless_closed(line: str) -> None:
    """Print, unless the reader of a pipe has gone: that must not end a run, and run.log has the lines."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # Into nothing from now on: Python would meet the broken pipe again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _format_values(metrics: MetricValues) -> str:
    ordered = sorted(metrics.items(), key=lambda item: (item[0] != "loss", item[0]))
    return "  ".join(value if isinstance(value, str) else f"{name} {value:.4f}" for name, value in ordered)
