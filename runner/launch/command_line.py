"""What a command line asks for, as values: one run, the runs of a sweep, or a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.config.schema import Config
from runner.launch.local_sweep import LocalOptions
from runner.launch.slurm_job import SlurmOptions
from runner.launch.submitit_sweep import SubmititOptions

if TYPE_CHECKING:
    from runner.launch.study import Study


@dataclass(frozen=True)
class Command:
    """The words of one run, without those that say how it is launched.

    Attributes:
        overrides: `("ckpt=combined", "optim.lr=0.01")`; they name the run's directory.
        began: when this process started, in seconds since 1970.
        words: everything that starts this run once more, flags included.
    """

    overrides: tuple[str, ...]
    began: float = 0.0
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRequest:
    """One run with its validated configuration; `job`: submit it to Slurm as this job instead of working on it here."""

    config: Config
    command: Command
    job: SlurmOptions | None = None


@dataclass(frozen=True)
class SweepRequest:
    """The runs of a sweep, all of them validated, and the launcher that was chosen for them."""

    runs: tuple[RunRequest, ...]
    launcher: LocalOptions | SlurmOptions | SubmititOptions


# Work on a batch of trials: → the score of each, None where it has none.
WorkOnBatch = Callable[[SweepRequest, "Study"], Sequence[float | None]]


@dataclass(frozen=True)
class SearchRequest:
    """A search. Its runs cannot be known before: each batch follows from the scores of those before it.

    `search(work_on_batch)` returns when all trials are done; it raises ConfigError where a batch does not compose.
    """

    search: Callable[[WorkOnBatch], None]
