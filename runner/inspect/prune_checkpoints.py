"""`prune`: delete now what the retention rules in force let go.

Refused while a run trains there, and where the newest checkpoint is not good.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext

from runner.checkpoint.checkpointer import delete_checkpoint, link_best
from runner.checkpoint.record import list_records
from runner.checkpoint.restore import iter_verdicts
from runner.checkpoint.retention import select_survivors
from runner.errors import RefusedError, StorageError
from runner.inspect.lookup import find_run, read_retention_settings, refuse_bucket
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
from runner.text import format_count, format_size
from runner.values import Say, VerbResult


def add_arguments(parser: ArgumentParser) -> None:
    """Add the run, and whether to delete at all."""
    parser.add_argument("run", metavar="RUN", help="outputs/NAME/RUN")
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Prune, oldest first. Raises RefusedError where it must not be done, StorageError where it cannot."""
    refuse_bucket("prune", arguments.run)
    run_dir = find_run(arguments.run)
    # A dry run only reads, so it may look at a run that is training.
    with nullcontext() if arguments.dry_run else lock_run(run_dir):
        return _prune_run(run_dir, say, is_dry=arguments.dry_run)


def _prune_run(run_dir: RunDir, say: Say, *, is_dry: bool) -> VerbResult:
    _refuse_unproven_newest(run_dir)
    settings, records = read_retention_settings(run_dir), list_records(run_dir.checkpoints)
    kept = select_survivors(settings.keep, records, settings.score)
    # Before anything is deleted: there is no moment at which `best` leads nowhere.
    if not is_dry:
        link_best(run_dir.checkpoints, records, settings.score)
    num_freed, deleted = 0, []
    for record in records:
        if record.step in kept:
            say(f"step {record.step:>6}  stays: {kept[record.step]}")
            continue
        if not is_dry:
            _delete_step(run_dir, record.step)
        say(f"step {record.step:>6}  {'would be deleted' if is_dry else 'deleted'}, {format_size(record.num_bytes)}")
        deleted.append(record.step)
        num_freed += record.num_bytes
    outcome = f"{'would free' if is_dry else 'freed'} {format_size(num_freed)}" if deleted else "nothing to delete"
    say(f"{format_count(len(kept), 'checkpoint')} {'stays' if len(kept) == 1 else 'stay'}; {outcome}")
    return VerbResult(
        {
            "run": str(run_dir),
            "dry_run": is_dry,
            "deleted": deleted,
            "kept": {str(step): why for step, why in kept.items()},
            "freed_bytes": num_freed,
        }
    )


def _refuse_unproven_newest(run_dir: RunDir) -> None:
    """Raise RefusedError unless the newest checkpoint is good, byte for byte."""
    # Where it is not, a restart goes on from an older one, which may be just the one that retention would let go.
    verdicts = iter_verdicts(run_dir.checkpoints)
    newest = next((verdict for verdict in verdicts if verdict.problem or verdict.usable), None)
    if newest is None:
        raise RefusedError(f"{run_dir} has no checkpoint to resume from; nothing was deleted")
    if newest.problem is not None:
        raise RefusedError(
            f"{run_dir}@{newest.step}: the newest checkpoint is not good: {newest.problem}; nothing was deleted; "
            "a restart of the run sets it aside"
        )


def _delete_step(run_dir: RunDir, step: int) -> None:
    try:
        delete_checkpoint(run_dir.checkpoints / str(step))
    except OSError as error:
        raise StorageError(f"{run_dir}@{step}: could not be deleted ({error.strerror})") from error
