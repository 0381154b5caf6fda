"""The picture of a drill: the uninterrupted curve, the interrupted one on top of it, and where it was killed.

Above, the loss of both. Between, how far they are apart. Below, every process of the interrupted run on the clock.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

# Before anything that draws is imported: a cluster has no display, and another backend would look for one.
matplotlib.use("Agg")

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from runner.drill.compare_runs import read_loss_curves
from runner.drill.drill_result import DrillResult
from runner.drill.kill_process import DrilledProcess
from runner.plots import BLUE, GREEN, GREY, INK, PURPLE, SKY_BLUE, STYLE, VERMILLION, YELLOW
from runner.rundir.layout import RunDir
from runner.text import format_count, format_size, shorten

# Wide and pale below, so that the dark curve on top of it can be seen to cover it.
UNINTERRUPTED = "#ffc36b"
PHASES = {
    "startup": ("start-up", "#b9c2cc"),
    "restore": ("restoring", SKY_BLUE),
    "compile": ("compiling", PURPLE),
    "train": ("training", BLUE),
    "eval": ("evaluation", YELLOW),
}
LOST, FINISH = VERMILLION, "#dde2e7"
DASHED = (0, (4, 2))

# How matplotlib draws a line or a marker: its keyword arguments.
Look = dict[str, Any]

KILLED: Look = {"ls": "", "marker": "X", "ms": 8, "mfc": VERMILLION, "mec": "white", "mew": 1.0, "zorder": 7}
KILLED_STARTING: Look = KILLED | {"ms": 7, "mfc": "white", "mec": VERMILLION, "mew": 1.3, "zorder": 6}
RESUMED: Look = {"ls": "", "marker": "o", "ms": 12, "mfc": "#ffffffb0", "mec": GREEN, "mew": 2, "zorder": 5}

WIDTH_INCHES, DOTS_PER_INCH = 11.0, 110
# Margins, as parts of the width.
LEFT, RIGHT = 0.075, 0.03
# More processes than this get no words of their own.
MAX_LABELLED_ROWS = 32

Curve = Mapping[int, float]
Curves = Mapping[str, Curve]


def draw_drill(path: Path, result: DrillResult, first: RunDir, second: RunDir | None) -> None:
    """Write the picture as PNG; `second` is the interrupted run, None where there is none."""
    rows = len(result.processes) + 1
    # In inches: the three panels, and above each the room for a title and a legend, for nothing, for axis and legend.
    panel_heights = (4.1, 0.7, min(max(0.25 + 0.18 * rows, 1.0), 5.6))
    gaps = (1.85, 0.2, 1.0)
    height = sum(panel_heights) + sum(gaps) + 0.6
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH)
        panels, top = [], height
        for gap, panel_height in zip(gaps, panel_heights, strict=True):
            top -= gap + panel_height
            panels.append(figure.add_axes((LEFT, top / height, 1 - LEFT - RIGHT, panel_height / height)))
        losses, distances, processes = panels
        here, there = read_loss_curves(first), read_loss_curves(second) if second else {}
        _draw_title(figure, result, first)
        _draw_losses(losses, result, here, there)
        _draw_distances(distances, here, there)
        distances.sharex(losses)
        losses.tick_params(labelbottom=False)
        _draw_processes(processes, result)
        figure.align_ylabels(panels)
        figure.savefig(path)


def _draw_title(figure: Figure, result: DrillResult, first: RunDir) -> None:
    height, found = figure.get_figheight(), result.comparison
    facts = [shorten(f"{first.path.parent.name}/{first.path.name}", 60), f"{result.baseline.steps:,} steps"]
    if found is not None and found.arrays is not None:
        num = format_count(found.num_arrays, "array")
        facts.append(f"{found.arrays.num_equal} of {num} equal ({format_size(found.num_bytes)})")
    colour = INK if result.identical else VERMILLION
    figure.text(
        LEFT,
        1 - 0.45 / height,
        shorten(result.title, 66),
        fontsize=21 if len(result.title) < 46 else 15,
        fontweight="bold",
        color=colour,
        va="center",
    )
    figure.text(LEFT, 1 - 0.84 / height, "  ·  ".join(facts), color=GREY, va="center")
    why = textwrap.wrap(" ".join((result.broken or result.cause or "").split()), 128)[:2]
    for row, line in enumerate(why or [f"in {result.moments}", result.price]):
        figure.text(LEFT, 1 - (1.08 + 0.24 * row) / height, line, color=colour if why else GREY, va="center")


def _draw_losses(axes: Axes, result: DrillResult, here: Curves, there: Curves) -> None:
    """Draw both curves of both splits, what was done twice, and where it was killed and went on."""
    for split, line_style, width, mark in (("train", "-", 8, ""), ("eval", DASHED, 6, "s")):
        curve = here.get(split, {})
        look: Look = {"color": UNINTERRUPTED, "lw": width, "solid_capstyle": "round", "zorder": 2}
        axes.plot(list(curve), list(curve.values()), **look)
        curve = there.get(split, {})
        look = {"color": INK, "lw": 1.5, "ls": line_style, "marker": mark, "ms": 4, "zorder": 3}
        axes.plot(list(curve), list(curve.values()), **look)
    for begin, end in _repeated_stretches(result):
        axes.axvspan(begin, end, color=VERMILLION, alpha=0.09, lw=0)
    if train := there.get("train") or here.get("train", {}):
        killed = [kill.step for kill in result.kills if kill.step is not None]
        # Where a process would have gone on from, had it not been killed before.
        killed_starting = [each.durable for each in result.processes if each.was_killed and each.step is None]
        for look, steps in ((RESUMED, result.resumed_steps), (KILLED_STARTING, killed_starting), (KILLED, killed)):
            axes.plot(steps, [_interpolate(train, step) for step in steps], **look)
    axes.set_ylabel("loss")
    axes.margins(x=0.012)
    handles = [
        Line2D([], [], color=UNINTERRUPTED, lw=8, label="uninterrupted"),
        Line2D([], [], color=INK, lw=1.6, label="interrupted"),
        Line2D([], [], color=INK, lw=1.4, ls=DASHED, marker="s", ms=4, label="evaluation"),
        Line2D([], [], **KILLED, label="killed"),
        Line2D([], [], **KILLED_STARTING, label="killed while starting"),
        Line2D([], [], **RESUMED, label="resumed"),
        Patch(color=VERMILLION, alpha=0.18, lw=0, label="done again"),
    ]
    _draw_legend(axes, handles)


def _draw_distances(axes: Axes, here: Curves, there: Curves) -> None:
    """Draw |uninterrupted − interrupted| at each step that both have logged."""
    points: dict[int, float] = {}
    for split, curve in here.items():
        for step in sorted(curve.keys() & there.get(split, {}).keys()):
            points[step] = max(points.get(step, 0.0), abs(curve[step] - there[split][step]))
    steps, values = sorted(points), [points[step] for step in sorted(points)]
    axes.set_ylabel("apart")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(values):
        axes.plot(steps, values, ".-", color=VERMILLION, lw=1, ms=5)
        axes.set_ylim(0, 1.25 * max(values))
        axes.set_yticks([0, max(values)], ["0", f"{max(values):.1g}"])
        where = next(step for step in steps if points[step])
        words = f"apart from step {where} on"
        axes.text(0.01, 0.8, words, transform=axes.transAxes, color=VERMILLION, fontweight="bold")
        return
    axes.plot(steps, values, ".", color=BLUE, ms=5)
    axes.set_ylim(-1, 1)
    axes.set_yticks([0])
    if steps:
        words = f"0, in every bit, at each of the {len(steps)} logged steps"
        axes.text(0.5, 0.8, words, transform=axes.transAxes, ha="center", va="center", color=BLUE, fontweight="bold")


def _draw_processes(axes: Axes, result: DrillResult) -> None:
    """Draw one bar for each process, on the clock; above them the one of the uninterrupted run."""
    processes = [result.uninterrupted, *result.processes]
    longest = max(process.ended for process in processes if process)
    for row, process in enumerate(processes):
        if process is None:
            continue
        # The uninterrupted run has a clock of its own, which began before its process.
        shift = process.began if row == 0 else 0.0
        for colour, begin, end in _colour_spans(process, result.processes[row:] if row else []):
            axes.barh(row, end - begin, left=begin - shift, height=0.74, color=colour, lw=0)
        end = process.ended - shift
        if process.was_killed:
            axes.plot([end], [row], "X", ms=7, mfc=VERMILLION, mec="white", mew=0.8, zorder=5, clip_on=False)
        if len(processes) <= MAX_LABELLED_ROWS:
            words = "uninterrupted" if row == 0 else _describe_end(process)
            # Behind the bar, or before it where there is no room behind.
            if end < 0.78 * longest:
                x, words, align = end, f"  {words}", "left"
            else:
                x, words, align = process.began - shift, f"{words}  ", "right"
            axes.text(x, row, words, va="center", ha=align, fontsize=7.5, color=GREY)
    axes.set_ylim(len(processes) - 0.4, -0.6)
    numbered = range(1, len(processes), max(len(processes) // MAX_LABELLED_ROWS, 1))
    axes.set_yticks(numbered, [str(row) for row in numbered], fontsize=7.5)
    axes.set_ylabel("process")
    unit, unit_name = (60, "minutes") if longest > 180 else (1, "seconds")
    axes.set_xlabel(unit_name)
    axes.xaxis.set_major_locator(MultipleLocator(unit * max(round(longest / unit / 8), 1)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds / unit:.0f}"))
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.005)
    handles = [Patch(color=colour, label=name) for name, colour in PHASES.values()]
    handles += [Patch(color=LOST, label="lost, done again"), Patch(color=FINISH, label="finishing")]
    _draw_legend(axes, handles)


def _colour_spans(process: DrilledProcess, later: Sequence[DrilledProcess]) -> Iterator[tuple[str, float, float]]:
    """Yield (colour, from, to) for what a process did; what it trained in vain has a colour of its own."""
    goes_on = _next_from_step(later)
    lost_from = process.ended
    if goes_on is not None and process.step is not None:
        lost_from = _time_of_step(process, goes_on)
    for phase, begin, end in process.trace.spans:
        _, colour = PHASES.get(phase, ("", FINISH))
        if phase not in ("train", "eval") or lost_from >= end:
            yield colour, begin, end
            continue
        if begin < lost_from:
            yield colour, begin, lost_from
        yield LOST, max(begin, lost_from), end


def _time_of_step(process: DrilledProcess, step: int) -> float:
    """Return when a process had completed a step; its end, where it had not done more."""
    return next((when for when, done in process.trace.reached if done > step), process.ended)


def _next_from_step(later: Sequence[DrilledProcess]) -> int | None:
    """Return where the first of these processes that trained went on from."""
    return next((process.from_step for process in later if process.from_step is not None), None)


def _describe_end(process: DrilledProcess) -> str:
    if process.planned is None or not process.was_killed:
        return "finished" if process.exit_code == 0 else f"exit code {process.exit_code}"
    who = "" if process.planned.victim is None else f" {process.planned.victim}"
    return f"{process.planned.signal.name}{who} · {process.moment}"


def _repeated_stretches(result: DrillResult) -> Iterator[tuple[int, int]]:
    """Yield stretches of steps (from, to) that were done, lost and done again."""
    for index, process in enumerate(result.processes):
        goes_on = _next_from_step(result.processes[index + 1 :])
        if process.step is not None and goes_on is not None and goes_on < process.step:
            yield goes_on, process.step


def _interpolate(curve: Curve, step: int) -> float:
    """Return the height of a curve at a step: on the line between the points beside it."""
    before = max((each for each in curve if each <= step), default=min(curve))
    after = min((each for each in curve if each >= step), default=max(curve))
    part = (step - before) / (after - before) if after > before else 0.0
    return curve[before] + part * (curve[after] - curve[before])


def _draw_legend(axes: Axes, handles: Sequence[Artist]) -> None:
    """Draw a legend above the data, never over it."""
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.005, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.8,
        columnspacing=1.6,
        borderaxespad=0.2,
        borderpad=0.2,
    )
