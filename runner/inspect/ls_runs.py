"""`ls`: list the checkpoints of a run, or the runs of a directory, oldest first. Reads no array, imports no jax."""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from runner.checkpoint.record import Score, find_best, is_step_name, list_steps
from runner.checkpoint.restore import list_ignored_names
from runner.checkpoint.retention import select_survivors
from runner.errors import RefusedError, StorageError
from runner.files import read_file
from runner.inspect.base_sizes import measure_bases
from runner.inspect.lookup import (
    CheckpointStatus,
    RetentionSettings,
    find_run,
    is_run,
    list_runs,
    name_run,
    read_checkpoint_status,
    read_retention_settings,
    tell_state,
)
from runner.inspect.tiers import read_tiers
from runner.remote.options import is_remote_url
from runner.rundir.layout import RunDir
from runner.text import format_age, format_count, format_size, format_table, shorten
from runner.types import JsonObject
from runner.values import Say, VerbResult

# Of what a run has written down a few hundred characters are the most.
MAX_REASON_BYTES, MAX_REASON_CHARS = 1 << 16, 1000


def add_arguments(parser: ArgumentParser) -> None:
    """Add the run, or the directory of runs, and how closely to look."""
    parser.add_argument("run", metavar="RUN", nargs="?", default="outputs", help="a run, or a directory of runs")
    parser.add_argument("--verify", action="store_true", help="compare checksums, not only names and sizes")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Say a line for each checkpoint of a run, or for each run of a directory. Raises RefusedError where none is."""
    if is_remote_url(arguments.run):
        return _list_bucket(arguments.run, say, checksums=arguments.verify)
    run_dir = name_run(arguments.run)
    if is_run(run_dir):
        return _list_checkpoints(find_run(arguments.run), say, checksums=arguments.verify)
    if found := list_runs(run_dir.path):
        return _list_run_dirs(found, say)
    # Neither the one nor the other: this raises, and its message tells whether the directory is there at all.
    return _list_checkpoints(find_run(arguments.run), say, checksums=arguments.verify)


def _list_bucket(url: str, say: Say, *, checksums: bool) -> VerbResult:
    # Imported here: who looks at a disk waits for no client of a bucket.
    from runner.remote.reading import mirror_runs

    found = [RunDir(path) for path in mirror_runs(url, brief=True)]
    if str(found[0]) == url.rstrip("/"):
        return _list_checkpoints(found[0], say, checksums=checksums)
    return _list_run_dirs(found, say)


def _list_run_dirs(runs: Sequence[RunDir], say: Say) -> VerbResult:
    entries: list[JsonObject] = []
    for run_dir in runs:
        status = run_dir.read_status()
        updated = datetime.fromisoformat(status["updated"]).timestamp() if "updated" in status else None
        tiers = read_tiers(run_dir)
        entries.append(
            {
                "run": str(run_dir),
                "state": tell_state(run_dir),
                "stopped_early": bool(status.get("stopped_early")),
                "step": status.get("step"),
                "steps": status.get("steps"),
                "best": status.get("best"),
                "checkpoints": _count_steps(run_dir),
                "bases": [base.document for base in measure_bases(run_dir)],
                "remote": tiers.describe() if tiers else None,
                "updated_unix_seconds": updated,
            }
        )
    rows = [
        (
            entry["state"] + " early" * entry["stopped_early"],
            f"{entry['step']}/{entry['steps'] or '?'}" if entry["step"] is not None else "",
            "{metric} {value:.4g} at {step}".format(**entry["best"]) if entry["best"] else "",
            str(len(entry["checkpoints"])),
            _format_newest_remote(entry["remote"]),
            format_age(time.time() - entry["updated_unix_seconds"]) if entry["updated_unix_seconds"] else "",
            entry["run"],  # last: it may be long, and is there to be copied
        )
        for entry in entries
    ]
    head = ("state", "step", "best", "saved", "remote", "touched", "run")
    for line in format_table(head, rows, right=("step", "saved", "remote", "touched")):
        say(line)
    return VerbResult({"runs": entries})


def _format_newest_remote(remote: JsonObject | None) -> str:
    """Return the newest step of a run in its bucket; empty where it has none."""
    if remote is None:
        return ""
    return "none yet" if remote["newest"] is None else str(remote["newest"])


def _count_steps(run_dir: RunDir) -> list[int]:
    """Return the steps of a run; none where they cannot be listed: one run must not hide the others."""
    try:
        return [] if run_dir.checkpoints.is_symlink() else list_steps(run_dir.checkpoints)
    except (OSError, StorageError):
        return []


def _list_checkpoints(run_dir: RunDir, say: Say, *, checksums: bool) -> VerbResult:
    try:
        settings, unknown = read_retention_settings(run_dir), None
    except RefusedError as error:
        # Checkpoints can be looked at without a configuration; only which of them stay is then unknown.
        settings, unknown = RetentionSettings({}, Score(), "bytes"), str(error)
    directories = [run_dir.checkpoints / str(step) for step in list_steps(run_dir.checkpoints)]
    statuses = [read_checkpoint_status(directory, checksums=checksums) for directory in directories]
    entries = _describe_checkpoints([status for status in statuses if status], settings, known=unknown is None)
    tiers = read_tiers(run_dir)
    for entry in entries:
        entry["where"] = tiers and tiers.state_of(entry["step"])
    for line in _format_checkpoints(entries, settings.score.metric):
        say(line)
    say(_summarize_run(run_dir, entries))
    bases = measure_bases(run_dir)
    for base in bases:
        say(f"frozen weights {base.digest[:8]}, stored once: {base.describe()}")
    if tiers is not None:
        say(tiers.summarize())

    # What is out of order goes below the table: most runs have none of it.
    ignored = list_ignored_names(run_dir.checkpoints)
    aside = [{"name": path.name, "reason": _read_quarantine_reason(path)} for path in _list_quarantine(run_dir)]
    notes = [f"{entry['step']} is not good: {entry['problem']}" for entry in entries if entry["problem"]]
    if unknown:
        notes.append(f"not known which stay: {unknown}")
    notes += _check_best_link(run_dir, entries)
    if ignored:
        notes.append(f"ignored (not a directory named like a step): {', '.join(ignored)}")
    notes += [f"in quarantine: {entry['name']}: {entry['reason']}" for entry in aside]
    for note in ["", *notes] if notes else []:
        say(note)
    return VerbResult(
        {
            "run": str(run_dir),
            "score": {"metric": settings.score.metric, "mode": settings.score.mode},
            "checkpoints": entries,
            "bases": [base.document for base in bases],
            "remote": tiers and tiers.describe(),
            "ignored": ignored,
            "quarantine": aside,
            "notes": notes,
        }
    )


def _describe_checkpoints(
    statuses: Sequence[CheckpointStatus], settings: RetentionSettings, *, known: bool
) -> list[JsonObject]:
    """Return the facts of each checkpoint as data; those without a believable record have few."""
    records = [status.record for status in statuses if status.record is not None]
    # What the next save would let stay, and why: retention itself is asked.
    kept = select_survivors(settings.keep, records, settings.score) if known else {}
    best = find_best(records, settings.score)
    newest = max((record.step for record in records if not record.mark), default=None)
    entries = []
    for status in statuses:
        record = status.record
        marks = {
            "best": best is not None and status.step == best.step,
            "newest": status.step == newest,
            "pinned": record is not None and record.pinned,
            "error": record is not None and record.mark == "error",
        }
        entries.append(
            {
                "step": status.step,
                "saved_unix_seconds": record and record.saved_unix_seconds,
                "reason": record and record.reason,
                "kept": kept.get(status.step),
                "metrics": dict(record.metrics) if record else {},
                "bytes": record and record.num_bytes,
                "verified": status.proof,
                "problem": status.problem,
                "marks": [mark for mark, holds in marks.items() if holds],
            }
        )
    return entries


def _format_checkpoints(entries: Sequence[JsonObject], metric: str) -> list[str]:
    if not entries:
        return []
    head = ("step", "age", "saved because", "kept because", metric, "size", "verified", "where", "marks")
    rows = [
        (
            str(entry["step"]),
            format_age(time.time() - entry["saved_unix_seconds"]) if entry["saved_unix_seconds"] else "",
            entry["reason"] or "",
            entry["kept"] or "",
            f"{entry['metrics'][metric]:.4g}" if metric in entry["metrics"] else "",
            format_size(entry["bytes"]) if entry["bytes"] is not None else "",
            entry["verified"],
            entry["where"] or "",
            ", ".join(entry["marks"]),
        )
        for entry in entries
    ]
    return format_table(head, rows, right=("step", "age", metric, "size"), flexible=("saved because", "kept because"))


def _summarize_run(run_dir: RunDir, entries: Sequence[JsonObject]) -> str:
    """Return `6 checkpoints, 1.2 MB; finished at step 60 of 60`."""
    status = run_dir.read_status()
    summary = (
        f"{format_count(len(entries), 'checkpoint')}, {format_size(sum(entry['bytes'] or 0 for entry in entries))}"
    )
    if "state" in status:
        early = f" ({status.get('why')})" if status.get("stopped_early") else ""
        summary += f"; {tell_state(run_dir)} at step {status.get('step')} of {status.get('steps') or '?'}{early}"
    return summary


def _check_best_link(run_dir: RunDir, entries: Sequence[JsonObject]) -> list[str]:
    """Return a note where `RUN@best` names another checkpoint than the best, or none."""
    # The runner keeps the link right: only somebody at work by hand can have changed it.
    link = run_dir.checkpoints / "best"
    best = next((str(entry["step"]) for entry in entries if "best" in entry["marks"]), None)
    named: str | None
    if link.is_symlink():
        target = os.readlink(link)
        named = target if is_step_name(target) else f"a link to {shorten(target, 60)}, which is no step beside it,"
    else:
        named = "a directory" if link.exists() else None
    if best == named:
        return []
    return [f"@best is {named or 'nothing'}, but the best is {best or 'none'}; the next save or prune puts it right"]


def _list_quarantine(run_dir: RunDir) -> list[Path]:
    """Return what was set aside, in order of their names; nothing of what a link leads to."""
    if run_dir.quarantine.is_symlink():
        return []
    return [path for path in sorted(run_dir.quarantine.glob("*")) if path.is_dir() and not path.is_symlink()]


def _read_quarantine_reason(directory: Path) -> str:
    try:
        text = read_file(directory / "reason.txt", limit=MAX_REASON_BYTES).decode(errors="replace")
    except OSError:
        return "it does not say why"
    return shorten(" ".join(text.split()), MAX_REASON_CHARS)
