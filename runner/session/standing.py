"""How a run stands: read once from its directory, under the lock, and handed down. No jax."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from models import Distill
from runner import files
from runner.checkpoint.hf_folder import find_hf_path
from runner.checkpoint.quarantine import list_set_aside
from runner.checkpoint.record import list_steps, locate_checkpoint
from runner.config.code_origins import describe_origins, find_origins
from runner.config.early_stop import explain_early_stop, read_history
from runner.config.identity import UNHASHED_KEYS, Drift, find_drift, hash_config
from runner.config.schema import Config, read_document
from runner.errors import ConfigError, RefusedError
from runner.remote.contact import contact_store, find_remote_name, holds_run
from runner.remote.local_note import read_note
from runner.remote.options import is_remote_url
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.decisions import read_decisions
from runner.rundir.layout import RunDir, find_run_dir, slug_from_overrides
from runner.rundir.side_files import is_count
from runner.session.moved_run import find_moved_run
from runner.text import display_path, quote_words
from runner.types import JsonObject

if TYPE_CHECKING:
    from runner.checkpoint.hf_weights import HfWeights


@dataclass(frozen=True)
class Standing:
    """Hold what a run's directory says about it.

    Attributes:
        exists: it was begun before.
        drifts: what differs from the configuration it was begun with.
        status: status.json as it was found; empty where there is none.
        is_finished: nothing is left to do.
    """

    exists: bool
    drifts: tuple[Drift, ...]
    status: JsonObject
    is_finished: bool


def find_run(config: Config, overrides: Sequence[str], checked: RunDir | None = None) -> RunDir:
    """Return the directory of this configuration's run, which may not be there yet.

    A run whose data lies elsewhere by now is that run: its data is read, and compared with what the run recorded.
    `checked`: where it is, if whoever started this process has found it already.

    Raises:
        RefusedError: `resume` does not allow what is, or is not, there.
        ConfigError: the data has to be compared and cannot be read; the bucket takes the command for wrong.
        StorageError: the bucket cannot be reached.
    """
    store = None if config.remote.url is None else contact_store(config.remote)
    if checked is not None:
        run_dir = checked
    elif config.dir is not None:
        run_dir = RunDir(Path(os.path.realpath(config.dir)))
    else:
        parent, digest = Path(os.path.realpath(Path(config.root) / config.name)), hash_config(config.document)
        run_dir = find_run_dir(parent, slug_from_overrides(overrides, UNHASHED_KEYS), digest)
        name = None
        if not os.path.lexists(run_dir.path):
            name = None if store is None else find_remote_name(store, config.name, digest)
            run_dir = (RunDir(parent / name) if name else find_moved_run(parent, config)) or run_dir
        # A run that was moved to another disk, with a link in its place, is that run.
        run_dir = RunDir(run_dir.path.resolve())
    if config.resume == "auto":
        return run_dir
    exists = run_dir.config.exists() or (store is not None and holds_run(store, name_in_store(config, run_dir)))
    if config.resume == "must" and not exists:
        raise RefusedError(f"resume=must: nothing is at {run_dir}; check the command, or leave resume out to start it")
    if config.resume == "never" and exists and not config.overwrite:
        raise RefusedError(
            f"resume=never: {run_dir} exists; leave resume out to go on with it, or add overwrite=true to set it aside"
        )
    return run_dir


def name_in_store(config: Config, run_dir: RunDir) -> str:
    """Return the name that a run has in a bucket: the last two of its directory's, NAME/RUN."""
    return f"{config.name if config.dir is None else run_dir.path.parent.name}/{run_dir.path.name}"


def inspect_run(run_dir: RunDir, config: Config, elsewhere: Collection[int] = ()) -> Standing:
    """Read how a run stands. Changes nothing. `elsewhere`: the checkpoints that it has in a bucket.

    Raises:
        RefusedError: it is the run of another configuration, a checkpoint that the command names is not there, or it
            had checkpoints and has none.
        OSError: what it says about itself cannot be read now.
    """
    if not run_dir.config.exists() or config.overwrite:
        with hold_initial_weights(config, whole=False):
            # It is there.
            pass
        if isinstance(config.objective, Distill):
            _check_teacher_there(config.objective)
        return Standing(exists=False, drifts=(), status={}, is_finished=False)
    status = run_dir.read_status()
    # A run that was taken back already goes on from there: the checkpoint that was named may be gone since.
    if config.step is not None and config.step != status.get("taken_back_to") and config.step not in elsewhere:
        locate_checkpoint(f"{run_dir}@{config.step}")
    drifts = tuple(find_drift(read_document(run_dir.config), config.document))
    if others := [str(change) for change in drifts if change.kind == "identity"]:
        raise RefusedError(
            f"{run_dir} is another run: {', '.join(others)}; change these back, or start a new run by leaving dir out"
        )
    # Before jax starts, where it can be told by names alone; what turns out when bytes are read is refused later.
    if not elsewhere and not list_steps(run_dir.checkpoints) and _was_durable(run_dir, status):
        refuse_to_start_over(run_dir)
    return Standing(exists=True, drifts=drifts, status=status, is_finished=is_finished(config, run_dir, status))


@contextmanager
def hold_initial_weights(config: Config, *, whole: bool) -> Iterator[Path | HfWeights | None]:
    """Have the directory of the checkpoint that `init_from` names while the context lasts; None where it names none.

    Of a folder of Hugging Face, what reads its weights. Of a checkpoint in a bucket its name and its seal are here, and
    with `whole` every byte. Raises RefusedError where it is not there, ConfigError where the bucket takes the command
    for wrong or the folder is none that can be read, StorageError where the bucket cannot be reached.
    """
    reference, remote = config.init_from.run, config.remote
    if reference is None:
        yield None
        return
    if (folder := find_hf_path(reference)) is not None:
        # Imported here: it needs numpy, for which others do not wait.
        from runner.checkpoint.hf_weights import open_hf_weights

        yield open_hf_weights(folder)
        return
    if not is_remote_url(reference):
        yield locate_checkpoint(reference)
        return
    # Imported here: who names no bucket does not wait for its client.
    from runner.remote.reading import hold_checkpoint

    # What the command says of the run's own place, where the other is in a store of the same kind.
    is_same_store = remote.url is not None and remote.url.partition("://")[0] == reference.partition("://")[0]
    with hold_checkpoint(reference, remote.endpoint if is_same_store else None, whole=whole) as directory:
        yield directory


def _check_teacher_there(objective: Distill) -> None:
    """Raise RefusedError where a teacher is not there, ConfigError where it is a folder that cannot be read."""
    if (folder := find_hf_path(objective.teacher)) is not None:
        # Imported here: it needs numpy, for which others do not wait.
        from runner.checkpoint.hf_weights import open_hf_weights

        if not folder.is_dir():
            raise RefusedError(f"objective.teacher: hf:{display_path(folder)} is not there; bring that folder back")
        try:
            open_hf_weights(folder)
        except ConfigError as error:
            raise ConfigError(f"objective.teacher: {error}") from None
        return
    try:
        locate_checkpoint(objective.teacher)
    except RefusedError as error:
        raise RefusedError(f"objective.teacher: {error}") from None


def refuse_to_start_over(run_dir: RunDir) -> NoReturn:
    """Raise RefusedError: there is nothing to go on from, but there was once; a run does not start over by itself."""
    aside = list_set_aside(run_dir.quarantine)
    back = ""
    if aside:
        back = f"python -m runner restore {quote_words([f'{run_dir}@{aside[0].step}'])} takes one back from quarantine"
    back = back or f"bring {display_path(run_dir.checkpoints)} back"
    raise RefusedError(
        f"{run_dir} had checkpoints, and none is left to go on from; {back}, or start afresh with resume=never "
        "overwrite=true"
    )


def _was_durable(run_dir: RunDir, status: JsonObject) -> bool:
    """Tell whether something of this run was ever durable."""
    if list_set_aside(run_dir.quarantine):
        return True
    return read_decisions(run_dir, status, read_attempts(run_dir)).decisions.was_durable


def is_finished(config: Config, run_dir: RunDir, status: JsonObject) -> bool:
    """Return whether nothing is left to do: training has ended, and the last step is durable where that is wanted.

    Of a run that lives in a bucket it may be there alone, as its process has noted.
    """
    if config.overwrite or status.get("state") != "finished" or not _has_ended(config, run_dir, status):
        return False
    if config.step is not None and config.step != status.get("taken_back_to"):
        return False
    step = status.get("step", 0)
    if not config.ckpt.last or (run_dir.checkpoints / str(step)).is_dir():
        return True
    note = None if config.remote.url is None else read_note(run_dir)
    return note is not None and step in note.steps


def _has_ended(config: Config, run_dir: RunDir, status: JsonObject) -> bool:
    """Return whether training is at its last step, or ended before that by a rule that still ends it there."""
    step, steps = status.get("step", 0), config.train.steps
    if config.train.epochs is not None:
        # Not what status.json says: it was written for as many epochs as were asked for then.
        examples: Any = (files.read_json_object(run_dir.data) or {}).get("examples")
        steps = config.train.count_steps(examples, config.data.batch_size) if is_count(examples) else None
    if steps is not None and step >= steps:
        return True
    if not status.get("stopped_early"):
        return False
    # Asked anew: the command may allow more patience now.
    metric = config.stop.metric
    if metric and explain_early_stop(config.stop, config.score.mode, read_history(run_dir.metrics, metric)):
        return True
    return bool(config.stop.rules) and _has_same_stop_rules(config, run_dir, status.get("attempt", {}))


def _has_same_stop_rules(config: Config, run_dir: RunDir, attempt: JsonObject) -> bool:
    """Return whether rules of the user's own, of one of which it is known that it ended this run, are as they were.

    They are asked in the process that trains alone. Where they have changed, that is what tells whether they still
    end the run.
    """
    drifts = find_drift(read_document(run_dir.config), config.document)
    now = {str(drift) for drift in drifts if drift.key.startswith("stop.")}
    before = {line for line in attempt.get("drift", ()) if line.startswith("stop.")}
    origins = describe_origins(find_origins(config.document))
    known = attempt.get("external", {})
    same_code = all(known.get(key) == found for key, found in origins.items() if key.startswith("stop.rules."))
    return now == before and same_code
