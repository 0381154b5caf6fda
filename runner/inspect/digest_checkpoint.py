"""`digest`: one SHA-256 of what a checkpoint means: names, shapes, types, values, progress; not how it was written."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from runner.checkpoint.arrays import compute_logical_digest
from runner.checkpoint.record import STATE, read_progress
from runner.inspect.lookup import Checkpoint, find_proven_checkpoint, refusing_unreadable
from runner.values import Say, VerbResult


def add_arguments(parser: ArgumentParser) -> None:
    """Add the checkpoint."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Say the digest of the checkpoint. Raises RefusedError where its bytes are not what was written."""
    checkpoint, _ = find_proven_checkpoint(arguments.checkpoint)
    digest = compute_digest(checkpoint)
    say(f"{digest}  {checkpoint}")
    return VerbResult({"run": str(checkpoint.run_dir), "step": checkpoint.step, "digest": digest})


def compute_digest(checkpoint: Checkpoint) -> str:
    """Return `sha256:…`, which is equal for two checkpoints exactly where they mean the same, bit for bit."""
    with refusing_unreadable(checkpoint):
        return f"sha256:{compute_logical_digest(checkpoint.directory / STATE, read_progress(checkpoint.directory))}"
