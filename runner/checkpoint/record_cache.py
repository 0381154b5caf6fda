"""The records of a folder of checkpoints, for who asks again and again: each sidecar is read once. No jax.

A checkpoint gets its name in one move and is not written again, so its directory says by number and time whether it is
the one that was read. Putting a pin into it, or taking it out, changes that time.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from runner.checkpoint.record import NewerFormatError, Record, is_step_name, read_sidecar
from runner.errors import StorageError
from runner.text import display_path

# Which directory it is, and when a name in it last changed, in nanoseconds.
_Look = tuple[int, int]


class RecordCache:
    """List the records below `checkpoints`, as `list_records` does. From any thread."""

    def __init__(self, checkpoints: Path):
        self._checkpoints, self._lock = checkpoints, threading.Lock()
        # None: it has no sidecar that can be read.
        self._known: dict[str, tuple[_Look, Record | None]] = {}

    def list_records(self) -> list[Record]:
        """Return the record of every checkpoint that has a readable sidecar, oldest first.

        Raises StorageError where the folder cannot be listed.
        """
        with self._lock:
            try:
                looks = self._look()
            except FileNotFoundError:
                looks = {}
            except OSError as error:
                raise StorageError(f"{display_path(self._checkpoints)}: cannot be listed ({error.strerror})") from error
            self._known = {name: self._read(name, look) for name, look in looks.items()}
            records = [record for _, record in self._known.values() if record is not None]
        return sorted(records, key=lambda record: record.step)

    def _look(self) -> dict[str, _Look]:
        looks = {}
        with os.scandir(self._checkpoints) as entries:
            for entry in entries:
                if is_step_name(entry.name) and entry.is_dir(follow_symlinks=False):
                    # Deleted in the meantime.
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        looks[entry.name] = found.st_ino, found.st_mtime_ns
        return looks

    def _read(self, name: str, look: _Look) -> tuple[_Look, Record | None]:
        known = self._known.get(name)
        if known is not None and known[0] == look and known[1] is not None:
            return known
        record = None
        # Not a checkpoint, a damaged one, or one of a later version: restoring says so.
        with suppress(OSError, ValueError, NewerFormatError):
            record = read_sidecar(self._checkpoints / name).record
        return look, record
