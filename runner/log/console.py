"""What a person sees: lines that stay, and on a terminal a progress bar below them. Every line also goes to run.log.

What becomes of the terminal is no concern of the run: screen.py sees to it that printing neither raises nor blocks, and
that lines did not arrive there is told in run.log, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from runner import screen
from runner.files import append_text, make_folder
from runner.log.sinks import MetricSink
from runner.text import format_duration, mask_lines, utc_now
from runner.values import MetricValues, Speed

PLAIN_SECONDS = 10.0  # without a terminal: at most one progress line in this time
WIDEST_BAR, NARROWEST_BAR = 28, 6  # in characters
BAR_SECONDS = 0.2  # on a terminal: the bar is drawn at most once in this time


class Console(MetricSink, Protocol):
    """Tell a person how a run goes. It is a sink as well: evaluations are worth a line that stays."""

    def say(self, line: str) -> None:
        """Tell a line, or several, that stay."""

    def begin(self, step: int, steps: int) -> None:
        """Take note that training goes on from a step, towards so many."""

    def watch_remote(self, find_newest: Callable[[], int | None]) -> None:
        """Take note that the run lives in a bucket as well, and who knows the newest step there; None is none."""

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None, speed: Speed) -> None:
        """Tell how far training is: completed steps, the last logged metrics, the newest durable step, the speed."""


class QuietConsole:
    """Say nothing on the terminal; run.log has the lines all the same."""

    name = "console"
    _find_newest_remote: Callable[[], int | None] | None = None

    def __init__(self, log: Path):
        make_folder(log.parent)
        self._log = log

    def say(self, line: str) -> None:
        """Append a line to run.log, with the time of day."""
        self._append(mask_lines(line))
        self._tell_losses()

    def begin(self, step: int, steps: int) -> None:
        """Take note that training goes on from a step, towards so many."""
        self._steps, self._first, self._since = steps, step, time.monotonic()

    def watch_remote(self, find_newest: Callable[[], int | None]) -> None:
        """Take note that the run lives in a bucket as well, and who knows the newest step there; None is none."""
        self._find_newest_remote = find_newest

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None, speed: Speed) -> None:
        """Do nothing: nobody looks."""

    def catch_up(self) -> None:
        """Do nothing: what a person has read stays read."""

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Tell what an evaluation measured; training tells of itself in `tick`."""
        if split != "train":
            self.say(f"step {step:>6}  {split}  {_format_values(metrics)}")

    def close(self) -> None:
        """Tell in run.log what became of the lines for the terminal; no file is open."""
        self._tell_losses()

    def _append(self, line: str) -> None:
        # At once, so that no line is in a buffer when a kill comes. A full disk is told by who needs it.
        with suppress(OSError):
            append_text(self._log, "".join(f"{utc_now()} {part}\n" for part in line.splitlines()))

    def _tell_losses(self) -> None:
        for loss in screen.take_screen_losses():
            self._append(f"warning: what goes to {loss} does not arrive; every line is in this file")

    def _list_saved(self, step: int, durable_step: int | None) -> list[str]:
        """Return what is saved, what is remote and what is at risk: `saved 400`, `remote 300`, `120 at risk`."""
        if durable_step is None:
            return ["nothing saved yet"]
        if self._find_newest_remote is None:
            return [f"saved {durable_step}", f"{step - durable_step} at risk"]
        # The disk may go with the machine: what is on it alone is at risk as well.
        newest = self._find_newest_remote()
        there = "nothing remote yet" if newest is None else f"remote {newest}"
        return [f"saved {durable_step}", there, f"{step - (newest or 0)} at risk"]

    def _estimate_left(self, step: int) -> str:
        """Return how long training will still take, as fast as it went since it began or went on; all included."""
        took, done = time.monotonic() - self._since, step - self._first
        return format_duration((self._steps - step) * took / done) if done else "?"


class PlainConsole(QuietConsole):
    """Print plain lines at a steady cadence, for pipes and job logs."""

    _next_tick = 0.0

    def say(self, line: str) -> None:
        """Print a line, and append it to run.log."""
        # It may quote what lies on a disk, which must not command the terminal.
        line = mask_lines(line)
        self._append(line)
        screen.print_line(line)
        self._tell_losses()

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None, speed: Speed) -> None:
        """Print how far training is, now and then; run.log does not get these lines."""
        # While nobody reads, what may still be kept for a reader is for lines that stay.
        if time.monotonic() < self._next_tick or screen.stdout_state() == "waits":
            return
        self._next_tick = time.monotonic() + PLAIN_SECONDS
        saved = ", ".join(self._list_saved(step, durable_step))
        pace, left = "  ".join(list_rates(speed)), self._estimate_left(step)
        screen.print_line(f"step {step:>6}/{self._steps}  {_format_loss(metrics)}  {pace}  {left} left  {saved}")


class ProgressBarConsole(QuietConsole):
    """Show a live bar on a terminal, with lines that stay above it.

    The bar is drawn by `tick`, in the training thread: nothing of it changes between two ticks. Where drawing fails the
    bar is given up.
    """

    def __init__(self, log: Path):
        # Imported here: a job without a terminal starts sooner without it.
        from rich.console import Console as RichConsole
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        super().__init__(log)
        width, height = screen.fix_unknown_size()
        self._rich, self._escape = RichConsole(highlight=False, width=width, height=height), escape
        self._bar = BarColumn(bar_width=WIDEST_BAR)
        columns = (
            self._bar,
            MofNCompleteColumn(),
            TextColumn("[bold]{task.fields[loss]}"),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[saved]}"),
        )
        self._progress = Progress(*columns, console=self._rich, auto_refresh=False, transient=True)
        self._next_draw, self._has_bar = 0.0, True

    def say(self, line: str) -> None:
        """Print a line above the bar, and append it to run.log."""
        line = mask_lines(line)
        self._append(line)
        if screen.stdout_state() == "failed":
            self._give_up_bar()
        style = "yellow" if line.startswith("warning") else None
        with self._drawing():
            self._rich.print(self._escape(line), style=style, soft_wrap=True)
        self._tell_losses()

    def begin(self, step: int, steps: int) -> None:
        """Start the bar at a step."""
        super().begin(step, steps)
        with self._drawing():
            # After a rollback this comes a second time: the bar of before goes.
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            fields = {"loss": "loss …", "pace": "… steps/s", "saved": ""}
            self._task = self._progress.add_task("", total=steps, completed=step, **fields)  # type: ignore[arg-type]
            self._progress.start()

    def tick(self, step: int, metrics: Mapping[str, float], durable_step: int | None, speed: Speed) -> None:
        """Move the bar."""
        state = screen.stdout_state()
        if state == "failed":
            self._give_up_bar()
        # While the terminal is stopped (Ctrl-S), a bar of later is better than all those of now, one after the other.
        if not self._has_bar or state == "waits" or time.monotonic() < self._next_draw:
            return
        self._next_draw = time.monotonic() + BAR_SECONDS
        loss, saved = _format_loss(metrics), " · ".join(self._list_saved(step, durable_step))
        # What is in a line beside the bar and the rates: `420/600`, what it was told, the time that is left, spaces.
        beside = 2 * len(str(self._steps)) + 1 + len(loss) + len(saved) + len("0:01:30") + 5
        pace, bar_width = fit_rates(list_rates(speed), self._rich.width - beside)
        with self._drawing():
            self._bar.bar_width = bar_width
            self._progress.update(self._task, completed=step, loss=loss, pace=pace, saved=saved, refresh=True)

    def close(self) -> None:
        """Take the bar away; may be called twice."""
        with self._drawing():
            self._progress.stop()
        super().close()

    def _give_up_bar(self) -> None:
        """Draw no bar from now on: the terminal has gone."""
        if self._has_bar:
            self._has_bar = False
            with self._drawing():
                self._progress.stop()

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Give the bar up where drawing fails: terminals, and what they say of themselves, are of many kinds."""
        try:
            yield
        except Exception as error:
            if self._has_bar:
                self._has_bar = False
                self._append(f"warning: the progress bar is left out: {type(error).__name__}: {error}")


def choose_console(log: Path, *, wanted: bool) -> Console:
    """Return the console for this process: a bar on a terminal, plain lines elsewhere, nothing where none is wanted."""
    if not wanted:
        return QuietConsole(log)
    return ProgressBarConsole(log) if screen.can_draw() else PlainConsole(log)


def list_rates(speed: Speed) -> list[str]:
    """Return how fast training is: `12.5 steps/s`, `102k tokens/s` or `1.6k examples/s`, `MFU 41.2 %` where known."""
    rates = [f"{_format_rate(speed.steps)} steps/s"]
    if speed.tokens is not None:
        rates.append(f"{_format_rate(speed.tokens)} tokens/s")
    elif speed.examples is not None:
        rates.append(f"{_format_rate(speed.examples)} examples/s")
    if speed.mfu is not None:
        rates.append(f"MFU {100 * speed.mfu:.1f} %")
    return rates


def fit_rates(rates: list[str], room: int) -> tuple[str, int]:
    """Return the rates that have room beside a bar, the first of them always, and the width of the bar."""
    while len(rates) > 1 and len(" · ".join(rates)) + NARROWEST_BAR > room:
        # Tokens follow from steps; the share of the peak does not.
        rates = [rates[0], *rates[2:]]
    pace = " · ".join(rates)
    return pace, min(max(room - len(pace), NARROWEST_BAR), WIDEST_BAR)


def _format_rate(rate: float) -> str:
    """Return a number of things a second in two digits or more: `0.42`, `12.5`, `1.62k`, `102k`, `1.1M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rate >= 0.9995 * size:
            return f"{rate / size:.3g}{unit}"
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


def _format_loss(metrics: Mapping[str, float]) -> str:
    """Return `loss 0.1234`; of a program that has none, its first metric."""
    name = "loss" if "loss" in metrics else next(iter(metrics))
    return f"{name} {metrics[name]:.4f}"


def _format_values(metrics: MetricValues) -> str:
    ordered = sorted(metrics.items(), key=lambda item: (item[0] != "loss", item[0]))
    return "  ".join(value if isinstance(value, str) else f"{name} {value:.4f}" for name, value in ordered)
