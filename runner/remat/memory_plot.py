"""The picture of a survey: memory against what is computed again (or the time of a step), and the frontier of both.

Filled points lie on the frontier: nothing has both less memory and less work. Labels are put where they cover no point
and no other label. The shape of a point says the same as its colour.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import matplotlib

# Before anything that draws is imported: a cluster has no display, and another backend would look for one.
matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from runner.plots import BLUE, GREEN, GREY, INK, STYLE, VERMILLION
from runner.remat.cost_table import PolicyCosts, SurveyReport
from runner.text import format_size, shorten

INCHES, DOTS = (9.6, 5.6), 110
# Where even the least is more than this part of the most, the axis of memory does not begin at zero.
NOT_FROM_ZERO = 0.6
# In characters.
LABEL_WIDTH = 22
# Where a label may lie around its point: so many points of type away, in these directions (right, up).
DISTANCES = (9, 16, 26, 40, 58)
DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0))
# Points are one and have one label where they are closer than these parts of the axes' lengths.
SAME_PLACE = (0.008, 0.014)

# How matplotlib draws a point: its keyword arguments.
ON_FRONTIER: dict[str, Any] = {"ls": "", "marker": "o", "ms": 9, "mfc": BLUE, "mec": "white", "mew": 1, "zorder": 5}
BEATEN: dict[str, Any] = {
    "ls": "",
    "marker": "D",
    "ms": 6.5,
    "mfc": "white",
    "mec": VERMILLION,
    "mew": 1.6,
    "zorder": 4,
}

# Two corners, in data coordinates.
Line = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Point:
    """A policy in the picture: memory in bytes, and the height in ms or in percent."""

    x: float
    y: float
    row: PolicyCosts


@dataclass(frozen=True)
class Label:
    """The names of the policies at one place."""

    x: float
    y: float
    names: list[str]


def draw_survey(path: Path, report: SurveyReport) -> None:
    """Write the picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        plot_survey(report).savefig(path)


def plot_survey(report: SurveyReport) -> Figure:
    """Return the figure: points, the frontier, the budget and labels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.1, 0.11, 0.87, 0.705))
        _draw_title(figure, report)
        points = [Point(report.in_all(row), _height(report, row), row) for row in report.rows]
        # What did not compile, or was not timed, has no place in the picture.
        points = [point for point in points if max(point.x, point.y) < inf]
        _set_axes(axes, report, points)
        lines = [*_draw_frontier(axes, report), *_draw_budget(axes, report)]
        best = {row.name for row in report.frontier}
        for point in points:
            look, colour = (ON_FRONTIER, BLUE) if point.row.name in best else (BEATEN, VERMILLION)
            axes.plot([point.x], [point.y], **look)
            axes.plot([point.x] * 2, _quartile_heights(point.row) or [point.y] * 2, color=colour, alpha=0.35, lw=2)
        _draw_labels(axes, canvas, _group_labels(points, axes), best, lines)
        _draw_legend(axes, "time" if report.is_timed else "recomputation")
        return figure


def _height(report: SurveyReport, row: PolicyCosts) -> float:
    """Return the height of a point: ms of a step, or percent that is computed again."""
    return (1000 if report.is_timed else 100) * report.cost(row)


def _quartile_heights(row: PolicyCosts) -> list[float]:
    """Return the lower and the upper quartile of the time of a step, in ms; empty where none was taken."""
    return [1000 * row.quartiles[0], 1000 * row.quartiles[2]] if row.quartiles else []


def _draw_title(figure: Figure, report: SurveyReport) -> None:
    name = report.setting.model.partition(" · ")[0]
    figure.text(0.1, 0.955, shorten(f"What to recompute: {name}", 70), fontsize=16, fontweight="bold", va="center")
    figure.text(0.1, 0.9, shorten(report.setting.line, 110), color=GREY, va="center")


def _set_axes(axes: Axes, report: SurveyReport, points: Sequence[Point]) -> None:
    """Set limits with room on all sides, and units as people read them."""
    places = [point.x for point in points] or [1.0]
    heights = [0.0] if not points else []
    for point in points:
        heights += [point.y, *_quartile_heights(point.row)]
    # What is computed again is a part of a whole, so its axis begins at zero; times are only compared.
    highest, lowest = max(heights), min(heights) if report.is_timed else 0.0
    room = 0.13 * ((highest - lowest) or highest or 1.0)
    # A budget far beyond all points would press them into a corner; then it is not shown.
    right = max(max(places), report.budget if report.budget and report.budget < 1.5 * max(places) else 0)
    left = min(places) - 0.15 * (right - min(places)) if min(places) > NOT_FROM_ZERO * right else 0
    axes.set_xlim(left, right + 0.12 * (right - left or right))
    axes.set_ylim(lowest - room, highest + room)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_size(size) if size else "0"))
    compiled = f"in a step, compiled for {report.setting.device}"
    counted = "for state, batch and what is stored, counted in the trace"
    axes.set_xlabel(f"memory of one device {compiled if report.is_believed else counted}")
    if report.is_timed:
        axes.set_ylabel("time of a step: median and quartiles")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ms"))
    else:
        axes.set_ylabel("computed again, of a step's FLOPs")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if value >= 0 else ""))


def _draw_frontier(axes: Axes, report: SurveyReport) -> list[Line]:
    """Draw what can be had, with so much memory at least so much work, and return the lines that were drawn."""
    best = [(report.in_all(row), _height(report, row)) for row in report.frontier]
    right, high = axes.get_xlim()[1], axes.get_ylim()[1]
    # Nothing could be compiled.
    if not best:
        return []
    # Stairs: between two points one has the memory of the left one, and no less work than it.
    corners = [(right, best[0][1]), best[0]]
    for x, y in best[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    corners.append((corners[-1][0], high))
    axes.plot(*zip(*corners, strict=True), color=BLUE, lw=1.6, alpha=0.5, zorder=3)
    return list(pairwise(corners))


def _draw_budget(axes: Axes, report: SurveyReport) -> list[Line]:
    """Draw the budget where it lies within the axes, and return the line that was drawn."""
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    if report.budget is None or report.budget > right:
        return []
    axes.axvline(report.budget, color=GREEN, lw=1.8, ls=(0, (5, 3)), zorder=2)
    axes.axvspan(report.budget, right, color=GREY, alpha=0.1, lw=0, zorder=1)
    words, is_left = f" budget {format_size(report.budget)} ", report.budget > 0.8 * right
    place = (report.budget, low + 0.02 * (high - low))
    axes.text(*place, words, color=GREEN, fontweight="bold", va="bottom", ha="right" if is_left else "left")
    return [((report.budget, low), (report.budget, high))]


def _draw_legend(axes: Axes, cost: str) -> None:
    handles = [
        Line2D([], [], **ON_FRONTIER, label=f"frontier: nothing else has both less memory and less {cost}"),
        Line2D([], [], **BEATEN, label="beaten by one of those"),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.012, 1.0), ncols=2, frameon=False, fontsize=9)


def _group_labels(points: Sequence[Point], axes: Axes) -> list[Label]:
    """Return the labels of the points; points that lie upon each other have one."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    width, height = SAME_PLACE[0] * (right - left), SAME_PLACE[1] * (high - low)
    labels: list[Label] = []
    for point in points:
        for label in labels:
            if abs(label.x - point.x) < width and abs(label.y - point.y) < height:
                label.names.append(point.row.name)
                break
        else:
            labels.append(Label(point.x, point.y, [point.row.name]))
    return labels


def _draw_labels(
    axes: Axes, canvas: FigureCanvasAgg, labels: Sequence[Label], best: set[str], lines: Sequence[Line]
) -> None:
    """Draw each label beside its point, at the first place where nothing else is; the frontier is served first."""
    # In pixels, since a box of text has its size there; one point of type is so many of them.
    to_pixels, pixel, inside = axes.transData.transform, DOTS / 72, axes.get_window_extent()
    taken = [Bbox([to_pixels((each.x, each.y)), to_pixels((each.x, each.y))]).padded(7 * pixel) for each in labels]
    taken += [_order_corners(Bbox([to_pixels(begin), to_pixels(end)])).padded(1.5 * pixel) for begin, end in lines]
    taken += [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    for label in sorted(labels, key=lambda each: (not best.intersection(each.names), each.x)):
        colour = INK if best.intersection(label.names) else GREY
        text = axes.text(
            0, 0, _wrap_names(label.names), fontsize=9, color=colour, zorder=6, linespacing=1.05, va="bottom"
        )
        # It is drawn first at any place: only then its size is known.
        box = text.get_window_extent(canvas.get_renderer())
        x, y = to_pixels((label.x, label.y))
        spots = _iterate_spots(x, y, box, pixel)
        spot = min(spots, key=lambda each: _count_covered_pixels(each[0], taken, inside) + 0.01 * each[1])[0]
        left, below = axes.transData.inverted().transform((spot.x0, spot.y0))
        text.set_position((left, below))
        taken.append(spot)


def _wrap_names(names: Sequence[str]) -> str:
    """Return a line for each name, and more for one that is long."""
    lines = []
    for name in names:
        lines += textwrap.wrap(name, LABEL_WIDTH, break_on_hyphens=False)
    return "\n".join(lines)


def _order_corners(box: Bbox) -> Bbox:
    """Return a box whose first corner is the lower left one; padding would shrink another."""
    return Bbox.from_extents(box.xmin, box.ymin, box.xmax, box.ymax)


def _iterate_spots(x: float, y: float, box: Bbox, pixel: float) -> Iterator[tuple[Bbox, int]]:
    """Yield where a label of the size of `box` may lie around a point, the best place first, each with its rank."""
    rank = 0
    for distance in DISTANCES:
        for right, up in DIRECTIONS:
            left = x + right * distance * pixel - (0 if right > 0 else box.width if right < 0 else box.width / 2)
            below = y + up * distance * pixel - (0 if up > 0 else box.height if up < 0 else box.height / 2)
            yield Bbox.from_bounds(left, below, box.width, box.height), rank
            rank += 1


def _count_covered_pixels(spot: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Return how many pixels of a spot are covered already, or lie outside."""
    shared = [Bbox.intersection(spot, each) for each in taken]
    seen = Bbox.intersection(spot, inside)
    outside = spot.width * spot.height - (seen.width * seen.height if seen else 0)
    return sum(each.width * each.height for each in shared if each) + max(outside, 0)
