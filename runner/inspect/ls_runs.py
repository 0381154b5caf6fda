"""`ls`: the checkpoints of a run, or the runs of a directory, oldest first. Imports nothing heavy, reads no array."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from runner.checkpoint.record import Score, find_best, list_steps
from runner.checkpoint.restore import list_ignored_names
from runner.checkpoint.retention import select_survivors
from runner.errors import RefusedError
from runner.inspect.lookup import (
    CheckpointStatus,
    RetentionSettings,
    find_run,
    is_run,
    read_checkpoint_status,
    read_retention_settings,
)
from runner.rundir.layout import RunDir, run_state
from runner.text import format_age, format_count, format_size, format_table
from runner.values import Answer, Say


def arguments(parser: ArgumentParser) -> None:
    """A run, or a directory of runs."""
    parser.add_argument("run", metavar="RUN", nargs="?", default="outputs", help="a run, or a directory of runs")
    parser.add_argument("--verify", action="store_true", help="compare checksums, not only names and sizes")


def run(arguments: Namespace, say: Say) -> Answer:
    """List what is there."""
    place = RunDir(Path(arguments.run).expanduser())
    if not is_run(place):
        if found := list_runs(place.path):
            return _list_runs(found, say)
        find_run(arguments.run)  # says what is wrong with it
    return _list_checkpoints(place, say, checksums=arguments.verify)


def list_runs(folder: Path) -> list[RunDir]:
    """The runs in `outputs/NAME`, or in `outputs`, the one that was touched last at the end."""
    visible = [path for level in ("*", "*/*") for path in folder.glob(level) if not path.name.startswith(".")]
    found = [run for path in visible if path.parent.name[:1] != "." and is_run(run := RunDir(path))]
    return sorted(found, key=lambda run: (run.status if run.status.exists() else run.path).stat().st_mtime)


def _list_runs(runs: Sequence[RunDir], say: Say) -> Answer:
    entries: list[dict[str, Any]] = []
    for run in runs:
        status = run.read_status()
        known = {"state": run_state(run), **{key: status.get(key) for key in ("step", "steps", "best")}}
        updated = datetime.fromisoformat(status["updated"]).timestamp() if "updated" in status else None
        steps = list_steps(run.checkpoints)
        entries.append({"run": str(run), **known, "checkpoints": steps, "updated_unix_seconds": updated})
    rows = [
        (
            entry["state"],
            f"{entry['step']}/{entry['steps']}" if entry["step"] is not None else "",
            "{metric} {value:.4g} at {step}".format(**entry["best"]) if entry["best"] else "",
            str(len(entry["checkpoints"])),
            format_age(time.time() - entry["updated_unix_seconds"]) if entry["updated_unix_seconds"] else "",
            entry["run"],  # last: it may be long, and is there to be copied
        )
        for entry in entries
    ]
    for line in format_table(
        ("state", "step", "best", "saved", "touched", "run"), rows, right=("step", "saved", "touched")
    ):
        say(line)
    return Answer({"runs": entries})


def _list_checkpoints(run: RunDir, say: Say, *, checksums: bool) -> Answer:
    try:
        settings, unknown = read_retention_settings(run), None
    except RefusedError as error:  # checkpoints can be looked at without it
        settings, unknown = RetentionSettings({}, Score(), "bytes"), str(error)
    looks = [
        read_checkpoint_status(run.checkpoints / str(step), checksums=checksums) for step in list_steps(run.checkpoints)
    ]
    entries = _entries([found for found in looks if found is not None], settings, known=unknown is None)
    aside = [{"name": path.name, "reason": _reason(path)} for path in sorted(run.quarantine.glob("*")) if path.is_dir()]
    for line in _shown(entries, settings.score.metric):
        say(line)
    say(_summary(run, entries))
    notes = [f"{entry['step']} is not good: {entry['problem']}" for entry in entries if entry["problem"]]
    notes += [f"not known which stay: {unknown}"] if unknown else []
    notes += _misled(run, entries)
    if strange := list_ignored_names(run.checkpoints):
        notes.append(f"ignored (not a directory named like a step): {', '.join(strange)}")
    notes += [f"in quarantine: {entry['name']}: {entry['reason']}" for entry in aside]
    for note in ["", *notes] if notes else []:
        say(note)
    score = {"metric": settings.score.metric, "mode": settings.score.mode}
    rest = {"ignored": strange, "quarantine": aside, "notes": notes}
    return Answer({"run": str(run), "score": score, "checkpoints": entries, **rest})


def _entries(looks: Sequence[CheckpointStatus], settings: RetentionSettings, *, known: bool) -> list[dict[str, Any]]:
    """The facts of each checkpoint; those without a believable record have few."""
    records = [found.record for found in looks if found.record is not None]
    kept = select_survivors(settings.keep, records, settings.score) if known else {}
    best = find_best(records, settings.score)
    newest = max((record.step for record in records if not record.mark), default=None)
    entries = []
    for found in looks:
        record = found.record
        marks = {
            "best": best is not None and found.step == best.step,
            "newest": found.step == newest,
            "pinned": record is not None and record.pinned,
            "error": record is not None and record.mark == "error",
        }
        entries.append(
            {
                "step": found.step,
                "saved_unix_seconds": record and record.saved_unix_seconds,
                "reason": record and record.reason,
                "kept": kept.get(found.step),
                "metrics": dict(record.metrics) if record else {},
                "bytes": record and record.num_bytes,
                "verified": found.proof,
                "problem": found.problem,
                "marks": [mark for mark, holds in marks.items() if holds],
            }
        )
    return entries


def _shown(entries: Sequence[dict[str, Any]], metric: str) -> list[str]:
    if not entries:
        return []
    head = ("step", "age", "saved because", "kept because", metric, "size", "verified", "marks")
    rows = [
        (
            str(entry["step"]),
            format_age(time.time() - entry["saved_unix_seconds"]) if entry["saved_unix_seconds"] else "",
            entry["reason"] or "",
            entry["kept"] or "",
            f"{entry['metrics'][metric]:.4g}" if metric in entry["metrics"] else "",
            format_size(entry["bytes"]) if entry["bytes"] is not None else "",
            entry["verified"],
            ", ".join(entry["marks"]),
        )
        for entry in entries
    ]
    return format_table(head, rows, right=("step", "age", metric, "size"), flexible=("saved because", "kept because"))


def _summary(run: RunDir, entries: Sequence[dict[str, Any]]) -> str:
    status = run.read_status()
    total = format_size(sum(entry["bytes"] or 0 for entry in entries))
    stands = f"; {run_state(run)} at step {status.get('step')} of {status.get('steps')}" if "state" in status else ""
    return f"{format_count(len(entries), 'checkpoint')}, {total}{stands}"


def _misled(run: RunDir, entries: Sequence[dict[str, Any]]) -> list[str]:
    """A note where `RUN@best` would be another one than the best, or none: somebody has been at work by hand."""
    link = run.checkpoints / "best"
    best = next((str(entry["step"]) for entry in entries if "best" in entry["marks"]), None)
    there = link.readlink().name if link.is_symlink() else "a directory" if link.exists() else None
    if best == there:
        return []
    return [f"@best is {there or 'nothing'}, but the best is {best or 'none'}; the next save or prune puts it right"]


def _reason(aside: Path) -> str:
    try:
        return (aside / "reason.txt").read_text().strip()
    except OSError:
        return "it does not say why"
