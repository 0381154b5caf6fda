"""`show`: everything that is known of one checkpoint, and the name, shape and type of every array in it."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from runner.checkpoint.arrays import LeafSpec, read_leaf_specs
from runner.checkpoint.record import STATE, read_progress
from runner.errors import RefusedError
from runner.inspect.lookup import (
    Checkpoint,
    CheckpointStatus,
    find_attempt,
    find_checkpoint,
    read_checkpoint_status,
)
from runner.text import format_age, format_count, format_metrics, format_size, format_table, format_time, wrap_labelled
from runner.values import Answer, Say


def arguments(parser: ArgumentParser) -> None:
    """One checkpoint."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named")


def run(arguments: Namespace, say: Say) -> Answer:
    """Show it. Raises RefusedError where there is nothing to be read."""
    checkpoint = find_checkpoint(arguments.checkpoint)
    found = read_checkpoint_status(checkpoint.directory, checksums=False)
    if found is None or found.record is None:
        raise RefusedError(f"{checkpoint}: is not good: {found.problem if found else 'it was deleted just now'}")
    try:
        progress, tree = read_progress(checkpoint.directory), read_leaf_specs(checkpoint.directory / STATE)
    except (OSError, ValueError) as error:
        problem = found.problem or str(error).splitlines()[0]
        raise RefusedError(f"{checkpoint}: cannot be read: {problem}") from None
    attempt = find_attempt(checkpoint)
    for line in [*_facts(checkpoint, found, progress, attempt), "", *_tree(tree)]:
        say(line)
    record = {**asdict(found.record), "metrics": dict(found.record.metrics)}
    return Answer(
        {
            "run": str(checkpoint.run),
            **{("bytes" if key == "num_bytes" else key): value for key, value in record.items()},
            "verified": found.proof,
            "problem": found.problem,
            "progress": progress,
            "attempt": attempt,
            "leaves": {name: _plain(leaf) for name, leaf in tree.items()},
            "state_bytes": sum(leaf.num_bytes for leaf in tree.values()),
        }
    )


def _facts(
    checkpoint: Checkpoint, found: CheckpointStatus, progress: Mapping[str, Any], attempt: Mapping[str, Any]
) -> list[str]:
    record = found.record
    assert record is not None
    best, packages = progress.get("best"), attempt.get("packages", {})
    files = format_count(found.num_files, "file")
    facts = {
        "saved": f"{format_time(record.saved_unix_seconds)} ({format_age(time.time() - record.saved_unix_seconds)})",
        "because": record.reason,
        "mark": f"{record.mark}: nothing resumes from it unasked" if record.mark else "",
        "pinned": "yes: retention keeps it" if record.pinned else "",
        "measured": format_metrics(record.metrics) or "nothing at this step",
        "cost": f"training waited {record.stall_seconds:.3g} s, durable after {record.write_seconds:.3g} s",
        "on disk": f"{format_size(record.num_bytes)} in {files}, format {record.format}; {found.proof}",
        "not good": found.problem or "",
        "data": f"at {json.dumps(progress.get('position'))} of {str(progress.get('data'))[:12]}…",
        "best so far": f"{best['metric']} {best['value']:.5g} at step {best['step']}" if best else "",
        "made by": f"attempt {attempt['attempt']} on {attempt.get('host')}, code {attempt.get('git') or 'unknown'}"
        if attempt
        else "not recorded",
        "with": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    told = {name: fact for name, fact in facts.items() if fact}
    width = max(map(len, told))
    return [
        str(checkpoint),
        *(line for name, fact in told.items() for line in wrap_labelled(f"  {name:<{width}}  ", fact)),
    ]


def _tree(tree: Mapping[str, LeafSpec]) -> list[str]:
    rows = [
        (
            name,
            " × ".join(map(str, leaf.shape)) or "scalar",
            leaf.dtype + (f" key<{leaf.generator}>" if leaf.generator else ""),
            format_size(leaf.num_bytes),
        )
        for name, leaf in tree.items()
    ]
    total = format_size(sum(leaf.num_bytes for leaf in tree.values()))
    return [
        *format_table(("array", "shape", "type", "size"), rows, right=("size",)),
        f"{format_count(len(tree), 'array')}, {total}",
    ]


def _plain(leaf: LeafSpec) -> dict[str, Any]:
    return {**asdict(leaf), "shape": list(leaf.shape), "bytes": leaf.num_bytes}
