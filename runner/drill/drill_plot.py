"""The picture of a drill: the uninterrupted curve, the interrupted one on top of it, and where it was killed.

Above, the loss of both. Between, how far they are apart. Below, every process of the interrupted run on the clock.
Colours are those of Okabe and Ito, which people who see few colours can tell apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from runner.drill.compare import curves
from runner.drill.kill import Attempt
from runner.drill.result import Story
from runner.rundir.layout import Run
from runner.text import plural, shortened, size_text

INK, GREY, FAINT, PALE = "#1b2733", "#6b7785", "#e4e8ec", "#ffc36b"
KILL, RESUME, GOOD = "#d55e00", "#009e73", "#0072b2"
PHASES = {"startup": "#b9c2cc", "restore": "#56b4e9", "compile": "#cc79a7", "train": "#0072b2", "eval": "#f0e442"}
LOST, FINISH = "#d55e00", "#dde2e7"
INCHES, DOTS = 11.0, 110
LEFT, RIGHT = 0.075, 0.03  # margins, as parts of the width
ROWS_LABELLED = 32  # more processes than this get no words of their own

Curve = Mapping[int, float]


def draw(path: Path, story: Story, first: Run, second: Run | None) -> None:
    """Write the picture as PNG."""
    rows = len(story.attempts) + 1
    highs = (4.1, 0.7, min(max(0.25 + 0.18 * rows, 1.0), 5.6))
    gaps = (1.85, 0.2, 1.0)  # above each: for the title and a legend, for nothing, for an axis and a legend
    height = sum(highs) + sum(gaps) + 0.6
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(INCHES, height), dpi=DOTS)
        panels, top = [], height
        for gap, high in zip(gaps, highs, strict=True):
            top -= gap + high
            panels.append(figure.add_axes((LEFT, top / height, 1 - LEFT - RIGHT, high / height)))
        losses, apart, times = panels
        here, there = curves(first), curves(second) if second else {}
        _title(figure, story, first)
        _losses(losses, story, here, there)
        _apart(apart, here, there)
        apart.sharex(losses)
        losses.tick_params(labelbottom=False)
        _times(times, story)
        figure.align_ylabels(panels)
        figure.savefig(path)


KILLED: dict[str, Any] = {"ls": "", "marker": "X", "ms": 8, "mfc": KILL, "mec": "white", "mew": 1.0, "zorder": 7}
STARTED: dict[str, Any] = {"ls": "", "marker": "X", "ms": 7, "mfc": "white", "mec": KILL, "mew": 1.3, "zorder": 6}
RESUMED: dict[str, Any] = {"ls": "", "marker": "o", "ms": 12, "mfc": "#ffffffb0", "mec": RESUME, "mew": 2, "zorder": 5}
STYLE: dict[Any, Any] = {
    **{"font.size": 10, "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK},
    **{"xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.grid": True, "grid.color": FAINT, "axes.axisbelow": True, "figure.facecolor": "white"},
}


def _title(figure: Figure, story: Story, first: Run) -> None:
    """The verdict, and what it is about."""
    high, found = figure.get_figheight(), story.evidence
    facts = [shortened(f"{first.path.parent.name}/{first.path.name}", 60), f"{story.past.steps:,} steps"]
    if found is not None and found.found is not None:
        equal, num = found.found.num_equal, found.found.num_equal + len(found.differing)
        facts.append(f"{equal} of {plural(num, 'array')} equal ({size_text(found.num_bytes)})")
    colour = INK if story.identical else KILL
    figure.text(
        LEFT,
        1 - 0.45 / high,
        shortened(story.title, 66),
        fontsize=21 if len(story.title) < 46 else 15,
        fontweight="bold",
        color=colour,
        va="center",
    )
    figure.text(LEFT, 1 - 0.84 / high, "  ·  ".join(facts), color=GREY, va="center")
    why = textwrap.wrap(" ".join((story.broken or story.cause or "").split()), 128)[:2]
    for row, line in enumerate(why or [f"in {story.moments}", story.price]):
        figure.text(LEFT, 1 - (1.08 + 0.24 * row) / high, line, color=colour if why else GREY, va="center")


def _losses(axes: Axes, story: Story, here: Mapping[str, Curve], there: Mapping[str, Curve]) -> None:
    for split, style in (("train", "-"), ("eval", (0, (4, 2)))):
        for curve, look in ((here.get(split, {}), _wide(split)), (there.get(split, {}), _thin(split, style))):
            axes.plot(list(curve), list(curve.values()), **look)
    for begin, end in _done_again(story):
        axes.axvspan(begin, end, color=KILL, alpha=0.09, lw=0)
    if train := there.get("train") or here.get("train", {}):
        for look, steps in ((RESUMED, _resumed(story)), (STARTED, _killed_starting(story)), (KILLED, _killed(story))):
            axes.plot(steps, [_at(train, step) for step in steps], **look)
    axes.set_ylabel("loss")
    axes.margins(x=0.012)
    handles = [
        Line2D([], [], color=PALE, lw=8, label="uninterrupted"),
        Line2D([], [], color=INK, lw=1.6, label="interrupted"),
        Line2D([], [], color=INK, lw=1.4, ls=(0, (4, 2)), marker="s", ms=4, label="evaluation"),
        Line2D([], [], **KILLED, label="killed"),
        Line2D([], [], **STARTED, label="killed while starting"),
        Line2D([], [], **RESUMED, label="resumed"),
        Patch(color=KILL, alpha=0.18, lw=0, label="done again"),
    ]
    _legend(axes, handles)


def _killed(story: Story) -> list[int]:
    return [kill.step for kill in story.kills if kill.step is not None]


def _killed_starting(story: Story) -> list[int]:
    """Where a process would have gone on from, had it not been killed before."""
    return [attempt.durable for attempt in story.attempts if attempt.landed and attempt.step is None]


def _resumed(story: Story) -> list[int]:
    return [attempt.from_step for attempt in story.attempts[1:] if attempt.from_step is not None]


def _apart(axes: Axes, here: Mapping[str, Curve], there: Mapping[str, Curve]) -> None:
    """|uninterrupted − interrupted|, at each step that both have logged."""
    points: dict[int, float] = {}
    for split, curve in here.items():
        for step in sorted(curve.keys() & there.get(split, {}).keys()):
            points[step] = max(points.get(step, 0.0), abs(curve[step] - there[split][step]))
    steps, values = sorted(points), [points[step] for step in sorted(points)]
    axes.set_ylabel("apart")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if any(values):
        axes.plot(steps, values, ".-", color=KILL, lw=1, ms=5)
        axes.set_ylim(0, 1.25 * max(values))
        axes.set_yticks([0, max(values)], ["0", f"{max(values):.1g}"])
        where = next(step for step in steps if points[step])
        axes.text(0.01, 0.8, f"apart from step {where} on", transform=axes.transAxes, color=KILL, fontweight="bold")
        return
    axes.plot(steps, values, ".", color=GOOD, ms=5)
    axes.set_ylim(-1, 1)
    axes.set_yticks([0])
    if steps:
        words = f"0, in every bit, at each of the {len(steps)} logged steps"
        axes.text(0.5, 0.8, words, transform=axes.transAxes, ha="center", va="center", color=GOOD, fontweight="bold")


def _times(axes: Axes, story: Story) -> None:
    """One bar for each process, on the clock; above them the one of the uninterrupted run."""
    everyone = [story.first, *story.attempts]
    labelled = len(everyone) <= ROWS_LABELLED
    longest = max(each.ended for each in everyone if each)
    for row, attempt in enumerate(everyone):
        if attempt is None:
            continue
        shift = attempt.began if row == 0 else 0.0
        for colour, begin, end in _bars(attempt, story.attempts[row:] if row else []):
            axes.barh(row, end - begin, left=begin - shift, height=0.74, color=colour, lw=0)
        end = attempt.ended - shift
        if attempt.landed:
            axes.plot([end], [row], "X", ms=7, mfc=KILL, mec="white", mew=0.8, zorder=5, clip_on=False)
        if labelled:
            left = end < 0.78 * longest
            word = _ending(attempt, row)
            place = (end, row, f"  {word}") if left else (attempt.began - shift, row, f"{word}  ")
            axes.text(*place, va="center", ha="left" if left else "right", fontsize=7.5, color=GREY)
    axes.set_ylim(len(everyone) - 0.4, -0.6)
    every = max(len(everyone) // ROWS_LABELLED, 1)
    numbered = range(1, len(everyone), every)
    axes.set_yticks(numbered, [str(row) for row in numbered], fontsize=7.5)
    axes.set_ylabel("process")
    axes.set_xlabel("minutes" if longest > 180 else "seconds")
    unit = 60 if longest > 180 else 1
    axes.xaxis.set_major_locator(MultipleLocator(unit * max(round(longest / unit / 8), 1)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds / unit:.0f}"))
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.005)
    names = {
        "startup": "start-up",
        "restore": "restoring",
        "compile": "compiling",
        "train": "training",
        "eval": "evaluation",
    }
    handles = [Patch(color=PHASES[phase], label=name) for phase, name in names.items()]
    _legend(axes, [*handles, Patch(color=LOST, label="lost, done again"), Patch(color=FINISH, label="finishing")])


def _bars(attempt: Attempt, later: Sequence[Attempt]) -> Iterator[tuple[str, float, float]]:
    """What a process did when, as colours; what it trained in vain has one of its own."""
    goes_on = next((each.from_step for each in later if each.from_step is not None), None)
    vain = attempt.ended if goes_on is None or attempt.step is None else _when(attempt, goes_on)
    for phase, begin, end in attempt.trace.spans:
        colour = PHASES.get(phase, FINISH)
        if phase not in ("train", "eval") or vain >= end:
            yield colour, begin, end
            continue
        if begin < vain:
            yield colour, begin, vain
        yield LOST, max(begin, vain), end


def _when(attempt: Attempt, step: int) -> float:
    """When a process had completed a step; its end, where it had not done more."""
    return next((when for when, done in attempt.trace.reached if done > step), attempt.ended)


def _ending(attempt: Attempt, row: int) -> str:
    if row == 0:
        return "uninterrupted"
    if attempt.aim is None or not attempt.landed:
        return "finished" if attempt.code == 0 else f"exit code {attempt.code}"
    return f"{attempt.aim.signal.name} · {attempt.moment}"


def _done_again(story: Story) -> Iterator[tuple[int, int]]:
    """Stretches of steps that were done, lost and done again."""
    for index, attempt in enumerate(story.attempts):
        goes_on = next((each.from_step for each in story.attempts[index + 1 :] if each.from_step is not None), None)
        if attempt.step is not None and goes_on is not None and goes_on < attempt.step:
            yield goes_on, attempt.step


def _at(curve: Curve, step: int) -> float:
    """The height of a curve at a step: on the line between the points beside it."""
    before = max((each for each in curve if each <= step), default=min(curve))
    after = min((each for each in curve if each >= step), default=max(curve))
    part = (step - before) / (after - before) if after > before else 0.0
    return curve[before] + part * (curve[after] - curve[before])


def _wide(split: str) -> dict[str, Any]:
    return {"color": PALE, "lw": 8 if split == "train" else 6, "solid_capstyle": "round", "zorder": 2}


def _thin(split: str, style: Any) -> dict[str, Any]:
    mark = {"marker": "s", "ms": 4} if split == "eval" else {}
    return {"color": INK, "lw": 1.5, "ls": style, "zorder": 3, **mark}


def _legend(axes: Axes, handles: Sequence[Any]) -> None:
    """Above the data, never over it."""
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
