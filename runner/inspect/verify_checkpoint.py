"""`verify`: whether every byte of a checkpoint is the one that was written. Reads all of it, and changes nothing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from runner.checkpoint.record import list_steps
from runner.errors import RefusedError
from runner.inspect.lookup import Checkpoint, CheckpointStatus, find_checkpoint, find_run, read_checkpoint_status
from runner.text import format_count, format_size
from runner.values import Answer, Say


def arguments(parser: ArgumentParser) -> None:
    """One checkpoint, or all of a run."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest directory, or the step that is named")
    parser.add_argument("--all", action="store_true", help="every checkpoint of the run")


def run(arguments: Namespace, say: Say) -> Answer:
    """Verify, and say one line for each. Exit code 3 where one is not good."""
    entries = []
    for checkpoint in _named(arguments.checkpoint, whole=arguments.all):
        found = read_checkpoint_status(checkpoint.directory, checksums=True)
        if found is None:
            continue  # deleted meanwhile by the run it belongs to
        say(f"step {found.step:>6}  {_verdict(found)}")
        num_bytes = found.record.num_bytes if found.record else None
        entries.append({"step": found.step, "verified": found.proof, "problem": found.problem, "bytes": num_bytes})
    bad = [entry["step"] for entry in entries if entry["problem"]]
    if len(entries) > 1:
        say(f"{format_count(len(entries), 'checkpoint')}: {f'{len(bad)} not good' if bad else 'all good'}")
    run = str(checkpoint.run)
    return Answer({"run": run, "good": not bad, "checkpoints": entries}, RefusedError.exit_code if bad else 0)


def _named(reference: str, *, whole: bool) -> list[Checkpoint]:
    """What to look at. `RUN` is its newest directory, good or not: that is what a person worries about."""
    place, _, which = reference.rpartition("@") if "@" in reference else (reference, "", "newest")
    if not whole and which != "newest":
        return [find_checkpoint(reference)]
    run = find_run(place)
    steps = list_steps(run.checkpoints)
    if not steps:
        raise RefusedError(f"{run} has no checkpoint")
    return [Checkpoint(run, step) for step in (steps if whole else steps[-1:])]


def _verdict(found: CheckpointStatus) -> str:
    if found.problem:
        return f"not good: {found.problem}"
    assert found.record is not None
    read = "every byte of" if found.proof == "ok" else "only sizes were kept (ckpt.verify=off):"
    return f"{found.proof}, {read} {format_count(found.num_files, 'file')}, {format_size(found.record.num_bytes)}"
