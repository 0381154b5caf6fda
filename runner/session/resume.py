"""What an attempt goes on from: a checkpoint that is proven, or a fresh state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from runner import hosts
from runner.checkpoint.checkpointer import link_best
from runner.checkpoint.frozen_base import LostBaseError, find_digest
from runner.checkpoint.proving_reader import ProvingReader
from runner.checkpoint.quarantine import list_set_aside, set_newer_aside
from runner.checkpoint.record import (
    Record,
    list_records,
    locate_checkpoint,
    newest_durable_step,
    read_saved_position,
)
from runner.checkpoint.restore import restore_exactly, restore_newest
from runner.checkpoint.shared_restore import CHANNEL, SharedReader, follow_reading
from runner.errors import RefusedError
from runner.session.base_files import describe_pixels, record_or_compare_base
from runner.session.frozen_weights import mend_frozen, store_frozen
from runner.session.standing import hold_initial_weights, refuse_to_start_over
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
    if not hosts.is_lead():
        return _restore_or_begin_as_told(context, built)
    found = _read_chosen(context, built)
    if found is None:
        if context.attempt.was_durable or list_set_aside(context.run_dir.quarantine):
            refuse_to_start_over(context.run_dir)
        hosts.agree(CHANNEL, {"step": 0})
        return _begin_at_zero(context, built), None
    record, state = found
    directory = context.run_dir.checkpoints / str(record.step)
    saved = read_saved_position(directory)
    if saved.data not in dataset.list_fingerprints(context.run_dir, built.sources):
        raise RefusedError(dataset.explain_refusal(context.run_dir, built.sources.summary, ""))
    hosts.agree(CHANNEL, {"step": record.step, "owes": saved.owes_evaluation, "position": saved.position})
    built.stream.restore(saved.position)
    context.console.say(f"restored step {record.step} (saved: {record.reason})")
    return Progress(state, record.step, saved.owes_evaluation, find_digest(directory) or ""), saved.best


def _restore_or_begin_as_told(context: RunContext, built: Built) -> tuple[Progress, JsonObject | None]:
    """Return where to go on, as process 0 has decided, with this process's part of the state."""
    read = partial(read_train_state, built)
    word, state = follow_reading(read)
    while "make" in word:
        # What does not train is lost, and made again from where the run began, each process its part.
        store_frozen(context, _begin(context, built))
        word, state = follow_reading(read)
    if not word["step"]:
        return _begin_at_zero(context, built), None
    assert state is not None, "what is gone on from was read"
    built.stream.restore(word["position"])
    return Progress(state, word["step"], word["owes"]), None


def read_exactly(built: Built, checkpoint: Path) -> State:
    """Return the state of this checkpoint, each process its part. Raises as `restore_exactly` does."""
    if not hosts.is_lead():
        _, state = follow_reading(partial(read_train_state, built))
        assert state is not None, "process 0 has read it"
        return state
    _, state = _lead_exactly(built, checkpoint, checksums=True)
    hosts.agree(CHANNEL, {})
    return state


def _lead_exactly(built: Built, checkpoint: Path, *, checksums: bool) -> tuple[Record, State]:
    reader = _choose_reader(built, checksums=checksums)
    return restore_exactly(checkpoint, reader.read, checksums=checksums, measure=reader.measure)


def _choose_reader(built: Built, *, checksums: bool) -> ProvingReader[State] | SharedReader[State]:
    read = partial(read_train_state, built)
    return (ProvingReader if hosts.is_alone() else SharedReader)(read, checksums=checksums)


def _read_chosen(context: RunContext, built: Built) -> tuple[Record, State] | None:
    """Return the checkpoint that `step=` names, or the newest good one, with its state; None where there is none."""
    config, run_dir, attempt, say = context.config, context.run_dir, context.attempt, context.console.say
    checksums, other_place = config.ckpt.verify != "off", context.other_place
    if config.step is not None and config.step != attempt.status.taken_back_to:
        if config.step == "best":
            other_place.bring_best([config.score])
            link_best(run_dir.checkpoints, list_records(run_dir.checkpoints), config.score)
        else:
            other_place.bring(config.step)
        mend_frozen(context, built, partial(_begin, context, built))
        found = _lead_exactly(built, locate_checkpoint(f"{run_dir.path}@{config.step}"), checksums=checksums)
        set_newer_aside(run_dir.checkpoints, run_dir.quarantine, found[0].step, say)
        other_place.set_newer_aside(found[0].step)
        attempt.status.set_taken_back_to(config.step)
        return found
    # The same command typed again goes on from where it was taken back to, and not from there once more.
    if config.step is not None:
        say(f"was taken back to step {config.step} already: going on from the newest checkpoint")
    attempt.status.set_taken_back_to(config.step)
    reader = _choose_reader(built, checksums=checksums)
    restore = partial(
        restore_newest,
        run_dir.checkpoints,
        run_dir.quarantine,
        reader.read,
        say,
        checksums=checksums,
        measure=reader.measure,
    )
    other_place.bring_newer(newest_durable_step(run_dir.checkpoints))
    mend_frozen(context, built, partial(_begin, context, built))
    return _restore_from_either(context, restore)


def _restore_from_either(
    context: RunContext, restore: Callable[[], tuple[Record, State] | None]
) -> tuple[Record, State] | None:
    """Return what `restore` finds on this disk; where a newer checkpoint is in the bucket, that one instead.

    It is where what was here turned out to be damaged: then it is brought, and `restore` asked again.
    """
    while True:
        try:
            found = restore()
        # The checkpoint is good: another one would need the same frozen weights.
        except LostBaseError:
            raise
        except RefusedError:
            if not context.other_place.bring_newer(0):
                raise
            continue
        if not context.other_place.bring_newer(0 if found is None else found[0].step):
            return found


def _begin_at_zero(context: RunContext, built: Built) -> Progress:
    built.stream.restore(dict(built.beginning))
    state = _begin(context, built)
    return Progress(state, 0, base=store_frozen(context, state))


def _begin(context: RunContext, built: Built) -> State:
    """Return a fresh state, with the weights of another run where `init_from` asks for them."""
    say = context.console.say
    with hold_initial_weights(context.config, whole=True) as source:
        if source is None:
            return built.init()
        if not isinstance(source, Path):
            record_or_compare_base(context.run_dir, source.folder)
            if line := describe_pixels(context.config, source.folder):
                say(line)
        state, report = start_from_weights(built, source, partial=context.config.init_from.partial)
    name = display_path(source) if isinstance(source, Path) else source.name
    say(f"weights from {name}: {len(report.taken)} arrays as they are")
    for line in report.lines():
        say(line)
    return state
