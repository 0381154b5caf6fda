"""README.md of a run: what it is, how it stands, and what to type next. Made from the files beside it. No jax."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.text import utc_now
from runner.types import JsonObject

AttemptLine = JsonObject  # a line of attempts.jsonl, or the running attempt as status.json has it


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
    why = f": {status['why']}" if status.get("why") else ""
    state = f"**{status.get('state', 'new')}** at step {status.get('step', 0)} of {status.get('steps')}{why}"
    lines = [f"# {run_dir.path.parent.name}/{run_dir.path.name}", "", state, ""]
    if best := status.get("best"):
        lines.append(f"- best: {best['metric']} {best['value']:.5g} at step {best['step']}")
    if last := status.get("last"):
        lines.append(f"- last: {', '.join(f'{name} {value:.5g}' for name, value in last.items())}")
    return lines


def _render_commands(run_dir: RunDir, current: AttemptLine) -> list[str]:
    # A run with code of the user's own is only continued where he says that he trusts it.
    trust = " --trust" if current.get("external") else ""
    return [
        "## Go on",
        "",
        "```",
        f"{shlex.join(current['command'])}    # resumes; a finished run says so",
        f"python run.py dir={run_dir} train.steps=N{trust}    # continue it under a changed configuration",
        f"python -m runner ls {run_dir}                # its checkpoints: why saved, why kept, whether good",
        f"python -m runner eval {run_dir}@best         # its evaluations on the best weights, or others",
        f"python -m runner export {run_dir}@best DIR   # the best weights, as safetensors, with a model card",
        f"python -m runner goodput {run_dir}           # where the time of all attempts went",
        "```",
    ]


def _render_differences(status: JsonObject, past: Sequence[AttemptLine], current: AttemptLine) -> list[str]:
    """List what was typed when the run was begun, and what has changed since."""
    begun = (past[0] if past else current)["command"][2:]
    typed = [f"- `{word}`" for word in begun if not word.startswith("-")]
    lines = ["## What differs from the defaults", "", *(typed or ["Nothing."])]
    # In the order of their first appearance, each once: every later attempt drifts from the beginning as well.
    drifts = dict.fromkeys(change for attempt in [*past, current] for change in attempt["drift"])
    lines += [f"- later: {change}" for change in drifts]
    lines += [f"- batch {one['batch']} is skipped ({one['why']})" for one in status.get("skipped", [])]
    return lines


def _render_makers(attempt: AttemptLine) -> list[str]:
    lines = [
        "## Made by",
        "",
        f"- command: `{shlex.join(attempt.get('command', []))}`",
        f"- code: {attempt.get('git') or 'not in a git checkout'}",
    ]
    for key, origin in attempt.get("external", {}).items():
        lines.append(f"- {key}: `{origin['target']}` from {origin['file']} ({origin['hash']})")
    if "remat" in attempt:
        lines.append(f"- remat: {attempt['remat']}")
    packages = ", ".join(f"{name} {version}" for name, version in attempt.get("packages", {}).items())
    lines.append(f"- hardware: {attempt.get('hardware', 'unknown')}, host {attempt.get('host')}")
    lines.append(f"- Python {attempt.get('python')}, {packages}")
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
    if status.get("state") == "running":
        lines.append(_render_row({**current, "ending": "running"}))
    return lines


def _render_row(attempt: AttemptLine) -> str:
    spent = {bucket: round(seconds, 1) for bucket, seconds in attempt.get("seconds", {}).items()}
    largest_first = sorted(spent.items(), key=lambda item: -item[1])
    during = f" during {attempt['during']}" if "during" in attempt else ""
    cells = [
        attempt["attempt"],
        _strip_fraction(attempt["started"]),
        attempt["host"],
        f"{attempt.get('from_step', '')} → {attempt.get('to_step', '')}",
        f"{attempt['ending']}{during} {_strip_fraction(attempt.get('ended') or '')}".strip(),
        attempt.get("lost_steps", ""),
        ", ".join(f"{bucket} {value:g}" for bucket, value in largest_first if value),
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _strip_fraction(timestamp: str) -> str:
    """Return an ISO time of day without its milliseconds and zone: all are UTC."""
    return timestamp.partition(".")[0].partition("+")[0]
