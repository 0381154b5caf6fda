"""`goodput`: tell where the wall-clock of a run went, over all its attempts, and what that cost. Changes nothing.

time_account.py says what each bucket means, and what counts as progress.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

from runner.checkpoint.record import newest_durable_step
from runner.errors import ConfigError, RefusedError
from runner.files import read_file
from runner.inspect.lookup import find_runs, is_at_work, read_config_document
from runner.inspect.tiers import read_tiers
from runner.inspect.time_account import BUCKETS, SHOWN_MILLISECONDS, TimeAccount, account_for_attempts
from runner.inspect.timing_lines import measure_speed, read_json_lines
from runner.log.console import list_rates
from runner.profiling.profile_record import format_pace, list_profiles
from runner.rundir.attempt_lines import line_of_killed, parse_attempt_lines
from runner.rundir.heartbeat import read_heartbeat
from runner.rundir.layout import RunDir
from runner.text import (
    display_path,
    format_count,
    format_duration,
    format_percent,
    format_table,
    format_time,
    terminal_width,
)
from runner.types import Document, JsonObject
from runner.values import Say, VerbResult

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
MOST_BAR_CHARACTERS = 100
# So many operations of a trace are listed; profile.json has more.
SHOWN_OPERATIONS = 5
# An hour of no machine costs as much: what a configuration from elsewhere may say is bounded.
MOST_DOLLARS = 1e9
# bucket → the character that stands for it in the bar, and what it is
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
    "profile": ("p", "starting and writing a trace of some steps"),
    "finish": ("f", "the last write, closing"),
    "other": ("?", "nobody wrote down"),
    "down": ("·", "no attempt was running"),
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the runs, and where a picture goes."""
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a run, or a directory of runs")
    parser.add_argument("--to", metavar="FILE.png", help="draw the attempts of one run on a time axis")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Say where the time went: a line for each attempt of one run, or for each of several runs, and the sums.

    Raises RefusedError where there is no run or no attempt, ConfigError where FILE is no place for a picture.
    """
    runs = [run_dir for path in arguments.paths for run_dir in find_runs(path)]
    picture = _check_picture(arguments.to, runs) if arguments.to else None
    accounts = {run_dir: read_account(run_dir) for run_dir in runs}
    if not any(account.spans for account in accounts.values()):
        raise RefusedError(f"{runs[0]}: nothing says when it ran: attempts.jsonl is missing, or was not written by us")
    only = next(iter(accounts.values())) if len(runs) == 1 else None
    for line in [*(_format_attempts(only) if only else _format_runs(accounts)), ""]:
        say(line)
    for line in _format_total(list(accounts.values())):
        say(line)
    if only:
        for line in _format_steps(runs[0]):
            say(line)
    remotes = {run_dir: read_tiers(run_dir) for run_dir in runs}
    for run_dir, tiers in remotes.items():
        if tiers is not None:
            named = "" if only else f"{run_dir}: "
            say(f"{named}{'; '.join(filter(None, [tiers.summarize(), tiers.summarize_requests()]))}")
    if picture and only:
        # Imported where something is drawn: matplotlib takes longer than all of the rest.
        from runner.inspect.timeline_plot import draw_timeline

        draw_timeline(only, str(runs[0]), picture)
        say(f"{picture}  drawn")
    entries = []
    for run_dir, account in accounts.items():
        tiers = remotes[run_dir]
        profiles = [record.document() for record in list_profiles(run_dir.profile)]
        entry = {"run": str(run_dir), **_describe_account(account), "remote": tiers and tiers.describe()}
        entries.append({**entry, "profiles": profiles})
    return VerbResult({"runs": entries})


def _format_steps(run_dir: RunDir) -> list[str]:
    """Return how fast steps went, and what traces of some of them say, with the operations of the newest."""
    lines = []
    if speed := measure_speed(list(read_json_lines(run_dir.timing))):
        lines.append(f"steps: {', '.join(list_rates(speed))} (medians, without evaluating and saving)")
    profiles = list_profiles(run_dir.profile)
    lines += [f"profile of {record.describe()}" for record in profiles]
    newest = next((record for record in reversed(profiles) if record.summary), None)
    if newest and newest.summary:
        head = ("operation", "kind", "share", "time", "times")
        rows = [
            (each.name, each.kind, format_percent(each.share, 1.0), format_pace(each.seconds), str(each.count))
            for each in newest.summary.operations[:SHOWN_OPERATIONS]
        ]
        table = format_table(head, rows, right=("share", "time", "times"), flexible=("operation",))
        lines += ["", f"most time in {newest.window}, of {display_path(newest.folder)}:", *table]
    return lines


def read_account(run_dir: RunDir) -> TimeAccount:
    """Return the account of one run; of one that is at work up to its last sign of life."""
    status = run_dir.read_status()
    try:
        document = read_config_document(run_dir, status.get("attempt", {}).get("drift", ()))
    except (RefusedError, AttributeError, ValueError):
        # Without its configuration only the price is unknown.
        document = {}
    return account_for_run(run_dir, status, document)


def account_for_run(run_dir: RunDir, status: JsonObject, document: Document) -> TimeAccount:
    """Return the account of a run whose status.json and config.yaml were read already."""
    train = document.get("train")
    price = train.get("dollars_per_hour") if isinstance(train, dict) else None
    written: list[JsonObject] = []
    num_damaged = 0
    # There are none yet, or they cannot be read now.
    with suppress(OSError):
        written, num_damaged = parse_attempt_lines(read_file(run_dir.attempts))
    lines = _add_pending_lines(written, run_dir, status)
    known = isinstance(price, int | float) and 0 <= price < MOST_DOLLARS
    account = account_for_attempts(lines, float(cast(float, price)) if known else None)
    return replace(account, unreadable=account.unreadable + num_damaged)


def _add_pending_lines(written: list[JsonObject], run_dir: RunDir, status: JsonObject) -> list[JsonObject]:
    """Return the lines of attempts.jsonl, and those that it will have: of the killed and of the one that is at work."""
    pending = list(status.get("unburied", []))
    if status.get("state") == "running" and "started" in status.get("attempt", {}):
        pending.append(line_of_killed(status, read_heartbeat(run_dir.heartbeat)))
        if is_at_work(run_dir):
            pending[-1]["ending"] = "running"
    durable = newest_durable_step(run_dir.checkpoints) if pending else 0
    for line in pending:
        line["lost_steps"] = 0 if line["ending"] == "running" else max(line["to_step"] - durable, 0)
    # The next attempt writes the line of a killed one, perhaps just now: then status.json still tells of it as well.
    known = {(line.get("attempt"), line.get("started")) for line in written}
    return written + [line for line in pending if (line.get("attempt"), line.get("started")) not in known]


def _check_picture(name: str, runs: Sequence[RunDir]) -> Path:
    """Return the path of the picture. Raises ConfigError where none can be drawn there."""
    path = Path(name).expanduser()
    if len(runs) != 1:
        raise ConfigError(f"--to {name}: a picture shows one run, and these are {len(runs)}; name one of them")
    if path.suffix not in PICTURE_SUFFIXES:
        raise ConfigError(f"--to {name}: is no picture; expected a name that ends in {', '.join(PICTURE_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--to {name}: there is no directory {path.parent}; make it, or choose another")
    return path


def _format_attempts(account: TimeAccount) -> list[str]:
    """Return a table with a line for each attempt."""
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
        for span in account.spans
    ]
    right = ("#", "steps", "done again", "down before", "took")
    return format_table(head, rows, right=right, flexible=("host", "ended")) + _format_doubts([account])


def _format_runs(accounts: Mapping[RunDir, TimeAccount]) -> list[str]:
    """Return a table with a line for each run."""
    head = ("goodput", "attempts", "interrupted", "done again", "wall-clock", "cost", "run")
    rows = [
        (
            format_percent(account.buckets["progress"], account.clock) if account.spans else "",
            str(len(account.spans)),
            str(account.interruptions or ""),
            str(account.lost_steps or ""),
            format_duration(account.clock / 1000),
            "" if account.dollars is None else format_dollars(account.dollars),
            str(run_dir),
        )
        for run_dir, account in accounts.items()
    ]
    return format_table(head, rows, right=head[:-1]) + _format_doubts(list(accounts.values()))


def _format_doubts(accounts: Sequence[TimeAccount]) -> list[str]:
    """Return a line for each reason why the account may be wrong."""
    lines = []
    if count := sum(account.unreadable for account in accounts):
        lines.append(f"{format_count(count, 'line')} of attempts.jsonl left out: no attempt with its times is in it")
    if count := sum(account.set_clocks for account in accounts):
        lines.append(f"a clock was set back {format_count(count, 'time')}: what lies between counts as no time")
    return lines


def _format_total(accounts: Sequence[TimeAccount]) -> list[str]:
    """Return the bar, what its characters mean, and the sums over all runs."""
    buckets = {name: sum(account.buckets[name] for account in accounts) for name in LEGEND}
    clock, running = sum(account.clock for account in accounts), sum(account.running for account in accounts)
    rows = [
        (LEGEND[name][0], name, format_duration(spent / 1000), format_percent(spent, clock), LEGEND[name][1])
        for name, spent in buckets.items()
        if spent >= SHOWN_MILLISECONDS
    ]
    # The legend needs no head: the bar stands where it would.
    legend = format_table(("", "", "time", "share", ""), rows, right=("time", "share"))[1:]
    summary = f"goodput {format_percent(buckets['progress'], clock)} of {format_duration(clock / 1000)}"
    if clock > running:
        summary += f" ({format_percent(buckets['progress'], running)} of the time an attempt was running)"
    counts = (
        format_count(sum(len(account.spans) for account in accounts), "attempt"),
        format_count(sum(account.interruptions for account in accounts), "interruption"),
        f"{format_count(sum(account.lost_steps for account in accounts), 'step')} done again",
    )
    bar = draw_bar(buckets, min(terminal_width(), MOST_BAR_CHARACTERS))
    return [bar, *legend, "", f"{summary}: {', '.join(counts)}", *_format_devices(accounts), *_format_cost(accounts)]


def _format_devices(accounts: Sequence[TimeAccount]) -> list[str]:
    """Return one line on the time of all devices, where an attempt had several."""
    most = max((span.devices for account in accounts for span in account.spans), default=1)
    spent = sum(account.device_time for account in accounts)
    return [f"{format_duration(spent / 1000)} of device time, on up to {most} devices at once"] if most > 1 else []


def _format_cost(accounts: Sequence[TimeAccount]) -> list[str]:
    """Return one line on what the runs with a price cost, and how much of that was for progress."""
    priced = [account for account in accounts if account.dollars is not None]
    if not priced:
        return []
    total = sum(account.dollars or 0.0 for account in priced)
    progress = sum((account.dollars or 0.0) * account.goodput_running for account in priced)
    prices = {account.dollars_per_hour for account in priced}
    price = f"at ${prices.pop():g} an hour" if len(prices) == 1 else "at their prices"
    some = f" ({len(priced)} of {len(accounts)} runs have a price)" if len(priced) < len(accounts) else ""
    return [f"{format_dollars(total)} {price} while attempts ran: {format_dollars(progress)} of it for progress{some}"]


def draw_bar(spent: Mapping[str, int], width: int) -> str:
    """Return the shares of the buckets as a line of `width` characters, each bucket with its own character."""
    total, so_far, bar = sum(spent.values()) or 1, 0, ""
    # Cut where the running sum is, so that the widths add up; what has less than half a character may get none.
    for name, time in spent.items():
        so_far += time
        bar += LEGEND[name][0] * (round(so_far / total * width) - len(bar))
    return bar


def format_dollars(amount: float) -> str:
    """Return a price: `$12.34`, and below a dollar with two digits that count, `$0.0042`."""
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.2g}"


def _describe_account(account: TimeAccount) -> JsonObject:
    """Return an account as data, in seconds and unix seconds."""
    attempts = []
    for span in account.spans:
        facts = {
            **asdict(span),
            "start": span.start / 1000,
            "end": span.end / 1000,
            "down": span.down / 1000,
            "buckets": {name: spent / 1000 for name, spent in span.buckets.items()},
        }
        attempts.append({key: value for key, value in facts.items() if value is not None})
    return {
        "goodput": account.goodput,
        "goodput_running": account.goodput_running,
        "seconds": account.clock / 1000,
        "device_seconds": account.device_time / 1000,
        "buckets": {name: account.buckets[name] / 1000 for name in BUCKETS},
        "interruptions": account.interruptions,
        "lost_steps": account.lost_steps,
        "dollars": account.dollars,
        "unreadable": account.unreadable,
        "set_clocks": account.set_clocks,
        "attempts": attempts,
    }
