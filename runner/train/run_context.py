"""Who works on what: handed to everything that an attempt opens. No jax."""

from __future__ import annotations

from dataclasses import dataclass, field

from runner.config.schema import Config
from runner.hosts.options import Place
from runner.log.console import Console
from runner.preempt.stop import StopFlag
from runner.remote.other_place import NoPlace, OtherPlace
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import RunLock


@dataclass(frozen=True)
class RunContext:
    """One attempt at a run: its configuration and directory, its record, a person's terminal, the request to stop.

    `lock` says whether the run is still this process's. `other_place` is the bucket that it lives in as well, or none.
    `steps_back`: training failed in the same way before, so go on from the checkpoint before the newest. `place`: which
    of several processes this is, None for the only one.
    """

    config: Config
    run_dir: RunDir
    attempt: AttemptLog
    console: Console
    stop_flag: StopFlag
    lock: RunLock
    other_place: OtherPlace = field(default_factory=NoPlace)
    steps_back: bool = False
    place: Place | None = None
