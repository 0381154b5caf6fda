"""The picture of `remat`: memory against what is computed again (or the time of a step), and the frontier of both.

Filled points lie on the frontier: nothing has both less memory and less work. Labels are put where they cover no point
and no other label. Colours are those of Okabe and Ito, which people who see few colours can tell apart; the shape of a
point says the same as its colour.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from runner.remat.cost_table import PolicyCosts, SurveyReport
from runner.text import format_size, shorten

INK, GREY, FAINT = "#1b2733", "#6b7785", "#e4e8ec"
BEST, OTHER, BUDGET = "#0072b2", "#d55e00", "#009e73"
INCHES, DOTS = (9.6, 5.6), 110
NOT_FROM_ZERO = 0.6  # where even the least is more than this part of the most, the axis of memory begins later
LABEL_WIDTH = 22  # characters
AWAY = (9, 16, 26, 40, 58)  # points of type between a label and what it names
AROUND = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 1), (-1, -1), (-1, 0))
ON_IT: dict[str, Any] = {"ls": "", "marker": "o", "ms": 9, "mfc": BEST, "mec": "white", "mew": 1, "zorder": 5}
BEATEN: dict[str, Any] = {"ls": "", "marker": "D", "ms": 6.5, "mfc": "white", "mec": OTHER, "mew": 1.6, "zorder": 4}
STYLE: dict[Any, Any] = {
    **{"font.size": 10, "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK},
    **{"xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "figure.facecolor": "white"},
}

Line = tuple[tuple[float, float], tuple[float, float]]


def draw_survey(path: Path, report: SurveyReport) -> None:
    """Write the picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        plot_survey(report).savefig(path)


def plot_survey(report: SurveyReport) -> Figure:
    """Points, lines and labels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=INCHES, dpi=DOTS)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.1, 0.11, 0.87, 0.705))
        _title(figure, report)
        points = [(report.in_all(row), _height(report, row), row) for row in report.rows]
        points = [point for point in points if max(point[:2]) < float("inf")]
        _axes(axes, report, points)
        lines = [*_frontier(axes, report), *_budget(axes, report)]
        best = {row.name for row in report.frontier}
        for x, y, row in points:
            look, colour = (ON_IT, BEST) if row.name in best else (BEATEN, OTHER)
            axes.plot([x], [y], **look)
            axes.plot([x] * 2, _spread(row) or [y] * 2, color=colour, alpha=0.35, lw=2)
        _labels(axes, canvas, list(_named(points, axes)), best, lines)
        _legend(axes, "time" if report.is_timed else "recomputation")
        return figure


def _height(report: SurveyReport, row: PolicyCosts) -> float:
    """In ms, or in %."""
    return (1000 if report.is_timed else 100) * report.cost(row)


def _spread(row: PolicyCosts) -> list[float]:
    """From the lower quartile of the time of a step to the upper one, in ms; empty where none was taken."""
    return [1000 * row.quartiles[0], 1000 * row.quartiles[2]] if row.quartiles else []


def _title(figure: Figure, report: SurveyReport) -> None:
    setting = report.setting
    name = setting.model.partition(" · ")[0]
    figure.text(0.1, 0.955, shorten(f"What to recompute: {name}", 70), fontsize=16, fontweight="bold", va="center")
    figure.text(0.1, 0.9, shorten(setting.line, 110), color=GREY, va="center")


def _axes(axes: Axes, report: SurveyReport, points: Sequence[tuple[float, float, PolicyCosts]]) -> None:
    """Room on all sides; units as people read them."""
    places = [x for x, _, _ in points] or [1.0]
    heights = [height for _, y, row in points for height in (y, *_spread(row))] or [0.0]
    highest, lowest = max(heights), min(heights) if report.is_timed else 0.0
    room = 0.13 * ((highest - lowest) or highest or 1.0)
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


def _frontier(axes: Axes, report: SurveyReport) -> list[Line]:
    """What can be had: with so much memory, at least so much is computed again. Gives the lines that were drawn."""
    best = [(report.in_all(row), _height(report, row)) for row in report.frontier]
    right, high = axes.get_xlim()[1], axes.get_ylim()[1]
    if not best:  # nothing could be compiled
        return []
    corners = [(right, best[0][1]), best[0]]
    for x, y in best[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    corners.append((corners[-1][0], high))
    axes.plot(*zip(*corners, strict=True), color=BEST, lw=1.6, alpha=0.5, zorder=3)
    return list(pairwise(corners))


def _budget(axes: Axes, report: SurveyReport) -> list[Line]:
    right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
    if report.budget is None or report.budget > right:
        return []
    axes.axvline(report.budget, color=BUDGET, lw=1.8, ls=(0, (5, 3)), zorder=2)
    axes.axvspan(report.budget, right, color=GREY, alpha=0.1, lw=0, zorder=1)
    words, is_left = f" budget {format_size(report.budget)} ", report.budget > 0.8 * right
    place = (report.budget, low + 0.02 * (high - low))
    axes.text(*place, words, color=BUDGET, fontweight="bold", va="bottom", ha="right" if is_left else "left")
    return [((report.budget, low), (report.budget, high))]


def _legend(axes: Axes, cost: str) -> None:
    handles = [
        Line2D([], [], **ON_IT, label=f"frontier: nothing else has both less memory and less {cost}"),
        Line2D([], [], **BEATEN, label="beaten by one of those"),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.012, 1.0), ncols=2, frameon=False, fontsize=9)


def _named(points: Sequence[tuple[float, float, PolicyCosts]], axes: Axes) -> Iterator[tuple[float, float, list[str]]]:
    """Points that lie upon each other have one label."""
    wide, high = (limits[1] - limits[0] for limits in (axes.get_xlim(), axes.get_ylim()))
    groups: list[tuple[float, float, list[str]]] = []
    for x, y, row in points:
        near = next(
            (each for each in groups if abs(each[0] - x) < 0.008 * wide and abs(each[1] - y) < 0.014 * high), None
        )
        if near is None:
            groups.append((x, y, [row.name]))
        else:
            near[2].append(row.name)
    yield from groups


def _labels(
    axes: Axes,
    canvas: FigureCanvasAgg,
    named: Sequence[tuple[float, float, list[str]]],
    best: set[str],
    lines: Sequence[Line],
) -> None:
    """Each beside its point, at the first place where nothing else is; the frontier is served first."""
    place, pixel, inside = axes.transData.transform, DOTS / 72, axes.get_window_extent()
    taken = [Bbox([place((x, y)), place((x, y))]).padded(7 * pixel) for x, y, _ in named]
    taken += [_ordered(Bbox([place(begin), place(end)])).padded(1.5 * pixel) for begin, end in lines]
    taken += [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    for x, y, names in sorted(named, key=lambda each: (not best.intersection(each[2]), each[0])):
        colour = INK if best.intersection(names) else GREY
        text = axes.text(0, 0, _words(names), fontsize=9, color=colour, zorder=6, linespacing=1.05, va="bottom")
        box = text.get_window_extent(canvas.get_renderer())
        at = place((x, y))
        spots = _spots(at[0], at[1], box.width, box.height, pixel)
        spot = min(spots, key=lambda each: _clash(each[0], taken, inside) + 0.01 * each[1])[0]
        left, below = axes.transData.inverted().transform((spot.x0, spot.y0))
        text.set_position((left, below))
        taken.append(spot)


def _words(names: Sequence[str]) -> str:
    """A line for each name, and more for one that is long."""
    lines = [textwrap.wrap(name, LABEL_WIDTH, break_on_hyphens=False) for name in names]
    return "\n".join(line for each in lines for line in each)


def _ordered(box: Bbox) -> Bbox:
    """The same, from its lower left corner."""
    return Bbox.from_extents(box.xmin, box.ymin, box.xmax, box.ymax)


def _spots(x: float, y: float, wide: float, high: float, pixel: float) -> Iterator[tuple[Bbox, int]]:
    """Where a label may lie, the best places first, each with its rank."""
    rank = 0
    for away in AWAY:
        for right, up in AROUND:
            left = x + right * away * pixel - (0 if right > 0 else wide if right < 0 else wide / 2)
            below = y + up * away * pixel - (0 if up > 0 else high if up < 0 else high / 2)
            yield Bbox.from_bounds(left, below, wide, high), rank
            rank += 1


def _clash(spot: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """How many pixels are covered already, or lie outside."""
    shared = [Bbox.intersection(spot, each) for each in taken]
    seen = Bbox.intersection(spot, inside)
    outside = spot.width * spot.height - (seen.width * seen.height if seen else 0)
    return sum(each.width * each.height for each in shared if each) + max(outside, 0)
