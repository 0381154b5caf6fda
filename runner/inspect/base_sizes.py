"""Say which frozen weights (`tune=`) a run has on disk, and how many of their bytes it shares with other runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.checkpoint.frozen_base import BASE, DIGEST
from runner.rundir.layout import RunDir
from runner.text import format_count, format_size
from runner.types import JsonObject


@dataclass(frozen=True)
class BaseSize:
    """One base of a run.

    Attributes:
        digest: its name.
        num_bytes: of its files, as they are called here.
        shared_bytes: of those of them that have another name as well: another run's, where it has the same base.
        others: how many other names the file with most of them has.
    """

    digest: str
    num_bytes: int
    shared_bytes: int
    others: int

    @property
    def document(self) -> JsonObject:
        """Return it as plain JSON values."""
        return {
            "digest": self.digest,
            "bytes": self.num_bytes,
            "shared_bytes": self.shared_bytes,
            "other_links": self.others,
        }

    def describe(self) -> str:
        """Return it in words: `3.3 MB, of which 3.3 MB are shared by links with 2 others`."""
        size = format_size(self.num_bytes)
        if not self.shared_bytes:
            return f"{size}, of this run alone"
        return (
            f"{size}, of which {format_size(self.shared_bytes)} are shared by links with "
            f"{format_count(self.others, 'other')}"
        )


def measure_bases(run_dir: RunDir) -> list[BaseSize]:
    """Return the bases of a run, in the order of their names; nothing of what a link leads to, or cannot be read."""
    folder = run_dir.path / BASE
    if folder.is_symlink():
        return []
    with suppress(OSError):
        names = sorted(name for name in os.listdir(folder) if DIGEST.fullmatch(name))
        return [_measure(folder / name) for name in names if not (folder / name).is_symlink()]
    return []


def _measure(base: Path) -> BaseSize:
    found = list(_iter_files(base))
    return BaseSize(
        base.name,
        sum(file.st_size for file in found),
        sum(file.st_size for file in found if file.st_nlink > 1),
        max((file.st_nlink for file in found), default=1) - 1,
    )


def _iter_files(folder: Path) -> Iterator[os.stat_result]:
    # Of what cannot be listed nothing is counted: `verify` tells what is wrong with it.
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _iter_files(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield entry.stat(follow_symlinks=False)
