"""The picture of `goodput`: each attempt a row on the clock of the run, coloured by what its time went to.

Within an attempt the seconds of one kind are drawn together, in the order in which they begin; lost steps come last,
because the last ones are those that are lost. Lost work is hatched as well as coloured.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

from runner.inspect.time_account import SHOWN_MILLISECONDS, STARTING_BUCKETS, AttemptSpan, TimeAccount
from runner.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY_BLUE, STYLE, VERMILLION, YELLOW
from runner.text import format_count, format_duration, format_percent, mask_unprintable, shorten

# In the order in which they are drawn within an attempt.
COLOURS = {
    "import": "#dcdcdc",
    "startup": "#b8b8b8",
    "restore": "#7f7f7f",
    "compile": ORANGE,
    "data": YELLOW,
    "progress": GREEN,
    "eval": SKY_BLUE,
    "save": PURPLE,
    "lost": VERMILLION,
    "profile": INK,
    "finish": BLUE,
    "other": "#f5f5f5",
}
HATCHES = {"lost": "////", "other": "...."}
LABELS = {"lost": "lost, done again", "startup": "start-up", "eval": "evaluation"}
# So many rows have room for a label of their own.
MOST_LABELS = 24
ROW_INCHES, MOST_INCHES = 0.42, 7.0
TICK_STEPS = [count * 10**power for power in range(-2, 6) for count in (1, 2, 3, 5, 6)]
# From so many milliseconds on, the axis counts in units of so many milliseconds.
CLOCK_UNITS = (
    (345_600_000, 86_400_000, "days"),
    (7_200_000, 3_600_000, "hours"),
    (300_000, 60_000, "minutes"),
    (0, 1000, "seconds"),
)


def draw_timeline(account: TimeAccount, name: str, path: Path) -> None:
    """Write the picture of one run, with `name` above it; the suffix of `path` says in which format."""
    num_rows = len(account.spans)
    height = min(ROW_INCHES * num_rows, MOST_INCHES)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 2.9 + height), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.08))
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=[max(height, 0.8), 1.4])
        _draw_attempts(top, account)
        _draw_goodput(below, account)
        _scale_clock(below, account.clock)
        figure.legend(handles=_make_legend(account), loc="outside right upper", frameon=False, labelspacing=0.7)
        goodput = format_percent(account.buckets["progress"], account.clock)
        took = f"of {format_duration(account.clock / 1000)} in {format_count(num_rows, 'attempt')}"
        figure.suptitle(f"goodput {goodput} {took}", x=0.012, ha="left", fontsize=13)
        # A path may have dollar signs, which are no formula here.
        top.set_title(shorten(mask_unprintable(name), 200), loc="left", fontsize=9, color=GREY, parse_math=False)
        figure.savefig(path)


def _scale_clock(axes: Axes, clock: int) -> None:
    """Label the time axis in the largest unit that fits, with at most nine ticks at numbers that people like."""
    unit, word = next((unit, word) for least, unit, word in CLOCK_UNITS if clock >= least)
    # No step is long enough where attempts claim to have taken centuries.
    step = next((step for step in TICK_STEPS if clock / unit / step <= 9), clock / unit / 9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.xaxis.set_major_locator(MultipleLocator(unit * step))
    axes.set_xlim(0, clock or 1)
    axes.set_xlabel(f"{word} since the first start")


def _draw_attempts(axes: Axes, account: TimeAccount) -> None:
    """Draw a bar for each attempt, the first at the top, and the time between them as a dotted line."""
    for row, span in enumerate(account.spans):
        left = float(span.start)
        for bucket, colour in COLOURS.items():
            if spent := span.buckets.get(bucket, 0):
                hatch: dict[str, Any] = {}
                if bucket in HATCHES:
                    hatch = {"hatch": HATCHES[bucket], "edgecolor": "white"}
                axes.barh(row, spent, left=left, height=0.72, color=colour, linewidth=0, **hatch)
                left += spent
    # Down time: from the end of one row, along the next one to its start.
    for row, (before, after) in enumerate(pairwise(account.spans)):
        axes.plot([before.end, before.end, after.start], [row + 0.36, row + 1, row + 1], ":", color=GREY, lw=1.3)
    labelled = range(0, len(account.spans), 1 + len(account.spans) // MOST_LABELS)
    labels = [_label_attempt(account.spans[row]) for row in labelled]
    axes.set_yticks(list(labelled), labels, fontsize=8.5, color=INK, parse_math=False)
    axes.set_ylim(len(account.spans) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _label_attempt(span: AttemptSpan) -> str:
    # Without what the writer of checkpoints did when it was killed: there is no room, and run.log knows.
    how = shorten(mask_unprintable(span.how.partition(",")[0]), 40)
    return f"{how}   {span.steps}   #{span.number}" if span.steps else f"{how}   #{span.number}"


def _draw_goodput(axes: Axes, account: TimeAccount) -> None:
    """Draw progress so far ÷ the clock so far, in percent; what was lost later is no progress here either."""
    points = list(_trace_goodput(account))
    times, goodputs = [time for time, _ in points], [100 * goodput for _, goodput in points]
    axes.plot(times, goodputs, color=GREEN, lw=2)
    axes.fill_between(times, goodputs, color=GREEN, alpha=0.12, lw=0)
    axes.annotate(
        f"{100 * account.goodput:.1f} %",
        (times[-1], goodputs[-1]),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color=GREEN,
        weight="bold",
    )
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100], ["0", "50 %", "100 %"], fontsize=8.5, color=INK)
    axes.set_ylabel("goodput so far", fontsize=9)
    axes.tick_params(length=0)


def _trace_goodput(account: TimeAccount, points_per_stretch: int = 40) -> Iterator[tuple[float, float]]:
    """Yield points (time, goodput until then). Progress is spread evenly over an attempt's training."""
    progress = 0.0
    yield 0.0, 0.0
    for span in account.spans:
        starting = sum(span.buckets.get(bucket, 0) for bucket in STARTING_BUCKETS)
        gained = span.buckets.get("progress", 0)
        training = gained + sum(span.buckets.get(bucket, 0) for bucket in ("data", "eval", "save"))
        ending = span.end - span.start - starting - training
        # Stretches of time, each with the progress that is made in it: nothing, all of it, nothing.
        for start, length, gain in (
            (span.start - span.down, span.down + starting, 0),
            (span.start + starting, training, gained),
            (span.start + starting + training, ending, 0),
        ):
            # Between its ends the quotient is a curve, not a line: hence points within a stretch.
            for point in range(1, points_per_stretch + 1):
                part = point / points_per_stretch
                if (time := start + length * part) > 0:
                    yield time, (progress + gain * part) / time
            progress += gain


def _make_legend(account: TimeAccount) -> list[Patch]:
    """Return an entry for each bucket that there is, with its share, in the order in which it is drawn."""
    buckets = account.buckets
    patches = []
    for bucket, colour in {**COLOURS, "down": "white"}.items():
        if buckets[bucket] < SHOWN_MILLISECONDS:
            continue
        label = f"{LABELS.get(bucket, bucket)}  {format_percent(buckets[bucket], account.clock)}"
        edge: dict[str, Any] = {"hatch": HATCHES.get(bucket), "edgecolor": "white"}
        if bucket == "down":
            edge = {"edgecolor": GREY, "linestyle": ":", "linewidth": 1.3}
        patches.append(Patch(facecolor=colour, label=label, **edge))
    return patches
