"""`goodput`: where the wall-clock of a run went, over all its attempts, and what that cost. Changes nothing.

What each bucket means, and what counts as progress, is said in account.py.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.checkpoint.record import newest_durable_step
from runner.errors import ConfigError, RefusedError
from runner.inspect.lookup import find_run, is_run, read_config_document
from runner.inspect.ls_runs import list_runs
from runner.inspect.time_account import BUCKETS, SEEN, TimeAccount, account_for_attempts
from runner.rundir import heartbeat
from runner.rundir.attempts import line_of_killed, read_attempts
from runner.rundir.layout import RunDir, is_in_use
from runner.text import format_count, format_duration, format_percent, format_table, format_time, terminal_width
from runner.values import Answer, Say

PICTURES = (".png", ".svg", ".pdf")
# bucket → how it is drawn in a line of text, and what it is
LEGEND = {
    "progress": ("█", "training steps whose result is still there"),
    "eval": ("▓", "evaluating"),
    "save": ("▒", "training waited for a checkpoint"),
    "data": ("d", "training waited for data"),
    "lost": ("×", "steps that were done again"),
    "import": ("i", "from the start of the process until it works: Python, libraries, configuration"),
    "startup": ("s", "reading the data, building the model, opening logs"),
    "restore": ("r", "reading a checkpoint and proving it, or a fresh state"),
    "compile": ("c", "compiling, where nothing else was left to do"),
    "finish": ("f", "the last write, closing"),
    "other": ("?", "nobody wrote down"),
    "down": ("·", "no attempt was running"),
}


def arguments(parser: ArgumentParser) -> None:
    """Runs, and a picture."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a run, or a directory of runs")
    parser.add_argument("--to", metavar="FILE.png", help="draw the attempts of one run on a time axis")


def run(arguments: Namespace, say: Say) -> Answer:
    """Give account. Raises RefusedError where there is no run or no attempt, ConfigError where FILE is no picture."""
    runs = [run for path in arguments.paths for run in find_runs(path)]
    picture = _picture(arguments.to, runs) if arguments.to else None
    accounts = {run: read_account(run) for run in runs}
    if not any(account_for_attempts.spans for account_for_attempts in accounts.values()):
        raise RefusedError(f"{runs[0]}: nothing says when it ran: attempts.jsonl is missing, or was not written by us")
    one = next(iter(accounts.values())) if len(runs) == 1 else None
    for line in [*(_attempts(one) if one else _overview(accounts)), "", *_total(list(accounts.values()))]:
        say(line)
    if picture and one:
        from runner.inspect.timeline_plot import draw_timeline

        draw_timeline(one, str(runs[0]), picture)
        say(f"{picture}  drawn")
    return Answer(
        {"runs": [{"run": str(run), **_plain(account_for_attempts)} for run, account_for_attempts in accounts.items()]}
    )


def read_account(run: RunDir) -> TimeAccount:
    """The account of one run, up to its last sign of life if it is at work."""
    status = run.read_status()
    try:
        document = read_config_document(run, status.get("attempt", {}).get("drift", ()))
    except (RefusedError, AttributeError, ValueError):  # where the time went can be said without it
        document = {}
    return account_for_run(run, status, document)


def account_for_run(run: RunDir, status: Mapping[str, Any], document: Mapping[str, Any]) -> TimeAccount:
    """The same, of a run whose files have been read already."""
    train = document.get("train")
    price = train.get("dollars_per_hour") if isinstance(train, dict) else None
    return account_for_attempts(_lines(run, status), float(price) if isinstance(price, int | float) else None)


def _lines(run: RunDir, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """attempts.jsonl, and the lines that it does not hold yet: of who was killed since, and of who is at work."""
    written = read_attempts(run)
    known = {(line.get("attempt"), line.get("started")) for line in written}
    pending = list(status.get("unburied", []))
    if status.get("state") == "running" and "started" in status.get("attempt", {}):
        pending.append(line_of_killed(status, heartbeat.read_heartbeat(run.heartbeat)))
        if is_in_use(run):
            pending[-1]["ending"] = "running"
    durable = newest_durable_step(run.checkpoints) if pending else 0
    for line in pending:
        line["lost_steps"] = 0 if line["ending"] == "running" else max(line["to_step"] - durable, 0)
    return written + [line for line in pending if (line.get("attempt"), line.get("started")) not in known]


def find_runs(path: str) -> list[RunDir]:
    """The run in this directory, or the runs below it. Raises RefusedError where there is none."""
    place = RunDir(Path(path).expanduser())
    return (
        [place] if is_run(place) else list_runs(place.path) or [find_run(path)]
    )  # the last says what is wrong with it


def _picture(name: str, runs: Sequence[RunDir]) -> Path:
    path = Path(name).expanduser()
    if len(runs) != 1:
        raise ConfigError(f"--to {name}: a picture shows one run, and these are {len(runs)}; name one of them")
    if path.suffix not in PICTURES:
        raise ConfigError(f"--to {name}: is no picture; expected a name that ends in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--to {name}: there is no directory {path.parent}; make it, or choose another")
    return path


def _attempts(account: TimeAccount) -> list[str]:
    """One line for each attempt."""
    head = ("#", "started", "host", "ended", "steps", "done again", "down before", "took")
    rows = [
        (
            str(span.number),
            format_time(span.started).removesuffix(" UTC"),
            span.host,
            span.how,
            span.steps,
            f"{span.lost_steps:,}" if span.lost_steps else "",
            format_duration(span.down / 1000) if span.down else "",
            format_duration((span.end - span.start) / 1000),
        )
        for span in account_for_attempts.spans
    ]
    lines = format_table(
        head, rows, right=("#", "steps", "done again", "down before", "took"), flexible=("host", "ended")
    )
    return lines + _left_out(account_for_attempts.unreadable)


def _overview(accounts: Mapping[RunDir, TimeAccount]) -> list[str]:
    """One line for each run."""
    head = ("goodput", "attempts", "interrupted", "done again", "wall-clock", "cost", "run")
    rows = [
        (
            format_percent(account_for_attempts.buckets["progress"], account_for_attempts.clock)
            if account_for_attempts.spans
            else "",
            str(len(account_for_attempts.spans)),
            str(account_for_attempts.interruptions or ""),
            str(account_for_attempts.lost_steps or ""),
            format_duration(account_for_attempts.clock / 1000),
            "" if account_for_attempts.dollars is None else format_dollars(account_for_attempts.dollars),
            str(run),
        )
        for run, account_for_attempts in accounts.items()
    ]
    return format_table(head, rows, right=head[:-1]) + _left_out(
        sum(account_for_attempts.unreadable for account_for_attempts in accounts.values())
    )


def _left_out(count: int) -> list[str]:
    return (
        [f"{format_count(count, 'line')} of attempts.jsonl left out: no time of start and end in it"] if count else []
    )


def _total(accounts: Sequence[TimeAccount]) -> list[str]:
    """The bar, what its characters mean, and the sums."""
    buckets = {name: sum(account_for_attempts.buckets[name] for account_for_attempts in accounts) for name in LEGEND}
    clock, running = (
        sum(getattr(account_for_attempts, name) for account_for_attempts in accounts) for name in ("clock", "running")
    )
    rows = [
        (LEGEND[name][0], name, format_duration(time / 1000), format_percent(time, clock), LEGEND[name][1])
        for name, time in buckets.items()
        if time >= SEEN
    ]
    head = ("", "", "time", "share", "")
    count = sum(account_for_attempts.interruptions for account_for_attempts in accounts)
    lines = [draw_bar(buckets, min(terminal_width(), 100)), *format_table(head, rows, right=("time", "share"))[1:], ""]
    lines.append(
        f"goodput {format_percent(buckets['progress'], clock)} of {format_duration(clock / 1000)}"
        + (
            f" ({format_percent(buckets['progress'], running)} of the time an attempt was running)"
            if clock > running
            else ""
        )
        + f": {format_count(sum(len(account_for_attempts.spans) for account_for_attempts in accounts), 'attempt')}, {format_count(count, 'interruption')}, "
        f"{format_count(sum(account_for_attempts.lost_steps for account_for_attempts in accounts), 'step')} done again"
    )
    return lines + _money(accounts)


def _money(accounts: Sequence[TimeAccount]) -> list[str]:
    """What it cost, where the price is known: all of it, and what of that was not for progress."""
    priced = [account_for_attempts for account_for_attempts in accounts if account_for_attempts.dollars is not None]
    if not priced:
        return []
    total = sum(account_for_attempts.dollars or 0.0 for account_for_attempts in priced)
    progress = sum(
        (account_for_attempts.dollars or 0.0) * account_for_attempts.goodput_running for account_for_attempts in priced
    )
    prices = {account_for_attempts.dollars_per_hour for account_for_attempts in priced}
    price = f"at ${prices.pop():g} an hour" if len(prices) == 1 else "at their prices"
    only = f" ({len(priced)} of {len(accounts)} runs have a price)" if len(priced) < len(accounts) else ""
    return [f"{format_dollars(total)} {price} while attempts ran: {format_dollars(progress)} of it for progress{only}"]


def draw_bar(spent: Mapping[str, int], room: int) -> str:
    """Shares as one line of `room` characters, cut where the running sum is: who has less than half of one has none."""
    total, upto, drawn = sum(spent.values()) or 1, 0, ""
    for name, time in spent.items():
        upto += time
        drawn += LEGEND[name][0] * (round(upto / total * room) - len(drawn))
    return drawn


def format_dollars(amount: float) -> str:
    """`$12.34`; small amounts with more digits."""
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.2g}"


def _plain(account: TimeAccount) -> dict[str, Any]:
    """The same as data: seconds, unix seconds."""
    spans = []
    for span in account_for_attempts.spans:
        times = {name: getattr(span, name) / 1000 for name in ("start", "end", "down")}
        facts = {**asdict(span), **times, "buckets": {name: time / 1000 for name, time in span.buckets.items()}}
        spans.append({key: value for key, value in facts.items() if value is not None})
    return {
        "goodput": account_for_attempts.goodput,
        "goodput_running": account_for_attempts.goodput_running,
        "seconds": account_for_attempts.clock / 1000,
        "buckets": {name: account_for_attempts.buckets[name] / 1000 for name in BUCKETS},
        "interruptions": account_for_attempts.interruptions,
        "lost_steps": account_for_attempts.lost_steps,
        "dollars": account_for_attempts.dollars,
        "unreadable": account_for_attempts.unreadable,
        "attempts": spans,
    }
