"""A run without training: checkpoints whose bytes follow from their step, logs of one line a step. For its bucket."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner import files
from runner.checkpoint.checkpointer import delete_checkpoint
from runner.checkpoint.record import SIDECAR, Record, Score, list_steps, newest_durable_step, read_sidecar
from runner.checkpoint.retention import KeepBest, KeepLast
from runner.checkpoint.seal import find_problem, seal_checkpoint
from runner.remote.bucket import Bucket, hold_in_bucket
from runner.remote.objects import Objects
from runner.remote.options import Remote
from runner.remote.other_place import Choices
from runner.rundir.layout import RunDir
from tests.buckets import URL

KEY = "mlp/run-00000000"
KEEP = {"last": KeepLast(n=2), "best": KeepBest(n=1)}
STEPS, EVERY = 50, 10


def choose(**options: object) -> Choices:
    """Return what a configuration says of a bucket."""
    fast = {"renew_seconds": 0.05, "lost_seconds": 0.2, "patience_seconds": 20.0}
    return Choices(Remote(url=URL, **{**fast, **options}), KEEP, Score())


def write_checkpoint(run_dir: RunDir, step: int) -> None:
    """Make a checkpoint, as the runner leaves it."""
    directory = run_dir.checkpoints / str(step)
    if directory.exists():
        return
    fresh = run_dir.checkpoints / ".writing" / str(step)
    for name, content in contents_of(step).items():
        files.make_folder((fresh / name).parent)
        (fresh / name).write_bytes(content)
    # As Orbax names its data files: another name each time that a step is saved.
    (fresh / "state/d" / secrets.token_hex(8)).write_bytes(b"%d" % step)
    # The best is step 20.
    metrics = {"eval/loss": abs(step - 20) / 10}
    seal_checkpoint(fresh, Record(step, "test", metrics, 0.0))
    fresh.rename(directory)


def contents_of(step: int) -> dict[str, bytes]:
    """Return the files of a checkpoint."""
    return {
        "state/d/data": (f"{step} " * 2000).encode(),
        "state/manifest.ocdbt": b"manifest %d" % step,
        "state/empty": b"",
        "progress/metadata": json.dumps({"step": step}).encode(),
    }


def work(
    disk: Path, until: int = STEPS, choices: Choices | None = None, between: Callable[[Bucket, int], None] | None = None
) -> RunDir:
    """Work on the run from where it stands to a step, as an attempt does, and send everything."""
    run_dir = RunDir(disk / KEY)
    files.make_folder(run_dir.logs)
    with hold_in_bucket(choices or choose(), KEY, run_dir, lambda: None) as bucket:
        bucket.bring_newer(newest_durable_step(run_dir.checkpoints))
        bucket.bring_best([Score()])
        step = newest_durable_step(run_dir.checkpoints)
        if not run_dir.config.exists():
            files.replace_file(run_dir.config, "seed: 0\n")
        _cut_log(run_dir, step)
        files.make_folder(run_dir.checkpoints)
        bucket.begin()
        while step < until:
            step += 1
            with open(run_dir.metrics, "a") as log:
                log.write(f"line of step {step}\n")
            if step % EVERY == 0:
                write_checkpoint(run_dir, step)
                files.replace_file(run_dir.status, json.dumps({"state": "running", "step": step}))
                bucket.note_saved()
                _prune(run_dir, bucket)
            if between is not None:
                between(bucket, step)
        files.replace_file(run_dir.status, json.dumps({"state": "finished", "step": step}))
        bucket.finish(None)
    return run_dir


def _cut_log(run_dir: RunDir, step: int) -> None:
    lines = run_dir.metrics.read_text().splitlines(keepends=True) if run_dir.metrics.exists() else []
    assert len(lines) >= step, "a restored step is never missing from its log"
    run_dir.metrics.write_text("".join(lines[:step]))


def _prune(run_dir: RunDir, bucket: Bucket) -> None:
    for step in list_steps(run_dir.checkpoints)[:-2]:
        if step != 20 and step not in bucket.list_held_steps():
            with suppress(FileNotFoundError):
                delete_checkpoint(run_dir.checkpoints / str(step))


def objects_of(bucket: Bucket) -> Any:
    """Return the store that a bucket is in."""
    return bucket._objects._store


def find_lie(disk: Path) -> str | None:
    """Return what in a bucket is taken for whole and is not; None where nothing is. `disk` is empty."""
    run_dir = RunDir(disk / KEY)
    files.make_folder(run_dir.path)
    with hold_in_bucket(choose(), KEY, run_dir, lambda: None) as bucket:
        files.make_folder(run_dir.checkpoints)
        for step in bucket.list_steps():
            if not bucket.bring(step):
                return f"step {step} had a seal and was not whole"
            directory = run_dir.checkpoints / str(step)
            there = set(Objects(objects_of(bucket), "").list_sizes(f"{KEY}/checkpoints/{step}/"))
            mine = {f"{KEY}/checkpoints/{step}/{name}" for name in [*read_sidecar(directory).files, SIDECAR]}
            if stray := {name for name in there - mine if not name.endswith("/stray")}:
                return f"step {step}: {stray} is left over"
            if problem := find_problem(directory):
                return f"step {step}: {problem}"
            for name, content in contents_of(step).items():
                if (directory / name).read_bytes() != content:
                    return f"step {step}: {name} is another"
            lines = run_dir.metrics.read_text().splitlines()
            if lines[:step] != [f"line of step {number}" for number in range(1, step + 1)]:
                return f"step {step} was sealed before its log was there"
    return None
