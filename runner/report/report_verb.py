"""`report`: one page of HTML about runs, for a browser and without a network. Changes nothing in them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner import files
from runner.errors import ConfigError
from runner.inspect.lookup import find_runs
from runner.report.config_diff import ConfigDiff, compare_configs
from runner.report.facts import RunFacts, read_facts
from runner.report.page import render_page
from runner.report.remat_tradeoff import measure_memory
from runner.rundir.layout import RunDir
from runner.text import display_path, format_count, format_size
from runner.values import Say, VerbResult

PAGE = "report.html"


def add_arguments(parser: ArgumentParser) -> None:
    """Runs, and where the page goes."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a run, or a directory of runs")
    parser.add_argument("--to", metavar="FILE.html", help=f"the page; PATH/{PAGE} where this is not given")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Write the page. Raises RefusedError where there is no run, ConfigError where FILE is no place for a page."""
    page = _page(arguments.to, arguments.paths)
    places = {place.path.resolve() for path in arguments.paths for place in find_runs(path)}
    found = [read_facts(RunDir(path)) for path in sorted(places)]
    differs = compare_configs([each.document for each in found], [each.words for each in found])
    order = differs.order(len(found))
    facts, differs = [found[number] for number in order], differs.taken(order)
    title = " · ".join(display_path(Path(path).expanduser()) for path in arguments.paths)
    html = render_page(facts, differs, title, page.resolve().parent)
    files.replace_file(page, html, durable=False)
    say(f"{page}  {format_count(len(facts), 'run')}, {format_size(len(html.encode()))}; open it in a browser")
    return VerbResult({"page": str(page), "bytes": len(html.encode()), "runs": _plain(facts, differs)})


def _page(to: str | None, paths: Sequence[str]) -> Path:
    if to is None:
        folder = Path(paths[0]).expanduser() if len(paths) == 1 else Path()
        return folder / PAGE
    page = Path(to).expanduser()
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"--to {to}: is no page; expected a name that ends in .html")
    if not page.parent.is_dir():
        raise ConfigError(f"--to {to}: there is no directory {page.parent}; make it, or choose another")
    return page


def _plain(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[dict[str, Any]]:
    """The table of the page as data."""
    sizes = measure_memory(facts, differs)
    return [
        {
            "run": str(each.run),
            "own": {column.key: column.values[number] for column in differs.columns},
            **{"state": each.state, "step": each.step, "steps": each.steps},
            **{"metric": each.score.metric, "best_step": each.best and each.best[0]},
            **{"best_value": each.best and each.best[1], "seconds": each.account.clock / 1000},
            **{"goodput": each.account.goodput, "interruptions": each.account.interruptions},
            **{"lost_steps": each.account.lost_steps, "step_seconds": each.step_seconds, "why": each.why},
            **{"memory_bytes": sizes[number], "recompute": each.needs and each.needs.extra},
        }
        for number, each in enumerate(facts)
    ]
