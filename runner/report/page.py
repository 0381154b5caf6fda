"""Facts become one page: a table that needs no script, and the numbers from which the browser draws the rest.

The page must stay small with many runs: curves are thinned to a budget, steps that runs share are written once, and so
is every sentence. A name from a disk may hold anything: Jinja2 escapes it in the text and in the facts, and a policy in
the head of the page allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from runner.inspect.time_account import BUCKETS, INTERRUPTED, SHOWN_MILLISECONDS, AttemptSpan
from runner.report.config_diff import ConfigDiff, format_value, parse_number
from runner.report.facts import RunFacts, SaveEvent, thin_curve
from runner.report.remat_tradeoff import group_comparable_runs, list_figures, list_policy_tables, measure_memory
from runner.text import format_count, format_duration, format_size, format_time

SCRIPTS = ("page.js", "colours.js", "curves.js", "lanes.js", "frontier.js", "table.js", "run.js", "start.js")
MOST_POINTS, MOST_SAVES, FEWEST = 120_000, 40_000, 20  # on a page; of a run, however many there are
MOST_METRICS = 12
MOST_GROUPS = 8  # of runs whose remat policies are compared
FAILED = ("failed", "diverged", "killed")


@dataclass(frozen=True)
class TableCell:
    """What a cell of the table says, and what it is sorted by; None goes last."""

    format_value: str
    rank: float | str | None
    kind: str = ""  # its class in the style sheet


@dataclass(frozen=True)
class TableRow:
    """One run in the table."""

    name: str
    href: str
    cells: tuple[TableCell, ...]


def render_page(facts: Sequence[RunFacts], differs: ConfigDiff, title: str, folder: Path) -> str:
    """The page, to be written into `folder`: links are relative to it."""
    hrefs = [_href(each.run.path, folder) for each in facts]
    names = [differs.name(number) or each.run.path.name for number, each in enumerate(facts)]
    head, rows = _table(facts, differs, names, hrefs)
    found = group_comparable_runs(facts, differs)
    compared, more = found[:MOST_GROUPS], max(len(found) - MOST_GROUPS, 0)
    environment = Environment(
        loader=PackageLoader("runner.report", "template"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    source = environment.loader
    assert source is not None
    style, *scripts = (source.get_source(environment, name)[0] for name in ("page.css", *SCRIPTS))
    script = "".join(scripts)
    return environment.get_template("page.html").render(
        title=title,
        made=format_time(time.time()).replace(" UTC", "")[:-3] + " UTC",
        tiles=_tiles(facts, names),
        head=head,
        rows=rows,
        more=differs.more,
        remats=list_policy_tables(compared),
        counted=any(not group.compiled for group in compared),
        many=any(len(point.runs) > 1 for group in compared for point in group.points),
        untold=more,
        facts={**_document(facts, differs, names, hrefs), "frontiers": list_figures(compared)},
        style=style,
        script=script,
        proof=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _href(run: Path, folder: Path) -> str:
    """A link that holds when page and runs are moved together."""
    relative = quote(os.path.relpath(run.resolve(), folder.resolve()).replace(os.sep, "/"))
    return relative if relative.startswith(".") else f"./{relative}"


def _tiles(facts: Sequence[RunFacts], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """What one wants to know first: (label, value, and what it is about)."""
    states = Counter(each.state for each in facts)
    accounts = [each.account for each in facts]
    clock, progress = sum(each.clock for each in accounts), sum(each.buckets["progress"] for each in accounts)
    stops, lost = sum(each.interruptions for each in accounts), sum(each.lost_steps for each in accounts)
    tiles = [("runs", f"{len(facts):,}", ", ".join(f"{count:,} {state}" for state, count in states.most_common()))]
    if len(facts) == 1:
        (only,) = facts
        tiles = [("run", only.state, f"{only.step:,} of {only.steps:,} steps" if only.steps else "")]
    if best := _best(facts):
        number, step, value = best
        about = names[number] if len(facts) > 1 else f"at step {step:,}"
        tiles.append((f"best {facts[number].score.metric}", f"{value:.4g}", about))
    tiles.append(("wall-clock", format_duration(clock / 1000), "of all runs together" if len(facts) > 1 else ""))
    tiles.append(("goodput", f"{100 * progress / clock:.0f} %" if clock else "–", "training whose result stands"))
    tiles.append(("interruptions", f"{stops:,}", f"{format_count(lost, 'step')} done again" if stops else "none"))
    return tiles


def _best(facts: Sequence[RunFacts]) -> tuple[int, int, float] | None:
    """(Which run has the best score, its step, its value), where all are ranked by the same."""
    ranked = [(number, *each.best) for number, each in enumerate(facts) if each.best is not None]
    scores = {facts[number].score for number, _, _ in ranked}
    if len(scores) != 1:
        return None
    return (min if scores.pop().mode == "min" else max)(ranked, key=lambda entry: entry[2])


def _table(
    facts: Sequence[RunFacts], differs: ConfigDiff, names: Sequence[str], hrefs: Sequence[str]
) -> tuple[list[str], list[TableRow]]:
    """The head, and a row for each run."""
    metrics = {each.score.metric for each in facts}
    best = f"best {metrics.pop()}" if len(metrics) == 1 else "best score"
    facts_head = [
        "state",
        "step",
        best,
        "at step",
        "ms / step",
        "memory",
        "wall-clock",
        "goodput",
        "interrupted",
        "done again",
    ]
    head = ["run", *(column.key for column in differs.columns), *facts_head, "why"]
    sizes = measure_memory(facts, differs)
    rows = [
        TableRow(names[number], hrefs[number], (*_own(differs, number), *_cells(each, sizes[number])))
        for number, each in enumerate(facts)
    ]
    told = [0, *(index for index in range(1, len(head)) if any(row.cells[index - 1].text for row in rows))]
    return [head[index] for index in told], [
        TableRow(row.name, row.href, tuple(row.cells[index - 1] for index in told[1:])) for row in rows
    ]


def _own(differs: ConfigDiff, run: int) -> Iterable[TableCell]:
    for column in differs.columns:
        value = column.values[run]
        rank = parse_number(value)
        shown = "–" if value is None else format_value(value)
        yield TableCell(shown, shown if rank is None else rank, "own" if rank is None else "own number")


def _cells(each: RunFacts, size: int | None) -> list[TableCell]:
    account, steps = each.account, "" if each.steps in (None, each.step) else f" / {each.steps:,}"
    step, value = each.best or (None, None)
    pace = None if each.step_seconds is None else each.step_seconds * 1000
    ran = bool(account.spans)
    return [
        TableCell(each.state, each.state, f"state {each.state if each.state.isalpha() else ''}"),
        TableCell(f"{each.step:,}{steps}", each.step, "number"),
        TableCell("" if value is None else f"{value:.5g}", value, "number"),
        TableCell("" if step is None else f"{step:,}", step, "number"),
        TableCell("" if pace is None else f"{pace:.3g}", pace, "number"),
        TableCell("" if size is None else format_size(size), size, "number"),
        TableCell(format_duration(account.clock / 1000) if ran else "", account.clock if ran else None, "number"),
        TableCell(f"{100 * account.goodput:.1f} %" if ran else "", account.goodput if ran else None, "number"),
        TableCell(str(account.interruptions or ""), account.interruptions, "number"),
        TableCell(f"{account.lost_steps:,}" if account.lost_steps else "", account.lost_steps, "number"),
        TableCell(each.why, each.why or None, "why"),
    ]


def _document(
    facts: Sequence[RunFacts], differs: ConfigDiff, names: Sequence[str], hrefs: Sequence[str]
) -> dict[str, Any]:
    """What the scripts draw."""
    metrics = _metrics(facts)
    grids, words = _Once(), _Once()
    points = max(MOST_POINTS // max(len(metrics) * len(facts), 1), FEWEST)
    saves = max(MOST_SAVES // len(facts), FEWEST)
    longest = max((len(each.curves.get(name, ())) for each in facts for name in metrics), default=0)
    return {
        "metrics": metrics,
        "thinned": points if longest > points else None,
        "keys": [
            {"key": each.key, "values": [format_value(value) for value in each.values]} for each in differs.columns
        ],
        "buckets": BUCKETS,
        "interrupted": INTERRUPTED,
        "runs": [
            {
                **{"name": names[number], "href": hrefs[number], "state": each.state, "why": each.why},
                "command": f"python run.py {shlex.join(each.words)}" if each.words else "",
                **{"path": each.run.path.name, "step": each.step, "steps": each.steps, "metric": each.score.metric},
                "curves": {
                    str(index): _curve(thin_curve(each.curves[name], points), grids)
                    for index, name in enumerate(metrics)
                    if name in each.curves
                },
                "saves": [_save(save, words) for save in _drawn(each.saves, saves)],
                "undrawn": max(len(each.saves) - saves, 0),
                "spans": [_span(span, words) for span in each.account.spans],
            }
            for number, each in enumerate(facts)
        ],
        "grids": grids.items,
        "words": words.items,
        "seen": SHOWN_MILLISECONDS,
    }


class _Once:
    """What many runs have alike, written once and named by its place."""

    def __init__(self) -> None:
        self._places: dict[Any, int] = {}

    def of(self, item: Any) -> int:
        return self._places.setdefault(item, len(self._places))

    @property
    def items(self) -> list[Any]:
        return list(self._places)


def _metrics(facts: Sequence[RunFacts]) -> list[str]:
    """Which curves there are: the losses first, training before evaluations, then the scores, then the rest."""
    counts = Counter(name for each in facts for name in each.curves)
    scores = {each.score.metric for each in facts}

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        return not name.endswith("/loss"), not name.startswith("train/"), name not in scores, name

    return sorted(counts, key=rank)[: MOST_METRICS if len(facts) <= 100 else 3]


def _curve(curve: Sequence[tuple[int, float]], grids: _Once) -> list[Any]:
    """The place of its steps, and its values in five digits: more cannot be seen."""
    return [grids.of(tuple(step for step, _ in curve)), [float(f"{value:.5g}") for _, value in curve]]


def _drawn(saves: Sequence[SaveEvent], most: int) -> list[SaveEvent]:
    """All that are there, and of the deleted ones as many as there is room for, evenly."""
    gone = [save.step for save in saves if save.kept is None]
    room = max(most - (len(saves) - len(gone)), 0)
    chosen = {gone[index * len(gone) // room] for index in range(room)} if room < len(gone) else set(gone)
    return [save for save in saves if save.kept is not None or save.step in chosen]


def _span(span: AttemptSpan, words: _Once) -> list[Any]:
    steps = (span.from_step, span.to_step, span.lost_steps)
    spent = [span.buckets.get(name, 0) for name in BUCKETS]
    return [span.number, span.started, words.of(span.how), span.ending, *steps, span.start, span.end, spent]


def _save(save: SaveEvent, words: _Once) -> list[Any]:
    kept = None if save.kept is None else words.of(save.kept)
    return [save.step, words.of(save.reason), kept, save.num_bytes, save.score, int(save.is_best)]
