"""What the scripts of the page draw, as plain JSON values, in few bytes.

Curves are thinned to a budget; what many runs have alike (steps, sentences, cells) is written once and named by its
index; a run is a list without the names of its fields.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any
from urllib.parse import quote

from runner.inspect.time_account import BUCKETS, INTERRUPTED, SHOWN_MILLISECONDS, AttemptSpan
from runner.profiling.profile_record import ProfileRecord
from runner.report.config_diff import format_value, parse_number
from runner.report.facts import CurvePoint, RunFacts, SaveEvent, thin_curve
from runner.report.run_table import MOST_ROWS, PageRuns, TableCell, TableRow
from runner.types import JsonObject

# On a page; and so many each run has at least, however many runs there are.
MOST_POINTS, FEWEST_POINTS = 120_000, 12
MOST_SAVES, FEWEST_SAVES = 40_000, 4
# What a run is to the scripts, in this order; at the end what most runs lack.
FIELDS = (
    *("name", "path", "href", "state", "why", "metric", "command", "step", "steps"),
    *("curves", "spans", "saves", "profiles", "undrawn"),
)
# Of a trace; profile.json has more.
SHOWN_OPERATIONS = 10
MOST_METRICS, FEW_METRICS, MANY_RUNS = 12, 3, 100


def make_script_data(runs: PageRuns) -> JsonObject:
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


def encode_table(rows: Sequence[TableRow]) -> list[JsonObject]:
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
