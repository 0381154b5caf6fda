"""How a run stands: read once from its directory, under the lock, and handed down. No jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint.record import locate_checkpoint
from runner.config.identity import UNHASHED_KEYS, Drift, find_drift, hash_config
from runner.config.schema import Config, read_document
from runner.errors import RefusedError
from runner.rundir.layout import RunDir, find_run_dir, slug_from_overrides
from runner.types import JsonObject


@dataclass(frozen=True)
class Standing:
    """What a run's directory says about it.

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


def find_run(config: Config, overrides: Sequence[str]) -> RunDir:
    """Return the directory of this configuration's run, which may not be there yet.

    Raises RefusedError where `resume` does not allow what is, or is not, there.
    """
    if config.dir is not None:
        run_dir = RunDir(Path(config.dir).resolve())
    else:
        parent = (Path(config.root) / config.name).resolve()
        run_dir = find_run_dir(parent, slug_from_overrides(overrides, UNHASHED_KEYS), hash_config(config.document))
    if config.resume == "must" and not run_dir.config.exists():
        raise RefusedError(f"resume=must: nothing is at {run_dir}; check the command, or leave resume out to start it")
    if config.resume == "never" and run_dir.config.exists() and not config.overwrite:
        raise RefusedError(
            f"resume=never: {run_dir} exists; leave resume out to go on with it, or add overwrite=true to set it aside"
        )
    return run_dir


def inspect_run(run_dir: RunDir, config: Config) -> Standing:
    """Read how a run stands. Changes nothing.

    Raises RefusedError where it is the run of another configuration, or where a checkpoint that the command names is
    not there.
    """
    if not run_dir.config.exists() or config.overwrite:
        if config.init_from.run is not None:
            locate_checkpoint(config.init_from.run)
        return Standing(exists=False, drifts=(), status={}, is_finished=False)
    status = run_dir.read_status()
    # A run that was taken back already goes on from there: the checkpoint that was named may be gone since.
    if config.step is not None and config.step != status.get("taken_back_to"):
        locate_checkpoint(f"{run_dir}@{config.step}")
    drifts = tuple(find_drift(read_document(run_dir.config), config.document))
    if others := [str(change) for change in drifts if change.kind == "identity"]:
        raise RefusedError(
            f"{run_dir} is another run: {', '.join(others)}; change these back, or start a new run by leaving dir out"
        )
    return Standing(exists=True, drifts=drifts, status=status, is_finished=is_finished(config, run_dir, status))


def is_finished(config: Config, run_dir: RunDir, status: JsonObject) -> bool:
    """Return whether nothing is left to do: all steps are done, and the last is on disk where that is wanted."""
    step = status.get("step", 0)
    if config.overwrite or status.get("state") != "finished" or step < config.train.steps:
        return False
    if config.step is not None and config.step != status.get("taken_back_to"):
        return False
    return not config.ckpt.last or (run_dir.checkpoints / str(step)).is_dir()
