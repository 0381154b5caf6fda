"""README.md of a run: what it is, how it stands, and what to type next. Made from the files beside it. No jax.

Those may come from somebody else. Their values have the right types when they come here, and any text in them: it is
escaped, so that no word of theirs becomes markup, and none that is to be typed leaves its quotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from runner.files import read_json_object, replace_file
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.rundir.side_files import is_number
from runner.text import escape_markdown, format_code_span, quote_override, quote_words, utc_now
from runner.types import JsonObject

AttemptLine = JsonObject  # a line of attempts.jsonl, or the running attempt as status.json has it


def write_readme(run_dir: RunDir) -> None:
    """Replace the page about a run. It is for people: where it cannot be written, nothing else changes."""
    with suppress(OSError):
        if run_dir.status.exists():
            replace_file(run_dir.readme, render_readme(run_dir))


def render_readme(run_dir: RunDir) -> str:
    """Return the page about a run, as Markdown, from status.json and attempts.jsonl."""
    status, past = run_dir.read_status(), read_attempts(run_dir)
    current = status.get("attempt", {})
    sections = [
        _render_head(run_dir, status),
        _render_commands(run_dir, current),
        _render_differences(status, past, current),
        _render_makers(current),
        _render_attempts(status, past, current),
        [f"Written by the runner, {utc_now()}.", ""],
    ]
    return "\n\n".join("\n".join(section) for section in sections)


def _render_head(run_dir: RunDir, status: JsonObject) -> list[str]:
    why = f": {escape_markdown(status['why'])}" if status.get("why") else ""
    progress = f"at step {status.get('step', 0)} of {status.get('steps') or '?'}"
    if status.get("stopped_early"):
        progress += ", stopped early"
    lines = [
        f"# {escape_markdown(f'{run_dir.path.parent.name}/{run_dir.path.name}')}",
        "",
        f"**{escape_markdown(status.get('state', 'new'))}** {progress}{why}",
        "",
    ]
    if best := status.get("best"):
        lines.append(f"- best: {escape_markdown(best['metric'])} {best['value']:.5g} at step {best['step']}")
    if url := _read_remote_url(run_dir):
        lines.append(
            f"- lives in {format_code_span(url)} as well: the same command goes on from there on an empty disk"
        )
    if last := status.get("last"):
        values = (f"{escape_markdown(name)} {value:.5g}" for name, value in last.items())
        lines.append(f"- last: {', '.join(values)}")
    if final := status.get("final"):
        values = (f"{escape_markdown(name)} {value:.5g}" for name, value in final.items())
        lines.append(f"- of the weights it ends on, those of step {status.get('final_step', '?')}: {', '.join(values)}")
    return lines


def _read_remote_url(run_dir: RunDir) -> str | None:
    """Return the place that a run has in a bucket (remote.json); None where it lives on this disk alone."""
    with suppress(OSError):
        url = (read_json_object(run_dir.remote_note) or {}).get("url")
        return url if isinstance(url, str) else None
    return None


def _render_commands(run_dir: RunDir, current: AttemptLine) -> list[str]:
    # What a run's own document may not decide: code, and where to connect to.
    trust = " --trust" if current.get("needs_trust") else ""
    run, best = (quote_words([word]) for word in (str(run_dir), f"{run_dir}@best"))
    where = quote_override("dir", str(run_dir))
    again = [f"{quote_words(current['command'])}    # resumes; a finished run says so"] if "command" in current else []
    return [
        "## Go on",
        "",
        "```",
        *again,
        f"python run.py {where} train.steps=N{trust}    # continue it under a changed configuration",
        f"python -m runner ls {run}                # its checkpoints: why saved, why kept, whether good",
        f"python -m runner eval {best}         # its evaluations on the best weights, or others",
        f"python -m runner export {best} DIR   # the best weights, as safetensors, with a model card",
        f"python -m runner goodput {run}           # where the time of all attempts went",
        "```",
    ]


def _render_differences(status: JsonObject, past: Sequence[AttemptLine], current: AttemptLine) -> list[str]:
    """List what was typed when the run was begun, and what has changed since."""
    begun = (past[0] if past else current).get("command", [])[2:]
    typed = [f"- {format_code_span(word)}" for word in begun if not word.startswith("-")]
    lines = ["## What differs from the defaults", "", *(typed or ["Nothing."])]
    # In the order of their first appearance, each once: every later attempt drifts from the beginning as well.
    drifts = dict.fromkeys(change for attempt in [*past, current] for change in attempt.get("drift", ()))
    lines += [f"- later: {format_code_span(change)}" for change in drifts]
    skipped = status.get("skipped", [])
    lines += [f"- batch {one['batch']} is skipped ({escape_markdown(one['why'])})" for one in skipped]
    return lines


def _render_makers(attempt: AttemptLine) -> list[str]:
    lines = [
        "## Made by",
        "",
        f"- command: {format_code_span(quote_words(attempt.get('command', [])))}",
        f"- code: {escape_markdown(attempt.get('git') or 'not in a git checkout')}",
    ]
    for key, origin in attempt.get("external", {}).items():
        target, file = format_code_span(origin["target"]), escape_markdown(origin["file"])
        lines.append(f"- {escape_markdown(key)}: {target} from {file} ({escape_markdown(origin['hash'])})")
    if "remat" in attempt:
        lines.append(f"- remat: {escape_markdown(attempt['remat'])}")
    packages = ", ".join(f"{name} {version}" for name, version in attempt.get("packages", {}).items())
    hardware, host = attempt.get("hardware", "unknown"), attempt.get("host", "unknown")
    lines.append(f"- hardware: {escape_markdown(hardware)}, host {escape_markdown(host)}")
    lines.append(f"- Python {escape_markdown(attempt.get('python', 'unknown'))}, {escape_markdown(packages)}")
    return lines


def _render_attempts(status: JsonObject, past: Sequence[AttemptLine], current: AttemptLine) -> list[str]:
    lines = [
        "## Attempts",
        "",
        "| # | started (UTC) | host | from → to | ended | lost steps | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_render_row(attempt) for attempt in past]
    # A running attempt has no line yet.
    if status.get("state") == "running" and current:
        lines.append(_render_row({**current, "ending": "running"}))
    return lines


def _render_row(attempt: AttemptLine) -> str:
    # Of a damaged line less may be left than a run writes.
    spent = {bucket: round(seconds, 1) for bucket, seconds in attempt.get("seconds", {}).items() if is_number(seconds)}
    largest_first = sorted(spent.items(), key=lambda item: -item[1])
    during = f" during {attempt['during']}" if "during" in attempt else ""
    cells: list[Any] = [
        attempt.get("attempt", "?"),
        _strip_fraction(attempt.get("started", "")),
        attempt.get("host", "unknown"),
        f"{attempt.get('from_step', '')} → {attempt.get('to_step', '')}",
        f"{attempt.get('ending', '')}{during} {_strip_fraction(attempt.get('ended', ''))}".strip(),
        attempt.get("lost_steps", ""),
        ", ".join(f"{bucket} {value:g}" for bucket, value in largest_first if value),
    ]
    return f"| {' | '.join(escape_markdown(str(cell)) for cell in cells)} |"


def _strip_fraction(timestamp: str) -> str:
    """Return an ISO time of day without its milliseconds and zone: all are UTC."""
    return timestamp.partition(".")[0].partition("+")[0]
