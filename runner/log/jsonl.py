"""metrics.jsonl, the truth about metrics, and timing.jsonl, the truth about seconds: one JSON object a line.

metrics.jsonl holds no clock, and after a resume exactly what an uninterrupted run would hold: it is cut back to the
restored step, and what was cut is kept beside it. A step's lines are durable before its checkpoint is made; what other
sinks lack is filled in from here.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files import sync_path
from runner.values import Values

BLOCK_BYTES = 1 << 16
Line = tuple[int, str, dict[str, float | str]]  # step, split, values


@dataclass(frozen=True)
class CutPoint:
    """Up to where logs go when a step is restored: without its evaluation, where that is still owed."""

    step: int
    owes: bool = False

    def holds(self, step: int, split: str) -> bool:
        late = split not in ("train", "save")  # what is measured or made by an evaluation
        return step < self.step or (step == self.step and not (self.owes and late))


class JsonLinesFile:
    """Appends one line a (step, split), each in the file when `write` returns, and on disk after `flush`.

    What a full disk does not take is told once, kept in memory and tried again with the next line.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._name, self._tell = path.open("ab", buffering=0), path.name, tell
        self._waiting, self._failing = b"", False
        for directory in (path.parent, path.parent.parent):
            sync_path(directory)

    def log(self, step: int, split: str, metrics: Values) -> None:
        self.write({"step": step, "split": split, **metrics})

    def write(self, record: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(record).encode() + b"\n"
        self._written()

    def flush(self) -> bool:
        """Whether every line so far is durable: a power loss does not take it."""
        if not self._written():
            return False
        try:
            os.fsync(self._out.fileno())
        except OSError as error:
            return self._failed(f"is not durable ({error.strerror}); no checkpoint is made")
        return True

    def close(self) -> None:
        self._out.close()

    def _written(self) -> bool:
        """Whether every line so far is in the file."""
        if not self._waiting:
            return True
        size = os.fstat(self._out.fileno()).st_size
        try:
            count = self._out.write(self._waiting) or 0
            if count < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._out.fileno(), size)  # no torn line: all of it comes later
            return self._failed(f"cannot be written ({error.strerror}); its lines wait in memory")
        self._waiting, self._failing = b"", False
        return True

    def _failed(self, what: str) -> bool:
        if not self._failing:
            self._tell(f"warning: {self._name} {what}")
        self._failing = True
        return False


def cut_json_lines(path: Path, until: CutPoint, aside: Path) -> None:
    """Drop what comes later from a log, and torn lines; keep them in `aside`. Reads only the end of the file.

    A line of training comes in order, after everything older. Others may come late: timing.jsonl tells of a save when
    it is durable. So the end goes back to the first line of training that stays.
    """
    if not path.exists():
        return
    kept, dropped, start = [], [], 0
    for offset, line in _backwards(path):
        step, kind = _place(line)
        if step is None or not until.holds(step, kind):
            dropped.append(line.rstrip(b"\n") + b"\n")
        elif kind == "train":
            start = offset + len(line)
            break
        else:
            kept.append(line)
    if not dropped:
        return
    with aside.open("ab") as out:
        out.writelines(reversed(dropped))
    with path.open("r+b", buffering=0) as file:  # a kill between the two leaves a torn line, which the next cut drops
        os.pwrite(file.fileno(), b"".join(reversed(kept)), start)
        file.truncate(start + sum(map(len, kept)))


def read_metric_lines(path: Path) -> Iterator[Line]:
    """Every line of metrics.jsonl, in order."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield _taken_apart(json.loads(line))


def read_metric_lines_after(path: Path, step: int, split: str) -> list[Line]:
    """The lines of metrics.jsonl that come after one of them, in order. Reads only the end of the file."""
    found: list[Line] = []
    if path.exists():
        for _, raw in _backwards(path):
            line = _taken_apart(json.loads(raw))
            if line[:2] == (step, split) or line[0] < step:
                break
            found.append(line)
    return found[::-1]


def _taken_apart(record: dict[str, Any]) -> Line:
    return record.pop("step"), record.pop("split"), record


def _place(line: bytes) -> tuple[int | None, str]:
    """The step of a line, and what it tells of: a split or an event. No step: it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None, ""
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None, ""
    return record.get("step"), record.get("split") or record.get("event", "")


def _backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file from its last to its first, each with where it begins."""
    with path.open("rb") as file:
        position, tail = file.seek(0, os.SEEK_END), b""
        while position > 0:
            size = min(BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            first, *whole = (file.read(size) + tail).splitlines(keepends=True)
            offset = position + len(first) + sum(map(len, whole))
            for line in reversed(whole):
                offset -= len(line)
                yield offset, line
            tail = first  # it may begin in the block before
        if tail:
            yield 0, tail
