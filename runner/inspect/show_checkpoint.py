"""`show`: tell everything that is known of one checkpoint, and the name, shape and type of every array in it."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict

from runner.checkpoint.arrays import LeafSpec, read_leaf_specs
from runner.checkpoint.frozen_base import BASE
from runner.checkpoint.record import STATE, read_progress
from runner.errors import RefusedError
from runner.inspect.base_sizes import measure_bases
from runner.inspect.lookup import (
    Checkpoint,
    CheckpointStatus,
    find_attempt,
    find_checkpoint,
    read_checkpoint_status,
    refusing_unreadable,
)
from runner.inspect.tiers import Tiers, read_tiers
from runner.profiling.profile_record import list_profiles
from runner.rundir.side_files import STATUS, keep_typed
from runner.text import (
    format_age,
    format_count,
    format_metrics,
    format_size,
    format_table,
    format_time,
    shorten,
    wrap_labelled,
)
from runner.types import JsonObject
from runner.values import Say, VerbResult


def add_arguments(parser: ArgumentParser) -> None:
    """Add the checkpoint."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Say the facts of the checkpoint, then a table of its arrays. Raises RefusedError where it cannot be read."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    # Names and sizes only: `show` is to answer at once, and `verify` is there for the bytes.
    status = read_checkpoint_status(checkpoint.directory, checksums=False)
    if status is None or status.record is None:
        raise RefusedError(f"{checkpoint}: is not good: {status.problem if status else 'it was deleted just now'}")
    try:
        with refusing_unreadable(checkpoint):
            progress, leaves = read_progress(checkpoint.directory), read_leaf_specs(checkpoint.directory / STATE)
            state_bytes = sum(leaf.num_bytes for leaf in leaves.values())
    except (OSError, RefusedError) as error:
        # What is wrong with its files is why it cannot be read.
        raise RefusedError(f"{checkpoint}: is not good: {status.problem}" if status.problem else str(error)) from None
    attempt, tiers = find_attempt(checkpoint), read_tiers(checkpoint.run_dir)
    for line in [*_format_facts(checkpoint, status, progress, attempt, tiers), "", *_format_leaves(leaves)]:
        say(line)
    # The keys of the sidecar, but a size is called `bytes` by every verb.
    record = {**asdict(status.record), "metrics": dict(status.record.metrics)}
    return VerbResult(
        {
            "run": str(checkpoint.run_dir),
            **{("bytes" if key == "num_bytes" else key): value for key, value in record.items()},
            "verified": status.proof,
            "problem": status.problem,
            "bases": [base.document for base in measure_bases(checkpoint.run_dir) if base.digest == progress.get(BASE)],
            "where": tiers and tiers.state_of(checkpoint.step),
            "remote": tiers and tiers.describe(),
            "profiles": [record.document() for record in list_profiles(checkpoint.run_dir.profile)],
            "progress": progress,
            "attempt": attempt,
            "leaves": {name: _describe_leaf(leaf) for name, leaf in leaves.items()},
            "state_bytes": state_bytes,
        }
    )


def _format_facts(
    checkpoint: Checkpoint,
    status: CheckpointStatus,
    progress: JsonObject,
    attempt: JsonObject,
    tiers: Tiers | None,
) -> list[str]:
    """Return a line for each fact that there is, below the name of the checkpoint."""
    record = status.record
    assert record is not None
    best, packages = keep_typed(progress, {"best": STATUS["best"]}).get("best"), attempt.get("packages", {})
    files = format_count(status.num_files, "file")
    made_by = "not recorded"
    if attempt:
        made_by = f"attempt {attempt['attempt']} on {attempt.get('host')}, code {attempt.get('git') or 'unknown'}"
    facts = {
        "saved": f"{format_time(record.saved_unix_seconds)} ({format_age(time.time() - record.saved_unix_seconds)})",
        "because": record.reason,
        "mark": f"{record.mark}: nothing resumes from it unasked" if record.mark else "",
        "pinned": "yes: retention keeps it" if record.pinned else "",
        "measured": format_metrics(record.metrics) or "nothing at this step",
        "cost": f"training waited {record.stall_seconds:.3g} s, durable after {record.write_seconds:.3g} s",
        "on disk": f"{format_size(record.num_bytes)} in {files}, format {record.format}; {status.proof}",
        "frozen": _describe_base(checkpoint, progress),
        "where": _describe_place(tiers, checkpoint.step) if tiers else "",
        "not good": status.problem or "",
        "data": f"at {shorten(json.dumps(progress.get('position')), 200)} of {str(progress.get('data'))[:12]}…",
        "profile": "; ".join(record.describe() for record in list_profiles(checkpoint.run_dir.profile)),
        "best so far": f"{best['metric']} {best['value']:.5g} at step {best['step']}" if best else "",
        "made by": made_by,
        "with": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    # Most checkpoints are neither marked nor pinned nor broken, and old ones lack what later versions write down.
    known = {name: fact for name, fact in facts.items() if fact}
    width = max(map(len, known))
    lines = [str(checkpoint)]
    for name, fact in known.items():
        lines += wrap_labelled(f"  {name:<{width}}  ", fact)
    return lines


def _describe_base(checkpoint: Checkpoint, progress: JsonObject) -> str:
    """Return which frozen weights a checkpoint needs, and how large they are; empty where it has everything itself."""
    if (digest := progress.get(BASE)) is None:
        return ""
    found = next((base for base in measure_bases(checkpoint.run_dir) if base.digest == digest), None)
    name = f"weights {str(digest)[:8]}"
    return f"{name}, stored once: {found.describe()}" if found else f"{name} are missing: this checkpoint needs them"


def _describe_place(tiers: Tiers, step: int) -> str:
    state = tiers.state_of(step)
    if state == "remote":
        return f"remote: in {tiers.url} as well"
    return f"{state}: {'on its way to' if state == 'uploading' else 'not in'} {tiers.url}"


def _format_leaves(leaves: Mapping[str, LeafSpec]) -> list[str]:
    """Return a table of the arrays, and their number and size below it."""
    rows = [
        (
            name,
            " × ".join(map(str, leaf.shape)) or "scalar",
            leaf.dtype + (f" key<{leaf.generator}>" if leaf.generator else ""),
            format_size(leaf.num_bytes),
        )
        for name, leaf in leaves.items()
    ]
    total = format_size(sum(leaf.num_bytes for leaf in leaves.values()))
    return [
        *format_table(("array", "shape", "type", "size"), rows, right=("size",)),
        f"{format_count(len(leaves), 'array')}, {total}",
    ]


def _describe_leaf(leaf: LeafSpec) -> JsonObject:
    return {**asdict(leaf), "shape": list(leaf.shape), "bytes": leaf.num_bytes}
