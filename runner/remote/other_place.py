"""The other place of a run, as the rest of the program sees it: a bucket, or none.

No client is imported without one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from runner.checkpoint.record import Score
from runner.checkpoint.retention import RetentionRule
from runner.remote.options import Remote
from runner.rundir.layout import RunDir
from runner.values import Say


class OtherPlace(Protocol):
    """The other place of a run: a bucket, or none."""

    def check(self) -> None:
        """Raise LostRunError where it is known that somebody else has the run."""

    def list_steps(self) -> Collection[int]:
        """Return the checkpoints that are whole there and that a restart would use."""

    def bring_newer(self, than: int) -> bool:
        """Bring the newest good checkpoint after a step onto this disk; return whether there was one."""

    def bring(self, step: int) -> bool:
        """Bring a checkpoint onto this disk, proven, where it is not here; return whether it is here then."""

    def bring_base(self, digest: str) -> bool:
        """Bring the frozen weights of this digest onto this disk, proven; return whether they are here then."""

    def bring_best(self, scores: Collection[Score]) -> None:
        """Bring the best checkpoints onto this disk: rules that compare with them see what they saw before."""

    def set_newer_aside(self, step: int) -> None:
        """Set aside there what is newer than a step."""

    def tell(self, say: Say) -> None:
        """Take note of who tells a person a line from now on."""

    def begin(self) -> None:
        """Begin to send, once it is known what this run goes on from."""

    def note_saved(self) -> None:
        """Take note that a checkpoint is durable here."""

    def list_held_steps(self) -> frozenset[int]:
        """Return the checkpoints that must stay on this disk for now."""

    @property
    def newest(self) -> int | None:
        """Return the newest checkpoint that is whole there; None where there is none, or no such place."""

    @property
    def upload_seconds(self) -> float | None:
        """Return what it takes to send a checkpoint; None where that is not known, or where there is no such place."""

    def finish(self, deadline: float | None) -> None:
        """Wait until everything is there. Raises StorageError where it cannot be."""

    def send_what_there_is(self) -> None:
        """Send what there is after an error, for a short while; nothing is raised."""


class NoPlace:
    """The other place of a run that has none."""

    newest: int | None = None
    upload_seconds: float | None = None

    def check(self) -> None:
        """Do nothing."""

    def list_steps(self) -> Collection[int]:
        """Return nothing."""
        return ()

    def bring_newer(self, than: int) -> bool:
        """Return that there is none."""
        return False

    def bring(self, step: int) -> bool:
        """Return that it is not there."""
        return False

    def bring_base(self, digest: str) -> bool:
        """Return that they are not there."""
        return False

    def bring_best(self, scores: Collection[Score]) -> None:
        """Do nothing."""

    def set_newer_aside(self, step: int) -> None:
        """Do nothing."""

    def tell(self, say: Say) -> None:
        """Do nothing."""

    def begin(self) -> None:
        """Do nothing."""

    def note_saved(self) -> None:
        """Do nothing."""

    def list_held_steps(self) -> frozenset[int]:
        """Return nothing."""
        return frozenset()

    def finish(self, deadline: float | None) -> None:
        """Do nothing: it is all here."""

    def send_what_there_is(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Choices:
    """Hold what the configuration says of the other place of a run.

    Attributes:
        remote: where it is.
        keep: the rules that say which checkpoints stay there, by name.
        score: what "best" means.
        overwrite: a run that is there is set aside, and this one begins afresh.
    """

    remote: Remote
    keep: Mapping[str, RetentionRule]
    score: Score
    overwrite: bool = False


@contextmanager
def hold_other_place(
    choices: Choices, key: str, run_dir: RunDir, raise_if_stopped: Callable[[], None]
) -> Iterator[OtherPlace]:
    """Hold a run in its other place as well, where it has one, while the context lasts; its directory must be locked.

    Args:
        choices: what the configuration says.
        key: the name of the run there, `NAME/RUN`.
        run_dir: the run on this disk.
        raise_if_stopped: raises where a stop is asked for, while the holder before is waited for.

    Raises:
        RefusedError: another process has the run.
        ConfigError: the store takes the command for wrong.
        StorageError: it cannot be reached, or this disk cannot be written.
    """
    if choices.remote.url is None:
        yield NoPlace()
        return
    from runner.remote.bucket import hold_in_bucket

    with hold_in_bucket(choices, key, run_dir, raise_if_stopped) as bucket:
        yield bucket
