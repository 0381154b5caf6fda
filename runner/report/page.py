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
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from runner.remote.options import is_remote_url
from runner.report.config_diff import ConfigDiff
from runner.report.facts import RunFacts
from runner.report.remat_tradeoff import group_comparable_runs, list_figures, list_policy_tables
from runner.report.run_table import MOST_ROWS, SHOWN_ROWS, PageRuns, make_table
from runner.report.script_data import encode_table, make_script_data
from runner.text import display_path, format_count, format_duration, format_time

# Files of template/, joined in this order into one script.
SCRIPTS = ("page.js", "colours.js", "curves.js", "lanes.js", "frontier.js", "table.js", "run.js", "start.js")
# So many groups of runs are compared by what they recompute.
MOST_GROUPS = 8


def render_page(facts: Sequence[RunFacts], differs: ConfigDiff, title: str, folder: Path) -> str:
    """Return the page as HTML, to be written into `folder`: links are relative to it."""
    runs = PageRuns(
        facts,
        differs,
        names=[differs.name(number) or each.run_dir.path.name for number, each in enumerate(facts)],
        hrefs=[_link_to(each.run_dir.path, folder.resolve()) for each in facts],
    )
    head, rows = make_table(runs)
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
            **make_script_data(runs),
            "frontiers": list_figures(compared),
            "table": encode_table(rows) if len(rows) > MOST_ROWS else None,
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


def _make_tiles(runs: PageRuns) -> list[tuple[str, str, str]]:
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
