"""`report`: write one page of HTML about runs, for a browser and without a network. Changes nothing in them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from runner.errors import ConfigError
from runner.files import make_folder, replace_file
from runner.inspect.lookup import find_runs, refusing_other_kinds
from runner.remote.options import is_remote_url
from runner.report.config_diff import ConfigDiff, compare_configs
from runner.report.facts import RunFacts, read_facts
from runner.report.page import order_runs, render_page
from runner.report.remat_tradeoff import measure_memory
from runner.rundir.layout import RunDir
from runner.text import display_path, format_count, format_size
from runner.types import JsonObject
from runner.values import Say, VerbResult

DEFAULT_NAME = "report.html"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the runs, and where the page goes."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a run, or a directory of runs")
    parser.add_argument("--to", metavar="FILE.html", help=f"the page; PATH/{DEFAULT_NAME} where this is not given")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Write the page. Raises RefusedError where there is no run, ConfigError where FILE is no place for a page."""
    page = _choose_page(arguments.to, arguments.paths)
    # By their names: a run and the directory it lies in may both be named.
    named = {str(run_dir): run_dir for path in arguments.paths for run_dir in find_runs(path)}
    found = [read_facts(RunDir(named[name].path.resolve())) for name in sorted(named)]
    differs = compare_configs([each.document for each in found], [each.words for each in found])
    order = order_runs(found, differs)
    facts, differs = [found[number] for number in order], differs.reorder(order)
    title = " · ".join(
        path.rstrip("/") if is_remote_url(path) else display_path(Path(path).expanduser()) for path in arguments.paths
    )
    # What was typed may be a link. Beside a run it would be one of whoever made the run.
    target = page.resolve() if arguments.to else page.parent.resolve() / page.name
    # A name that is no text has no place in a page.
    html = render_page(facts, differs, title, target.parent).encode(errors="replace")
    with refusing_other_kinds():
        make_folder(target.parent)
        # Not worth a wait for the disk: it can be written again at any time.
        replace_file(target, html, durable=False)
    num_bytes = len(html)
    say(f"{page}  {format_count(len(facts), 'run')}, {format_size(num_bytes)}; open it in a browser")
    return VerbResult({"page": str(page), "bytes": num_bytes, "runs": _describe_runs(facts, differs)})


def _choose_page(to: str | None, paths: Sequence[str]) -> Path:
    """Return where the page goes: `to`, or beside the runs. Raises ConfigError where none can be written there."""
    if to is None:
        # Nothing is written into a bucket.
        folder = Path(paths[0]).expanduser() if len(paths) == 1 and not is_remote_url(paths[0]) else Path()
        return folder / DEFAULT_NAME
    page = Path(to).expanduser()
    if page.suffix not in (".html", ".htm"):
        raise ConfigError(f"--to {to}: is no page; expected a name that ends in .html")
    if not page.parent.is_dir():
        raise ConfigError(f"--to {to}: there is no directory {page.parent}; make it, or choose another")
    return page


def _describe_runs(facts: Sequence[RunFacts], differs: ConfigDiff) -> list[JsonObject]:
    """Return the table of the page as data."""
    sizes = measure_memory(facts, differs)
    runs = []
    for number, each in enumerate(facts):
        best_step, best_value = each.best or (None, None)
        needs = each.step_cost.needs
        runs.append(
            {
                "run": str(each.run_dir),
                "own": {column.key: column.values[number] for column in differs.columns},
                "state": each.status.state,
                "step": each.status.step,
                "steps": each.status.steps,
                "metric": each.score.metric,
                "best_step": best_step,
                "best_value": best_value,
                "seconds": each.account.clock / 1000,
                "goodput": each.account.goodput,
                "interruptions": each.account.interruptions,
                "lost_steps": each.account.lost_steps,
                "step_seconds": each.step_cost.seconds,
                "examples_per_second": each.step_cost.speed and each.step_cost.speed.examples,
                "tokens_per_second": each.step_cost.speed and each.step_cost.speed.tokens,
                "mfu": each.step_cost.speed and each.step_cost.speed.mfu,
                "why": each.status.why,
                "memory_bytes": sizes[number],
                "recompute": needs and needs.extra,
                "remote": each.tiers and each.tiers.describe(),
            }
        )
    return runs
