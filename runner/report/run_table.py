"""The table of runs: a row for each, its cells as text and as what they are sorted by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runner.report.config_diff import ConfigDiff, format_value, parse_number
from runner.report.facts import RunFacts
from runner.report.remat_tradeoff import measure_memory
from runner.text import format_duration, format_percent, format_size
from runner.values import Speed

# A page of more runs has no more rows than SHOWN_ROWS in its text: the script makes those that one looks at.
MOST_ROWS, SHOWN_ROWS = 500, 200


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
class PageRuns:
    """The runs of a page in their order: facts, what tells them apart, names and links to their directories."""

    facts: Sequence[RunFacts]
    differs: ConfigDiff
    names: Sequence[str]
    hrefs: Sequence[str]


def make_table(runs: PageRuns) -> tuple[list[str], list[TableRow]]:
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
