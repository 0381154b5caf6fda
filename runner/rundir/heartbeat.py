"""A run's heartbeat (the file `.pulse`): which step, doing what, since when. No jax.

Sixty-four bytes that the process maps into its memory: writing there costs less than a microsecond, no system call and
no wait, and what a SIGKILL leaves is exact. It says how far a killed process was and what it was doing, tells a
supervisor that one hangs, and lets the drill kill at a chosen moment.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner import files
from runner.rundir.side_files import is_count

LAYOUT = struct.Struct("<8sqdd16s16s")  # mark, step, when it last changed, when this phase began, phase, writer's phase
MARK = b"holdfast"
STEP, CHANGED, SINCE, PHASE, WRITING = 8, 16, 24, 32, 48  # where each begins, in bytes
LATEST_SECONDS = 1e11  # the year 5138: what comes after it no clock has said


@dataclass(frozen=True)
class Heartbeat:
    """Hold what was true when the process last changed it. Times are wall-clock seconds since 1970.

    Attributes:
        step: completed updates.
        changed: when `step` or `phase` last changed.
        since: when `phase` began.
        phase: what the training thread does: import, startup, restore, compile, step, data, eval, save, profile,
            finish.
        writing: what the thread that writes checkpoints does: write, seal, publish, prune, or "" for nothing.
    """

    step: int
    changed: float
    since: float
    phase: str
    writing: str


class HeartbeatWriter:
    """Write the heartbeat of the process that holds the run.

    Where the disk has no room for the file there is none, and nothing else changes.
    """

    def __init__(self, path: Path):
        self._bytes: mmap.mmap | bytearray = bytearray(LAYOUT.size)
        with suppress(OSError), os.fdopen(files.open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), "wb+") as out:
            # The space is taken now: a hole in the file would kill the process when it is touched on a full disk.
            out.write(bytes(LAYOUT.size))
            out.flush()
            self._bytes = mmap.mmap(out.fileno(), LAYOUT.size)
        now = time.time()
        LAYOUT.pack_into(self._bytes, 0, MARK, 0, now, now, b"startup", b"")

    def beat(self, step: int) -> None:
        """Write down how many steps are completed."""
        self._put(STEP, struct.pack("<qd", step, time.time()))

    def set_phase(self, name: str) -> None:
        """Write down what the training thread does from now on."""
        now = time.time()
        self._put(CHANGED, struct.pack("<dd16s", now, now, name.encode()))

    def set_writer_phase(self, name: str) -> None:
        """Write down what the thread that writes checkpoints does from now on."""
        self._put(WRITING, struct.pack("<16s", name.encode()))

    def _put(self, offset: int, fresh: bytes) -> None:
        # In one copy: `struct.pack_into` clears the place first, and a kill (or a reader) between finds step 0.
        self._bytes[offset : offset + len(fresh)] = fresh

    def read(self) -> Heartbeat:
        """Return what was written last. From any thread."""
        return _decode(bytes(self._bytes))


def read_heartbeat(path: Path) -> Heartbeat | None:
    """Return the last sign of life of a run; None where there is none, or where its bytes are not what a run writes."""
    try:
        written = files.read_file(path, limit=LAYOUT.size)
    except OSError:
        return None
    if len(written) != LAYOUT.size or not written.startswith(MARK):
        return None
    # ValueError: names that are no text.
    with suppress(ValueError):
        found = _decode(written)
        times = (found.changed, found.since)
        are_times = all(math.isfinite(each) and 0.0 <= each < LATEST_SECONDS for each in times)
        are_names = found.phase.isalpha() and (found.writing.isalpha() or not found.writing)
        if is_count(found.step) and are_times and are_names:
            return found
    return None


def _decode(written: bytes) -> Heartbeat:
    _, step, changed, since, phase, writing = LAYOUT.unpack(written)
    return Heartbeat(step, changed, since, phase.rstrip(b"\0").decode("ascii"), writing.rstrip(b"\0").decode("ascii"))
