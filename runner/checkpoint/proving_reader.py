"""Take the checksums of a checkpoint's arrays while they are read: one pass over their files is read and proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from runner.checkpoint.record import FileTable
from runner.checkpoint.seal import measure_files

T = TypeVar("T")


class ProvingReader(Generic[T]):
    """Read checkpoints, and say what the files were that were read.

    `read` turns the directory of a checkpoint into a state, and notes the size and the checksum of each file that it
    has read to its end, by its name. Without `checksums` none is asked for.
    """

    def __init__(self, read: Callable[[Path, FileTable | None], T], *, checksums: bool):
        self._read, self._checksums = read, checksums
        self._directory, self._measured = Path(), FileTable()

    def read(self, directory: Path) -> T:
        """Return the state of a checkpoint. Raises what keeps it from being read."""
        # Also where it fails halfway: what was read to its end is known.
        self._directory, self._measured = directory, {}
        return self._read(directory, self._measured if self._checksums else None)

    def measure(self, directory: Path, names: Sequence[str]) -> FileTable:
        """Return the sizes and checksums of files: of those that `read` has read as they were then. Raises OSError."""
        measured = self._measured if directory == self._directory else {}
        others = measure_files(directory, [name for name in names if name not in measured], checksums=True)
        return {name: measured[name] if name in measured else others[name] for name in names}
