"""`verify`: compare every byte of a checkpoint, and of the log up to it, with what was written. Changes nothing."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from runner.checkpoint.frozen_base import find_base_problem, find_digest, locate_base
from runner.checkpoint.record import list_records, list_steps, read_sidecar
from runner.errors import RefusedError
from runner.inspect.lookup import Checkpoint, CheckpointStatus, find_checkpoint, find_run, read_checkpoint_status
from runner.log.jsonl import find_log_damage
from runner.rundir.layout import RunDir
from runner.text import format_count, format_size
from runner.types import JsonObject
from runner.values import Say, VerbResult


def add_arguments(parser: ArgumentParser) -> None:
    """Add the checkpoint, or that all of a run are meant."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest directory, or the step that is named")
    parser.add_argument("--all", action="store_true", help="every checkpoint of the run")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Verify, and say one line for each checkpoint. The exit code is 3 where one is not good, or the log is not."""
    checkpoints = _select_checkpoints(arguments.checkpoint, whole=arguments.all)
    entries = []
    for checkpoint in checkpoints:
        status = read_checkpoint_status(checkpoint.directory, checksums=True)
        # The run it belongs to may be training, and deletes what its retention lets go.
        if status is None:
            continue
        say(f"step {status.step:>6}  {_format_verdict(status)}")
        num_bytes = status.record.num_bytes if status.record else None
        entries.append({"step": status.step, "verified": status.proof, "problem": status.problem, "bytes": num_bytes})
    bad = [entry["step"] for entry in entries if entry["problem"]]
    bases = [_verify_base(base, say) for base in _list_bases(checkpoints)]
    if len(entries) > 1:
        say(f"{format_count(len(entries), 'checkpoint')}: {f'{len(bad)} not good' if bad else 'all good'}")
    run_dir = checkpoints[0].run_dir
    damage = _find_damage(run_dir, checkpoints[-1].step)
    if damage:
        say(f"log: {damage}; the checkpoints stand without it")
    good = not bad and damage is None and not any(base["problem"] for base in bases)
    document = {"run": str(run_dir), "good": good, "checkpoints": entries, "bases": bases, "log_problem": damage}
    return VerbResult(document, 0 if good else RefusedError.exit_code)


def _list_bases(checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """Return where the frozen weights lie that checkpoints need, each once."""
    found: dict[Path, None] = {}
    for checkpoint in checkpoints:
        # What is wrong with the checkpoint itself is told in its own line.
        with suppress(OSError, RefusedError):
            if digest := find_digest(checkpoint.directory):
                found[locate_base(checkpoint.directory, digest)] = None
    return list(found)


def _verify_base(base: Path, say: Say) -> JsonObject:
    """Say one line for frozen weights, and return what was found."""
    try:
        problem = find_base_problem(base)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    num_bytes = None
    if problem is None:
        sealed = read_sidecar(base, 0)
        num_bytes = sealed.record.num_bytes
        read = f"ok, every byte of {format_count(len(sealed.files), 'file')}, {format_size(num_bytes)}"
    say(f"frozen {base.name[:8]}  {f'not good: {problem}' if problem else read}")
    return {"digest": base.name, "problem": problem, "bytes": num_bytes}


def _find_damage(run_dir: RunDir, step: int) -> str | None:
    """Return where metrics.jsonl is not what it was when steps up to this one were saved; None where it is."""
    damage = None
    # Twice: the run may be training, and have cut its log back between the look at its checkpoints and the log.
    for _ in range(2):
        known = [(each.step, each.log) for each in list_records(run_dir.checkpoints) if each.log and each.step <= step]
        damage = find_log_damage(run_dir.metrics, known)
        if damage is None:
            break
    return damage


def _select_checkpoints(reference: str, *, whole: bool) -> list[Checkpoint]:
    """Return what is to be read: all of a run, the step that is named, or the newest directory of a run."""
    path, _, which = reference.rpartition("@") if "@" in reference else (reference, "", "newest")
    if not whole and which != "newest":
        return [find_checkpoint(reference)]
    run_dir = find_run(path)
    steps = list_steps(run_dir.checkpoints)
    if not steps:
        raise RefusedError(f"{run_dir} has no checkpoint")
    # The newest, good or not, and not the newest good one as elsewhere: it is the one that a person worries about.
    return [Checkpoint(run_dir, step) for step in (steps if whole else steps[-1:])]


def _format_verdict(status: CheckpointStatus) -> str:
    if status.problem:
        return f"not good: {status.problem}"
    assert status.record is not None
    read = "every byte of" if status.proof == "ok" else "only sizes were kept (ckpt.verify=off):"
    return f"{status.proof}, {read} {format_count(status.num_files, 'file')}, {format_size(status.record.num_bytes)}"
