"""What a person sees: lines that stay, and on a terminal a progress bar below them. Every line also goes to run.log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from runner.text import format_duration, utc_now
from runner.values import Values

PLAIN_SECONDS = 10.0  # without a terminal: at most one progress line in this time


class Console(Protocol):
    """What experiment and loop say to a person."""

    def say(self, line: str) -> None: ...
    def begin(self, step: int, steps: int) -> None: ...
    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None: ...
    def log(self, step: int, split: str, metrics: Values) -> None: ...
    def close(self) -> None: ...


class QuietConsole:
    """Says nothing on the terminal; run.log has the lines all the same."""

    def __init__(self, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log

    def say(self, line: str) -> None:
        with suppress(OSError), self._log.open("a") as out:  # a full disk is told by who needs it, on the terminal
            out.write("".join(f"{utc_now()} {part}\n" for part in line.splitlines()))

    def begin(self, step: int, steps: int) -> None:
        self._steps, self._first, self._since = steps, step, time.monotonic()

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None:
        return None

    def log(self, step: int, split: str, metrics: Values) -> None:
        """Evaluations are worth a line that stays."""
        if split != "train":
            self.say(f"step {step:>6}  {split}  {_values(metrics)}")

    def close(self) -> None:
        return None

    def _speed(self, step: int) -> float:
        return (step - self._first) / max(time.monotonic() - self._since, 1e-9)


class PlainConsole(QuietConsole):
    """Plain lines at a steady cadence, for pipes and job logs."""

    _next = 0.0

    def say(self, line: str) -> None:
        super().say(line)
        _show(line)

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PLAIN_SECONDS
        speed = self._speed(step)
        left = format_duration((self._steps - step) / speed) if speed else "?"
        risk = step - (durable_step or 0)
        saved = f"saved {durable_step}, {risk} at risk" if durable_step is not None else "nothing saved yet"
        _show(f"step {step:>6}/{self._steps}  loss {metrics['loss']:.4f}  {speed:.1f} steps/s  {left} left  {saved}")


class ProgressBarConsole(QuietConsole):
    """A live bar on a terminal, with lines that stay above it."""

    def __init__(self, log: Path):
        from rich.console import Console as Rich  # here: a job without a terminal starts sooner without it
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(log)
        self._rich, self._escape = Rich(highlight=False), escape
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
        super().say(line)
        style = "yellow" if line.startswith("warning") else None
        self._rich.print(self._escape(line), style=style, soft_wrap=True)

    def begin(self, step: int, steps: int) -> None:
        super().begin(step, steps)
        for task in self._progress.task_ids:  # of before a rollback
            self._progress.remove_task(task)
        self._task = self._progress.add_task("", total=steps, completed=step, loss="…", speed="…", saved="")
        self._progress.start()

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None) -> None:
        saved = "nothing saved yet" if durable_step is None else f"saved {durable_step} · {step - durable_step} at risk"
        speed = f"{self._speed(step):.1f}"
        self._progress.update(self._task, completed=step, loss=f"{metrics['loss']:.4f}", speed=speed, saved=saved)

    def close(self) -> None:
        self._progress.stop()


def choose_console(log: Path, *, wanted: bool) -> Console:
    """The console for this process: a bar on a terminal, plain lines elsewhere, nothing where none is wanted."""
    if not wanted:
        return QuietConsole(log)
    return ProgressBarConsole(log) if sys.stdout.isatty() else PlainConsole(log)


def _show(line: str) -> None:
    """Print, unless the reader of a pipe has gone: that must not end a run, and run.log has the lines."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _values(metrics: Values) -> str:
    ordered = sorted(metrics.items(), key=lambda item: (item[0] != "loss", item[0]))
    return "  ".join(value if isinstance(value, str) else f"{name} {value:.4f}" for name, value in ordered)
