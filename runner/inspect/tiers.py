"""Where the checkpoints of a run lie: on this machine's disk alone, on their way, or in the bucket as well.

Told from what this machine has written down of the bucket (remote.json); nothing is asked over the network. No jax.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.checkpoint.record import list_records
from runner.errors import StorageError
from runner.remote.local_note import LocalNote, TierState, read_note
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import is_in_use
from runner.text import format_count, shorten
from runner.types import JsonObject

# Over a shorter time a rate says how a run began, and not what an hour costs.
RATE_HOURS = 1 / 6
MOST_SHOWN_CHARS = 300  # of what a file says that may be somebody else's


@dataclass(frozen=True)
class Tiers:
    """Hold what this machine knows of a run that lives in a bucket as well.

    Attributes:
        note: what is written down.
        is_at_work: whether a process has the run, so that an upload can be under way.
        here: the steps on this disk.
        marked: those of them that no restart uses unasked.
    """

    note: LocalNote
    is_at_work: bool
    here: frozenset[int]
    marked: frozenset[int]

    @property
    def url(self) -> str:
        """Return the place, for people."""
        return shorten(self.note.url, MOST_SHOWN_CHARS)

    @property
    def newest(self) -> int | None:
        """Return the newest step there that a restart on an empty machine would use; None where none is."""
        return max((step for step in self.note.steps if step not in self.marked), default=None)

    @property
    def requests_per_hour(self) -> float | None:
        """Return how many requests the last attempt has made in an hour; None where it was too short to say."""
        if self.note.requests is None or self.note.hours < RATE_HOURS:
            return None
        return sum(self.note.requests.values()) / self.note.hours

    def state_of(self, step: int) -> TierState:
        """Return where a checkpoint of this disk lies."""
        state = self.note.state_of(step)
        # What a kill has cut off is on its way no longer.
        return "local" if state == "uploading" and not self.is_at_work else state

    def describe(self) -> JsonObject:
        """Return the facts as data."""
        return {
            "url": self.note.url,
            "newest": self.newest,
            "steps": list(self.note.steps),
            "trouble": self.note.trouble,
            "upload_seconds": self.note.upload_seconds or None,
            "requests": dict(self.note.requests or {}),
            "requests_per_hour": self.requests_per_hour,
        }

    def summarize(self) -> str:
        """Return a line: where it lives, what is there, and why it is behind where it is."""
        newest = f"newest there is step {self.newest}" if self.newest is not None else "no checkpoint is there yet"
        gone = [str(step) for step in self.note.steps if step not in self.here]
        only = f"; there alone: {shorten(', '.join(gone), MOST_SHOWN_CHARS)}" if gone else ""
        behind = f"; behind: {shorten(self.note.trouble, MOST_SHOWN_CHARS)}" if self.note.trouble else ""
        return f"lives in {self.url} as well: {newest}{only}{behind}"

    def summarize_requests(self) -> str:
        """Return what the last attempt has asked of the store, which is money; empty where that is not known."""
        if not self.note.requests:
            return ""
        rate = self.requests_per_hour
        each = f", {rate:,.0f} an hour" if rate is not None else ""
        return f"{format_count(sum(self.note.requests.values()), 'request')} in the last attempt{each}"


def read_tiers(run_dir: RunDir) -> Tiers | None:
    """Return where the checkpoints of a run lie; None where it lives on this disk alone."""
    note = read_note(run_dir)
    if note is None:
        return None
    try:
        records = [] if run_dir.checkpoints.is_symlink() else list_records(run_dir.checkpoints)
    except (OSError, StorageError):
        records = []
    here = frozenset(record.step for record in records)
    marked = frozenset(record.step for record in records if record.mark)
    return Tiers(note, is_in_use(run_dir), here, marked)
