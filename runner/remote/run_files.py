"""The files of a run beside its checkpoints: sent where they have changed, and fetched onto an empty disk. No jax.

A file up to a mebibyte is one object. A longer one, which is a log, is several, of which only the last changes: so what
goes up for a log is what was added to it, and less than a mebibyte that was there before. Where a log was cut back and
went on, the pieces that are no longer right go first, from the last one: what is left is always the beginning of a log
that was there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from runner import files
from runner.remote.objects import Objects, read_exactly, run_side_by_side
from runner.remote.remote_layout import SEGMENT_BYTES, Listing, group_segments, name_segment
from runner.rundir.layout import RunDir

# Written while a run is at work, by programs that know of no remote, and of no use on another machine.
LEFT_OUT = ("base", "checkpoints", "quarantine", "remote.json", "STOP", "PROFILE")


@dataclass
class _Sent:
    """Hold what was sent of one file: how it looked, and the checksum of each piece, empty where that is not known."""

    look: tuple[int, int, int] = (-1, -1, -1)  # size, time of change, inode
    pieces: list[str] = field(default_factory=list)


class FileMirror:
    """Keep the files of a run in a bucket as they are on disk. Used by one thread at a time."""

    def __init__(self, objects: Objects, run_dir: RunDir, listing: Listing):
        self._objects, self._run_dir = objects, run_dir
        self._sent: dict[str, _Sent] = {}
        # Of what is there nobody knows the content until it is sent once: all pieces may be wrong.
        for name, keys in group_segments(listing.files).items():
            self._sent[name] = _Sent(pieces=[""] * len(keys))
        whole = {key for keys in group_segments(listing.files).values() for key in keys}
        self._leftovers = sorted(set(listing.files) - whole)

    def note_as_sent(self, names: list[str]) -> None:
        """Take note that files are here as they are there: they were fetched just now. Raises OSError."""
        for name in names:
            path = self._run_dir.path / name
            with os.fdopen(files.open_file(path, os.O_RDONLY), "rb") as file:
                pieces = [xxhash.xxh3_128(piece).hexdigest() for piece in iter(lambda: file.read(SEGMENT_BYTES), b"")]
            self._sent[name] = _Sent(_look_at(path), pieces or [xxhash.xxh3_128(b"").hexdigest()])

    def send_changed(self, first: tuple[str, ...] = ()) -> int:
        """Send what has changed since it was last sent; return how many files. `first`: those that go before others.

        Raises RemoteError, LostRunError of the caller's own check. A file that goes away meanwhile is left out.
        """
        if self._leftovers:
            self._objects.delete(self._leftovers)
            self._leftovers = []
        names = list(_iter_files(self._run_dir))
        changed = []
        for name in names:
            with suppress(OSError):
                if _look_at(self._run_dir.path / name) != self._sent.setdefault(name, _Sent()).look:
                    changed.append(name)
        for name in [name for name in first if name in changed]:
            self._send(name)
        run_side_by_side(self._send, [name for name in changed if name not in first])
        return len(changed)

    def _send(self, name: str) -> None:
        sent = self._sent[name]
        try:
            with os.fdopen(files.open_file(self._run_dir.path / name, os.O_RDONLY), "rb", buffering=0) as file:
                # Of what is open, and not of what has the name by now: a file may be replaced at any moment.
                look = _describe(os.fstat(file.fileno()))
                sizes = [min(SEGMENT_BYTES, look[0] - start) for start in range(0, look[0], SEGMENT_BYTES)] or [0]
                checksums = [xxhash.xxh3_128(read_exactly(file, size)).hexdigest() for size in sizes]
                same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(checksums, sent.pieces, strict=False))
                good = sum(1 for _ in same)
                # From the end, before others come in their place: no reader may put an old end to a new beginning.
                keep = min(good + 1, len(sizes))
                if stale := [name_segment(name, index) for index in range(len(sent.pieces) - 1, keep - 1, -1)]:
                    self._objects.delete(stale)
                del sent.pieces[good:]
                file.seek(good * SEGMENT_BYTES)
                for index in range(good, len(sizes)):
                    content = read_exactly(file, sizes[index])
                    # From now on something is there, also where the answer does not come.
                    sent.pieces.append("")
                    self._objects.write(name_segment(name, index), content)
                    sent.pieces[index] = xxhash.xxh3_128(content).hexdigest()
        except OSError:
            # Gone, cut while it was read, or replaced by what is no plain file: the next time says.
            return
        sent.look = look


def fetch_files(
    objects: Objects, listing: Listing, run_dir: RunDir, before_last: Callable[[], None] = lambda: None
) -> list[str]:
    """Write the files of a run into its directory, which has none of them; return their names.

    `before_last` is called before the configuration comes: a directory without it is no run, and what a kill leaves
    until then is fetched again. Raises RemoteError, OSError.
    """
    grouped = group_segments(listing.files)

    def fetch(name: str) -> None:
        path = run_dir.path / name
        files.make_folder(path.parent)
        with os.fdopen(files.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as out:
            for key in grouped[name]:
                out.write(objects.read(key))
            out.flush()
            os.fsync(out.fileno())

    names = [name for name in grouped if _is_safe(name)]
    config = run_dir.config.name
    run_side_by_side(fetch, [name for name in names if name != config])
    before_last()
    if config in names:
        # In one move: half a configuration would be one.
        files.replace_file(run_dir.config, b"".join(map(objects.read, grouped[config])))
    files.sync_path(run_dir.path)
    return names


def _iter_files(run_dir: RunDir) -> Iterator[str]:
    """Yield the names of the plain files of a run: nothing hidden, no checkpoint, and nothing that a link leads to."""
    for folder, folders, names in os.walk(run_dir.path):
        here = Path(folder).relative_to(run_dir.path)
        folders[:] = [name for name in folders if not name.startswith(".") and (here / name).as_posix() not in LEFT_OUT]
        for name in names:
            own = (here / name).as_posix()
            # The copy of the decisions is hidden, and is made again from the other.
            if not name.startswith(".") and own not in LEFT_OUT and not os.path.islink(run_dir.path / own):
                yield own


def _look_at(path: Path) -> tuple[int, int, int]:
    return _describe(os.stat(path, follow_symlinks=False))


def _describe(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino


def _is_safe(name: str) -> bool:
    """Tell whether a key is the name of a file in a run's own directory."""
    parts = name.split("/")
    return all(part and part not in (".", "..") and "\0" not in part for part in parts) and parts[0] not in LEFT_OUT
