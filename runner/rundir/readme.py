"""README.md of a run: what it is, how it stands, and what to type next. Made from the files beside it."""

from __future__ import annotations

import shlex
from typing import Any

from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.text import utc_now


def render_readme(run: RunDir) -> str:
    """The page, from status.json and attempts.jsonl."""
    status, past = run.read_status(), read_attempts(run)
    current = status.get("attempt", {})
    command = shlex.join(current["command"])
    begun = (past[0] if past else current)["command"][2:]
    changed = [word for word in begun if not word.startswith("-")]
    trust = " --trust" if current.get("external") else ""
    drifts = {change: None for attempt in [*past, current] for change in attempt["drift"]}
    best, last = status.get("best"), status.get("last")
    lines = [
        f"# {run.path.parent.name}/{run.path.name}",
        "",
        f"**{status.get('state', 'new')}** at step {status.get('step', 0)} of {status.get('steps')}"
        + (f": {status['why']}" if status.get("why") else ""),
        "",
        *([f"- best: {best['metric']} {best['value']:.5g} at step {best['step']}"] if best else []),
        *([f"- last: {', '.join(f'{name} {value:.5g}' for name, value in last.items())}"] if last else []),
        "",
        "## Go on",
        "",
        "```",
        f"{command}    # resumes; a finished run says so",
        f"python run.py dir={run} train.steps=N{trust}    # continue it under a changed configuration",
        f"python -m runner ls {run}                # its checkpoints: why saved, why kept, whether good",
        f"python -m runner eval {run}@best         # its evaluations on the best weights, or others",
        f"python -m runner export {run}@best DIR   # the best weights, as safetensors, with a model card",
        f"python -m runner goodput {run}           # where the time of all attempts went",
        "```",
        "",
        "## What differs from the defaults",
        "",
        *([f"- `{line}`" for line in changed] or ["Nothing."]),
        *[f"- later: {change}" for change in drifts],
        *[f"- batch {one['batch']} is skipped ({one['why']})" for one in status.get("skipped", [])],
        "",
        "## Made by",
        "",
        *_made_by(current),
        "",
        "## Attempts",
        "",
        "| # | started (UTC) | host | from → to | ended | lost steps | seconds |",
        "|---|---|---|---|---|---|---|",
        *[_row(attempt) for attempt in past],
        *([_row({**current, "ending": "running"})] if status.get("state") == "running" else []),
        "",
        f"Written by the runner, {utc_now()}.",
        "",
    ]
    return "\n".join(lines)


def _made_by(attempt: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in attempt.get("packages", {}).items())
    own = attempt.get("external", {})
    return [
        f"- command: `{shlex.join(attempt.get('command', []))}`",
        f"- code: {attempt.get('git') or 'not in a git checkout'}",
        *[f"- {key}: `{one['target']}` from {one['file']} ({one['hash']})" for key, one in own.items()],
        *([f"- remat: {attempt['remat']}"] if "remat" in attempt else []),
        f"- hardware: {attempt.get('hardware', 'unknown')}, host {attempt.get('host')}",
        f"- Python {attempt.get('python')}, {packages}",
    ]


def _row(attempt: dict[str, Any]) -> str:
    spent = {bucket: round(seconds, 1) for bucket, seconds in attempt.get("seconds", {}).items()}
    seconds = ", ".join(f"{bucket} {value:g}" for bucket, value in sorted(spent.items(), key=_largest) if value)
    during = f" during {attempt['during']}" if "during" in attempt else ""
    ended = f"{attempt['ending']}{during} {_to_seconds(attempt.get('ended') or '')}".strip()
    cells = (
        attempt["attempt"],
        _to_seconds(attempt["started"]),
        attempt["host"],
        f"{attempt.get('from_step', '')} → {attempt.get('to_step', '')}",
        ended,
        attempt.get("lost_steps", ""),
        seconds,
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _largest(spent: tuple[str, float]) -> float:
    return -spent[1]


def _to_seconds(time: str) -> str:
    """An ISO time of day without its milliseconds and zone: all are UTC."""
    return time.partition(".")[0].partition("+")[0]
