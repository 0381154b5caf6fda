"""Facts become one page: a table that needs no script, and the numbers from which the browser draws the rest.

The page must stay small with many runs: curves are thinned to a budget, steps that runs share are written once, and so
is every sentence. A name from a disk may hold anything: Jinja2 escapes it in the text and in the facts, and a policy in
the head of the page allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import shlex
import time
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from runner.inspect.time_account import BUCKETS, INTERRUPTED, SHOWN_MILLISECONDS, AttemptSpan
from runner.profiling.profile_record import ProfileRecord
from runner.remote.options import is_remote_url
from runner.report.config_diff import ConfigDiff, format_value, parse_number
from runner.report.facts import CurvePoint, RunFacts, SaveEvent, thin_curve
from runner.report.remat_tradeoff import group_comparable_runs, list_figures, list_policy_tables, measure_memory
from runner.text import display_path, format_count, format_duration, format_percent, format_size, format_time
from runner.types import JsonObject
from runner.values import Speed

# Files of template/, joined in this order into one script.
SCRIPTS = ("page.js", "colours.js", "curves.js", "lanes.js", "frontier.js", "table.js", "run.js", "start.js")
# On a page; and so many each run has at least, however many runs there are.
MOST_POINTS, FEWEST_POINTS = 120_000, 12
MOST_SAVES, FEWEST_SAVES = 40_000, 4
# A page of more runs has no more rows than SHOWN_ROWS in its text: the script makes those that one looks at.
MOST_ROWS, SHOWN_ROWS = 500, 200
# What a run is to the scripts, in this order; at the end what most runs lack.
FIELDS = (
    *("name", "path", "href", "state", "why", "metric", "command", "step", "steps"),
    *("curves", "spans", "saves", "profiles", "undrawn"),
)
# Of a trace; profile.json has more.
SHOWN_OPERATIONS = 10
MOST_METRICS, FEW_METRICS, MANY_RUNS = 12, 3, 100
# So many groups of runs are compared by what they recompute.
MOST_GROUPS = 8


@dataclass(frozen=True)
class TableCell:
    """The text of a cell, what it is sorted by (None goes last), and its class in the style sheet."""

    text: str
    rank: float | str | None
    kind: str = ""


@dataclass(frozen=True)
class TableRow:
    """One run in the table, and a link to its directory."""

    name: str
    href: str
    cells: tuple[TableCell, ...]


@dataclass(frozen=True)
class _PageRuns:
    """The runs of a page in their order: facts, what tells them apart, names and links to their directories."""

    facts: Sequence[RunFacts]
    differs: ConfigDiff
    names: Sequence[str]
    hrefs: Sequence[str]


def render_page(facts: Sequence[RunFacts], differs: ConfigDiff, title: str, folder: Path) -> str:
    """Return the page as HTML, to be written into `folder`: links are relative to it."""
    runs = _PageRuns(
        facts,
        differs,
        names=[differs.name(number) or each.run_dir.path.name for number, each in enumerate(facts)],
        hrefs=[_link_to(each.run_dir.path, folder.resolve()) for each in facts],
    )
    head, rows = _make_table(runs)
    groups = group_comparable_runs(facts, differs)
    compared = groups[:MOST_GROUPS]
    environment = Environment(
        loader=PackageLoader("runner.report", "template"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    loader = environment.loader
    assert loader is not None
    style, *scripts = (loader.get_source(environment, name)[0] for name in ("page.css", *SCRIPTS))
    script = "".join(scripts)
    return environment.get_template("page.html").render(
        title=title,
        made=format_time(time.time()).replace(" UTC", "")[:-3] + " UTC",
        tiles=_make_tiles(runs),
        head=head,
        rows=rows if len(rows) <= MOST_ROWS else rows[:SHOWN_ROWS],
        num_runs=len(rows),
        more=differs.more,
        remats=list_policy_tables(compared),
        counted=any(not group.compiled for group in compared),
        many=any(len(point.runs) > 1 for group in compared for point in group.points),
        untold=len(groups) - len(compared),
        facts={
            **_make_script_data(runs),
            "frontiers": list_figures(compared),
            "table": _encode_table(rows) if len(rows) > MOST_ROWS else None,
            "drawn": SHOWN_ROWS if len(rows) > MOST_ROWS else None,
        },
        style=style,
        script=script,
        # The page lets the browser run what has this hash (Content-Security-Policy), and nothing from a name.
        proof=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def order_runs(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[int]:
    """Return the runs in the order of the page: by configuration; where only the first are drawn, the best first."""
    order, scores = differs.order(len(facts)), {each.score for each in facts}
    if len(facts) <= MOST_ROWS or len(scores) != 1:
        return order
    sign = 1 if scores.pop().mode == "min" else -1

    def rank(run: int) -> tuple[bool, float]:
        best = facts[run].best
        return (True, 0.0) if best is None or math.isnan(best[1]) else (False, sign * best[1])

    return sorted(order, key=rank)


def _link_to(directory: Path, folder: Path) -> str:
    """Return a link that holds when page and runs are moved together; of a run in a bucket its place there.

    Both paths are resolved.
    """
    if is_remote_url(name := display_path(directory)):
        return quote(name, safe=":/")
    relative = quote(os.path.relpath(directory, folder).replace(os.sep, "/"))
    # `a:b` would be read as an address of the scheme `a`.
    return relative if relative.startswith(".") else f"./{relative}"


def _make_tiles(runs: _PageRuns) -> list[tuple[str, str, str]]:
    """Return what one wants to know first: (label, value, and what it is about)."""
    facts = runs.facts
    is_one = len(facts) == 1
    if is_one:
        status = facts[0].status
        tiles = [("run", status.state, f"{status.step:,} of {status.steps:,} steps" if status.steps else "")]
    else:
        states = Counter(each.status.state for each in facts)
        tiles = [("runs", f"{len(facts):,}", ", ".join(f"{count:,} {state}" for state, count in states.most_common()))]
    if best := _find_best_run(facts):
        number, step, value = best
        about = f"at step {step:,}" if is_one else runs.names[number]
        tiles.append((f"best {facts[number].score.metric}", f"{value:.4g}", about))
    accounts = [each.account for each in facts]
    clock, progress = sum(each.clock for each in accounts), sum(each.buckets["progress"] for each in accounts)
    stops, lost = sum(each.interruptions for each in accounts), sum(each.lost_steps for each in accounts)
    tiles.append(("wall-clock", format_duration(clock / 1000), "" if is_one else "of all runs together"))
    tiles.append(("goodput", f"{100 * progress / clock:.0f} %" if clock else "–", "training whose result stands"))
    tiles.append(("interruptions", f"{stops:,}", f"{format_count(lost, 'step')} done again" if stops else "none"))
    if is_one and (tiers := facts[0].tiers) is not None:
        tiles.append(("remote", "nothing yet" if tiers.newest is None else f"step {tiers.newest:,}", tiers.url))
    return tiles


def _find_best_run(facts: Sequence[RunFacts]) -> tuple[int, int, float] | None:
    """Return which run has the best score, its step and its value; None where runs are ranked by different scores."""
    ranked = [(number, *each.best) for number, each in enumerate(facts) if each.best is not None]
    scores = {facts[number].score for number, _, _ in ranked}
    if len(scores) != 1:
        return None
    choose = min if scores.pop().mode == "min" else max
    return choose(ranked, key=lambda entry: entry[2])


def _make_table(runs: _PageRuns) -> tuple[list[str], list[TableRow]]:
    """Return the head and a row for each run, without the columns that are empty in all of them."""
    metrics = {each.score.metric for each in runs.facts}
    best = f"best {metrics.pop()}" if len(metrics) == 1 else "best score"
    head = [
        *(column.key for column in runs.differs.columns),
        "state",
        "step",
        best,
        "at step",
        "remote",
        "ms / step",
        "tokens / s",
        "examples / s",
        "MFU",
        "memory",
        "wall-clock",
        "goodput",
        "interrupted",
        "done again",
        "why",
    ]
    sizes = measure_memory(runs.facts, runs.differs)
    cells = [
        [*_make_config_cells(runs.differs, number), *_make_fact_cells(each, sizes[number])]
        for number, each in enumerate(runs.facts)
    ]
    filled = [column for column in range(len(head)) if any(row[column].text for row in cells)]
    rows = [
        TableRow(name, href, tuple(row[column] for column in filled))
        for name, href, row in zip(runs.names, runs.hrefs, cells, strict=True)
    ]
    return ["run", *(head[column] for column in filled)], rows


def _make_config_cells(differs: ConfigDiff, run: int) -> Iterator[TableCell]:
    for column in differs.columns:
        value = column.values[run]
        number = parse_number(value)
        text = "–" if value is None else format_value(value)
        yield TableCell(text, text, "own") if number is None else TableCell(text, number, "own number")


def _make_fact_cells(facts: RunFacts, size: int | None) -> list[TableCell]:
    """Return the cells of a run in the order of the head; `size`: bytes that a step needs on one device."""
    status, account = facts.status, facts.account
    steps = "" if status.steps in (None, status.step) else f" / {status.steps:,}"
    step, value = facts.best or (None, None)
    seconds = facts.step_cost.seconds
    pace = None if seconds is None else seconds * 1000
    has_run = bool(account.spans)
    return [
        # A state comes from a disk; as the name of a class it must be a plain word.
        TableCell(status.state, status.state, f"state {status.state if status.state.isalpha() else ''}"),
        TableCell(f"{status.step:,}{steps}", status.step, "number"),
        TableCell("" if value is None else f"{value:.5g}", value, "number"),
        TableCell("" if step is None else f"{step:,}", step, "number"),
        _make_remote_cell(facts),
        TableCell("" if pace is None else f"{pace:.3g}", pace, "number"),
        *_make_speed_cells(facts.step_cost.speed or Speed(0.0)),
        TableCell("" if size is None else format_size(size), size, "number"),
        TableCell(
            format_duration(account.clock / 1000) if has_run else "", account.clock if has_run else None, "number"
        ),
        TableCell(f"{100 * account.goodput:.1f} %" if has_run else "", account.goodput if has_run else None, "number"),
        TableCell(str(account.interruptions or ""), account.interruptions, "number"),
        TableCell(f"{account.lost_steps:,}" if account.lost_steps else "", account.lost_steps, "number"),
        TableCell(status.why, status.why or None, "why"),
    ]


def _make_speed_cells(speed: Speed) -> list[TableCell]:
    """Return the cells of tokens a second, else of examples a second, and of the share of the devices' peak."""
    examples = speed.examples if speed.tokens is None else None
    return [
        *(TableCell("" if rate is None else f"{rate:,.0f}", rate, "number") for rate in (speed.tokens, examples)),
        TableCell("" if speed.mfu is None else format_percent(speed.mfu, 1.0), speed.mfu, "number"),
    ]


def _make_remote_cell(facts: RunFacts) -> TableCell:
    """Return the cell of the newest step in the bucket; an empty one where a run lives on its disk alone."""
    if facts.tiers is None:
        return TableCell("", None, "number")
    newest = facts.tiers.newest
    return TableCell("none yet" if newest is None else f"{newest:,}", newest or 0, "number")


def _make_script_data(runs: _PageRuns) -> JsonObject:
    """Return what the scripts draw, as plain JSON values."""
    facts, metrics = runs.facts, _choose_metrics(runs.facts)
    # Long lists and sentences that many runs have alike: the page has each once, and names it by its index.
    grids, words = _SharedValues(), _SharedValues()
    most_points = max(MOST_POINTS // max(len(metrics) * len(facts), 1), FEWEST_POINTS)
    most_saves = max(MOST_SAVES // len(facts), FEWEST_SAVES)
    longest = max((len(each.curves.get(name, ())) for each in facts for name in metrics), default=0)
    most_operations = SHOWN_OPERATIONS if len(facts) <= MOST_ROWS else 0
    base = Counter(href.rpartition("/")[0] for href in runs.hrefs).most_common(1)[0][0]
    entries = []
    for name, href, each in zip(runs.names, runs.hrefs, facts, strict=True):
        path = each.run_dir.path.name
        entry = {
            "name": name,
            "path": path,
            # Most runs lie beside each other.
            "href": None if href == f"{base}/{quote(path)}" else href,
            "state": words.index_of(each.status.state),
            "why": words.index_of(each.status.why),
            "metric": words.index_of(each.score.metric),
            "command": [words.index_of(shlex.quote(word)) for word in each.words],
            "step": each.status.step,
            "steps": each.status.steps,
            "curves": [
                _encode_curve(thin_curve(each.curves[metric], most_points), grids) if metric in each.curves else 0
                for metric in metrics
            ],
            "spans": [_encode_span(span, words) for span in each.account.spans],
            "saves": [_encode_save(save, words) for save in _choose_saves(each.saves, most_saves)],
            "profiles": [_encode_profile(record, most_operations) for record in each.profiles],
            "undrawn": max(len(each.saves) - most_saves, 0),
        }
        entries.append(_drop_empty_end([entry[field] for field in FIELDS]))
    return {
        "metrics": metrics,
        "thinned": most_points if longest > most_points else None,
        "keys": [
            {"key": column.key, **_encode_texts([format_value(value) for value in column.values])}
            for column in runs.differs.columns
        ],
        "buckets": BUCKETS,
        "interrupted": INTERRUPTED,
        "fields": FIELDS,
        "base": base,
        "runs": entries,
        "grids": grids.values,
        "words": words.values,
        "seen": SHOWN_MILLISECONDS,
    }


class _SharedValues:
    """Values that are written once, each named by its index."""

    def __init__(self) -> None:
        self._indices: dict[Hashable, int] = {}

    def index_of(self, value: Hashable) -> int:
        return self._indices.setdefault(value, len(self._indices))

    @property
    def values(self) -> list[Hashable]:
        return list(self._indices)


def _choose_metrics(facts: Sequence[RunFacts]) -> list[str]:
    """Return which curves are drawn: losses first, training before evaluations, then the scores, then the rest."""
    names = {name for each in facts for name in each.curves}
    scores = {each.score.metric for each in facts}

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        return not name.endswith("/loss"), not name.startswith("train/"), name not in scores, name

    return sorted(names, key=rank)[: MOST_METRICS if len(facts) <= MANY_RUNS else FEW_METRICS]


def _encode_curve(curve: Sequence[CurvePoint], grids: _SharedValues) -> list[Any]:
    """Return the index of the steps, and the values in five digits: more cannot be seen."""
    return [grids.index_of(tuple(step for step, _ in curve)), [float(f"{value:.5g}") for _, value in curve]]


def _choose_saves(saves: Sequence[SaveEvent], most: int) -> list[SaveEvent]:
    """Return all checkpoints that are there, and of the deleted ones as many as there is room for, evenly spread."""
    # A long run with a short period has thousands of deleted ones, which a lane cannot show apart anyway.
    gone = [save.step for save in saves if save.kept is None]
    room = max(most - (len(saves) - len(gone)), 0)
    chosen = {gone[index * len(gone) // room] for index in range(room)} if room < len(gone) else set(gone)
    return [save for save in saves if save.kept is not None or save.step in chosen]


def _encode_table(rows: Sequence[TableRow]) -> list[JsonObject]:
    """Return the cells of all rows by column: their class, their texts, and by what they are sorted."""
    columns = []
    for cells in zip(*(row.cells for row in rows), strict=True):
        kinds = _encode_texts([cell.kind for cell in cells])
        column = {"kind": kinds, **_encode_texts([cell.text for cell in cells])}
        # Where the texts say it, it is not written a second time.
        if any(not _is_own_rank(cell) for cell in cells):
            ranks = [cell.rank for cell in cells]
            column["ranks"] = [float(f"{rank:.6g}") if isinstance(rank, float) else rank for rank in ranks]
        columns.append(column)
    return columns


def _is_own_rank(cell: TableCell) -> bool:
    if cell.rank is None or isinstance(cell.rank, str):
        return cell.text in ("" if cell.rank is None else cell.rank, "–" if cell.rank is None else cell.rank)
    return parse_number(cell.text) == cell.rank


def _encode_texts(texts: Sequence[str]) -> JsonObject:
    """Return texts as a list; where most are alike, each once and for every place its index."""
    shared = _SharedValues()
    places = [shared.index_of(text) for text in texts]
    if 2 * len(shared.values) > len(texts):
        return {"texts": texts}
    return {"of": shared.values, "at": places}


def _drop_empty_end(values: list[Any]) -> list[Any]:
    """Return values without the last ones that are nothing; the scripts know what they are then."""
    while values and not values[-1]:
        values.pop()
    return values


def _encode_profile(record: ProfileRecord, most_operations: int) -> list[Any]:
    operations = record.summary.operations[:most_operations] if record.summary else []
    listed = [[each.name, each.kind, each.share, each.seconds, each.count] for each in operations]
    return [record.folder.name, record.describe(), listed]


def _encode_span(span: AttemptSpan, words: _SharedValues) -> list[Any]:
    return [
        span.number,
        span.started,
        words.index_of(span.how),
        span.ending,
        span.from_step,
        span.to_step,
        span.lost_steps,
        span.start,
        span.end,
        [span.buckets.get(name, 0) for name in BUCKETS],
    ]


def _encode_save(save: SaveEvent, words: _SharedValues) -> list[Any]:
    return [
        save.step,
        words.index_of(save.reason),
        None if save.kept is None else words.index_of(save.kept),
        save.num_bytes,
        None if save.score is None else float(f"{save.score:.6g}"),
        int(save.is_best),
    ]
