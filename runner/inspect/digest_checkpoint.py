"""`digest`: one SHA-256 of what a checkpoint means: names, shapes, types, values, progress; not how it was written."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from runner.checkpoint.arrays import compute_logical_digest
from runner.checkpoint.record import STATE, read_progress
from runner.inspect.lookup import Checkpoint, find_proven_checkpoint
from runner.values import Answer, Say


def arguments(parser: ArgumentParser) -> None:
    """One checkpoint."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named")


def run(arguments: Namespace, say: Say) -> Answer:
    """Print it. Raises RefusedError where the bytes are not what was written."""
    checkpoint, _ = find_proven_checkpoint(arguments.checkpoint)
    digest = compute_digest(checkpoint)
    say(f"{digest}  {checkpoint}")
    return Answer({"run": str(checkpoint.run), "step": checkpoint.step, "digest": digest})


def compute_digest(checkpoint: Checkpoint) -> str:
    """`sha256:…`: equal for two checkpoints that mean the same, bit for bit."""
    return f"sha256:{compute_logical_digest(checkpoint.directory / STATE, read_progress(checkpoint.directory))}"
