"""The picture of `goodput`: each attempt a row on the clock of the run, coloured by what its time went to.

Within an attempt the seconds of one kind are drawn together, in the order in which they begin; lost steps come last,
because the last ones are those that are lost. The only file that knows matplotlib. Colours are those of Okabe and Ito,
which people who see red and green alike can tell apart; lost work is hatched as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from runner.inspect.time_account import SEEN, AttemptSpan, TimeAccount
from runner.text import format_count, format_duration, format_percent

INK, FAINT = "#222222", "#9a9a9a"
COLOURS = {
    "import": "#dcdcdc",
    "startup": "#b8b8b8",
    "restore": "#7f7f7f",
    "compile": "#e69f00",
    "data": "#f0e442",
    "progress": "#009e73",
    "eval": "#56b4e9",
    "save": "#cc79a7",
    "lost": "#d55e00",
    "finish": "#0072b2",
    "other": "#f5f5f5",
}
HATCHES = {"lost": "////", "other": "...."}
WORDS = {"lost": "lost, done again", "down": "down", "startup": "start-up", "eval": "evaluation"}
LABELLED = 24  # so many rows have room for a label of their own
TICKS = [count * 10**power for power in range(-2, 6) for count in (1, 2, 3, 5, 6)]
UNITS = (
    (345_600_000, 86_400_000, "days"),
    (7_200_000, 3_600_000, "hours"),
    (300_000, 60_000, "minutes"),
    (0, 1000, "seconds"),
)  # from so many ms on


def draw_timeline(account: TimeAccount, name: str, path: Path) -> None:
    """Write the picture."""
    rows = len(account.spans)
    figure = Figure(
        figsize=(11.5, 2.9 + min(0.42 * rows, 7.0)), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08)
    )
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[max(min(0.42 * rows, 7.0), 0.8), 1.4])
    _attempts(top, account)
    _cumulative(below, account)
    unit, word = next((unit, word) for least, unit, word in UNITS if account.clock >= least)
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    below.xaxis.set_major_locator(MultipleLocator(unit * _even(account.clock / unit)))
    below.set_xlim(0, account.clock or 1)
    below.set_xlabel(f"{word} since the first start", color=INK)
    figure.legend(handles=_legend(account), loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.7)
    took = f"of {format_duration(account.clock / 1000)} in {format_count(rows, 'attempt')}"
    figure.suptitle(
        f"goodput {format_percent(account.buckets['progress'], account.clock)} {took}",
        x=0.012,
        ha="left",
        fontsize=13,
        color=INK,
    )
    top.set_title(name, loc="left", fontsize=9, color=FAINT)
    figure.savefig(path)


def _even(length: float) -> float:
    """A distance of ticks that divides a time axis in at most nine, in numbers that clocks and people like."""
    return next(distance for distance in TICKS if length / distance <= 9)


def _attempts(axes: Axes, account: TimeAccount) -> None:
    for row, span in enumerate(account.spans):
        upto = float(span.start)
        for bucket, colour in COLOURS.items():
            if spent := span.buckets.get(bucket, 0):
                edge: dict[str, Any] = {"hatch": HATCHES[bucket], "edgecolor": "white"} if bucket in HATCHES else {}
                axes.barh(row, spent, left=upto, height=0.72, color=colour, linewidth=0, **edge)
                upto += spent
    for row, (before, after) in enumerate(pairwise(account.spans)):
        # down time: from the end of one row, along the next to its start
        axes.plot([before.end, before.end, after.start], [row + 0.36, row + 1, row + 1], ":", color=FAINT, lw=1.3)
    shown = range(0, len(account.spans), 1 + len(account.spans) // LABELLED)
    axes.set_yticks(list(shown), [_label(account.spans[row]) for row in shown], fontsize=8.5, color=INK)
    axes.set_ylim(len(account.spans) - 0.4, -0.6)
    axes.grid(axis="x", color="#eeeeee")
    _bare(axes, "left", "bottom")


def _label(span: AttemptSpan) -> str:
    how = span.how.partition(",")[0]  # without what the writer of checkpoints did: run.log knows
    return f"{how}   {span.steps}   #{span.number}" if span.steps else f"{how}   #{span.number}"


def _cumulative(axes: Axes, account: TimeAccount) -> None:
    """Progress so far ÷ the clock so far, knowing what was lost later."""
    points = list(_progress(account))
    axes.plot([x for x, _ in points], [100 * y for _, y in points], color=COLOURS["progress"], lw=2)
    axes.fill_between([x for x, _ in points], [100 * y for _, y in points], color=COLOURS["progress"], alpha=0.12, lw=0)
    axes.annotate(
        f"{100 * account.goodput:.1f} %",
        (points[-1][0], 100 * points[-1][1]),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color=COLOURS["progress"],
        weight="bold",
    )
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100], ["0", "50 %", "100 %"], fontsize=8.5, color=INK)
    axes.set_ylabel("goodput so far", color=INK, fontsize=9)
    axes.grid(color="#eeeeee")
    _bare(axes)


def _progress(account: TimeAccount, points: int = 40) -> Iterator[tuple[float, float]]:
    """(clock, goodput until then): progress is spread over the whole of an attempt's training."""
    done = 0.0
    yield 0.0, 0.0
    for span in account.spans:
        before = sum(span.buckets.get(bucket, 0) for bucket in ("import", "startup", "restore", "compile"))
        gained = span.buckets.get("progress", 0)
        training = gained + sum(span.buckets.get(bucket, 0) for bucket in ("data", "eval", "save"))
        for start, length, more in (
            (span.start - span.down, span.down + before, 0),
            (span.start + before, training, gained),
            (span.start + before + training, span.end - span.start - before - training, 0),
        ):
            for point in range(1, points + 1):
                clock, so_far = start + length * point / points, done + more * point / points
                if clock > 0:
                    yield clock, so_far / clock
            done += more


def _legend(account: TimeAccount) -> list[Patch]:
    """What there is, with its share, in the order of the rows."""
    buckets = account.buckets
    patches = []
    for bucket, colour in {**COLOURS, "down": "white"}.items():
        if buckets[bucket] >= SEEN:
            word = f"{WORDS.get(bucket, bucket)}  {format_percent(buckets[bucket], account.clock)}"
            edge: dict[str, Any] = {"hatch": HATCHES.get(bucket), "edgecolor": "white"}
            if bucket == "down":
                edge = {"edgecolor": FAINT, "linestyle": ":", "linewidth": 1.3}
            patches.append(Patch(facecolor=colour, label=word, **edge))
    return patches


def _bare(axes: Axes, *also: str) -> None:
    """No box around it."""
    for side in ("top", "right", *also):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
