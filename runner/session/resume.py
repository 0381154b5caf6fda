"""What an attempt goes on from: a checkpoint that is proven, or a fresh state."""

from __future__ import annotations

from functools import partial

from runner.checkpoint.quarantine import list_set_aside, set_newer_aside
from runner.checkpoint.record import Record, locate_checkpoint, read_saved_position
from runner.checkpoint.restore import restore_exactly, restore_newest
from runner.errors import RefusedError
from runner.session.standing import refuse_to_start_over
from runner.text import display_path
from runner.train import dataset
from runner.train.build import read_train_state, start_from_weights
from runner.train.built import Built
from runner.train.loop import Progress
from runner.train.run_context import RunContext
from runner.types import JsonObject, State


def restore_or_begin(context: RunContext, built: Built) -> tuple[Progress, JsonObject | None]:
    """Return where to go on, and the best score so far, with the data at its position; or a beginning at step 0.

    Raises RefusedError where the checkpoint was trained on other data, or where none is good.
    """
    found = _read_chosen(context, built)
    if found is None:
        if context.attempt.was_durable or list_set_aside(context.run_dir.quarantine):
            refuse_to_start_over(context.run_dir)
        built.stream.restore(dict(built.beginning))
        return Progress(_begin(context, built), 0), None
    record, state = found
    saved = read_saved_position(context.run_dir.checkpoints / str(record.step))
    if saved.data not in dataset.list_fingerprints(context.run_dir, built.sources):
        raise RefusedError(dataset.explain_refusal(context.run_dir, built.sources.summary, ""))
    built.stream.restore(saved.position)
    context.console.say(f"restored step {record.step} (saved: {record.reason})")
    return Progress(state, record.step, saved.owes_evaluation), saved.best


def _read_chosen(context: RunContext, built: Built) -> tuple[Record, State] | None:
    """Return the checkpoint that `step=` names, or the newest good one, with its state; None where there is none."""
    config, run_dir, attempt, say = context.config, context.run_dir, context.attempt, context.console.say
    read, checksums = partial(read_train_state, built), config.ckpt.verify != "off"
    if config.step is not None and config.step != attempt.status.taken_back_to:
        found = restore_exactly(locate_checkpoint(f"{run_dir.path}@{config.step}"), read, checksums=checksums)
        set_newer_aside(run_dir.checkpoints, run_dir.quarantine, found[0].step, say)
        attempt.status.set_taken_back_to(config.step)
        return found
    # The same command typed again goes on from where it was taken back to, and not from there once more.
    if config.step is not None:
        say(f"was taken back to step {config.step} already: going on from the newest checkpoint")
    attempt.status.set_taken_back_to(config.step)
    return restore_newest(run_dir.checkpoints, run_dir.quarantine, read, say, checksums=checksums)


def _begin(context: RunContext, built: Built) -> State:
    """Return a fresh state, with the weights of another run where `init_from` asks for them."""
    init_from, say = context.config.init_from, context.console.say
    if init_from.run is None:
        return built.init()
    checkpoint = locate_checkpoint(init_from.run)
    state, report = start_from_weights(built, checkpoint, partial=init_from.partial)
    say(f"weights from {display_path(checkpoint)}: {len(report.taken)} arrays as they are")
    for line in report.lines():
        say(line)
    return state
