"""`prune`: what retention lets go is deleted now, with the rules in force. Never while a run trains there, and never
where the newest checkpoint is not proven."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from contextlib import nullcontext

from runner.checkpoint.checkpointer import delete_checkpoint, link_best
from runner.checkpoint.record import list_records
from runner.checkpoint.restore import iter_verdicts
from runner.checkpoint.retention import select_survivors
from runner.errors import RefusedError, StorageError
from runner.inspect.lookup import find_run, read_retention_settings
from runner.rundir import layout
from runner.rundir.layout import RunDir
from runner.text import format_count, format_size
from runner.values import Answer, Say


def arguments(parser: ArgumentParser) -> None:
    """A run."""
    parser.add_argument("run", metavar="RUN", help="outputs/NAME/RUN")
    parser.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def run(arguments: Namespace, say: Say) -> Answer:
    """Prune, oldest first. Raises RefusedError where it must not be done, StorageError where it cannot."""
    run = find_run(arguments.run)
    with nullcontext() if arguments.dry_run else layout.lock_run(run):
        return _pruned(run, say, dry=arguments.dry_run)


def _pruned(run: RunDir, say: Say, *, dry: bool) -> Answer:
    _prove_newest(run)
    settings, records = read_retention_settings(run), list_records(run.checkpoints)
    kept = select_survivors(settings.keep, records, settings.score)
    if not dry:
        link_best(run.checkpoints, records, settings.score)  # first: no moment without a link to what there is
    freed, gone = 0, []
    for record in records:
        if record.step in kept:
            say(f"step {record.step:>6}  stays: {kept[record.step]}")
            continue
        if not dry:
            _discard(run, record.step)
        say(f"step {record.step:>6}  {'would be deleted' if dry else 'deleted'}, {format_size(record.num_bytes)}")
        gone.append(record.step)
        freed += record.num_bytes
    done = f"{'would free' if dry else 'freed'} {format_size(freed)}" if gone else "nothing to delete"
    say(f"{format_count(len(kept), 'checkpoint')} {'stays' if len(kept) == 1 else 'stay'}; {done}")
    kept_words = {str(step): why for step, why in kept.items()}
    return Answer({"run": str(run), "dry_run": dry, "deleted": gone, "kept": kept_words, "freed_bytes": freed})


def _prove_newest(run: RunDir) -> None:
    """Raises RefusedError unless the newest checkpoint is good: an older one may be all there is to go on from."""
    newest = next((verdict for verdict in iter_verdicts(run.checkpoints) if verdict.problem or verdict.usable), None)
    if newest is None:
        raise RefusedError(f"{run} has no checkpoint to resume from; nothing was deleted")
    if newest.problem is not None:
        raise RefusedError(
            f"{run}@{newest.step}: the newest checkpoint is not good: {newest.problem}; nothing was deleted; a restart "
            "of the run sets it aside"
        )


def _discard(run: RunDir, step: int) -> None:
    try:
        delete_checkpoint(run.checkpoints / str(step))
    except OSError as error:
        raise StorageError(f"{run}@{step}: could not be deleted ({error.strerror})") from error
