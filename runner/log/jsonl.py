"""metrics.jsonl, the truth about metrics, and timing.jsonl, the truth about seconds: one JSON object a line.

metrics.jsonl holds no clock, and after a resume exactly what an uninterrupted run would hold: it is cut back to the
restored step, and what was cut off is kept beside it. A step's lines are durable before its checkpoint is made; what
other sinks lack is filled in from here.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from runner.files import sync_path
from runner.log.sinks import CutPoint, SinkContext
from runner.types import JsonObject
from runner.values import MetricValues, Say

BLOCK_BYTES = 1 << 16
MetricLine = tuple[int, str, dict[str, float | str]]  # step, split, values


def open_json_lines(path: Path, context: SinkContext) -> JsonLinesFile:
    """Open a log, cut back to where training goes on from; what is cut off is kept beside it. Raises OSError."""
    cut_json_lines(path, context.cut_point, path.with_name(f"{path.stem}.cut-{context.attempt}.jsonl"))
    return JsonLinesFile(path, context.say)


class JsonLinesFile:
    """Append lines to a log: each is in the file when `write` returns, and on disk after `flush`.

    What a full disk does not take is told once, kept in memory and tried again with the next line.
    """

    def __init__(self, path: Path, say: Say):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a kill loses nothing that was written, and no line is torn by a buffer that is full.
        self._out, self._name, self._say = path.open("ab", buffering=0), path.name, say
        self._waiting, self._failing = b"", False
        # The name of a new file is durable only when its folder is, and that folder may be new as well.
        for directory in (path.parent, path.parent.parent):
            sync_path(directory)

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Append what a split measured at a step."""
        self.write({"step": step, "split": split, **metrics})

    def write(self, record: JsonObject) -> None:
        """Append a line."""
        self._waiting += json.dumps(record).encode() + b"\n"
        self._write_waiting()

    def flush(self) -> bool:
        """Return whether every line so far is durable: a power loss does not take it."""
        if not self._write_waiting():
            return False
        try:
            os.fsync(self._out.fileno())
        except OSError as error:
            return self._report_failure(f"is not durable ({error.strerror}); no checkpoint is made")
        return True

    def close(self) -> None:
        """Close the file; what waits in memory is lost (see `flush`)."""
        self._out.close()

    def _write_waiting(self) -> bool:
        """Return whether every line so far is in the file."""
        if not self._waiting:
            return True
        size = os.fstat(self._out.fileno()).st_size
        try:
            count = self._out.write(self._waiting) or 0
            # A disk that is almost full takes a part and raises nothing.
            if count < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # No torn line may stay: all of it is written later.
            os.ftruncate(self._out.fileno(), size)
            return self._report_failure(f"cannot be written ({error.strerror}); its lines wait in memory")
        self._waiting, self._failing = b"", False
        return True

    def _report_failure(self, what: str) -> bool:
        if not self._failing:
            self._say(f"warning: {self._name} {what}")
        self._failing = True
        return False


def cut_json_lines(path: Path, cut_point: CutPoint, aside: Path) -> None:
    """Drop from a log what comes after a point, and torn lines; append them to `aside`.

    Reads only the end of the file. A kill at any moment leaves a log that can be cut again.
    """
    if not path.exists():
        return
    kept, dropped, start = [], [], 0
    # A line of training comes in order, after everything older. Others may come late: timing.jsonl tells of a save when
    # it is durable. So the end goes back to the first line of training that stays, and no further.
    for offset, line in _read_backwards(path):
        step, kind = _parse_place(line)
        if step is None or not cut_point.holds(step, kind):
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
    with path.open("r+b", buffering=0) as file:
        # Written over in place, then cut to its length: a kill between the two leaves a torn line, which the next cut
        # drops.
        os.pwrite(file.fileno(), b"".join(reversed(kept)), start)
        file.truncate(start + sum(map(len, kept)))


def read_metric_lines(path: Path) -> Iterator[MetricLine]:
    """Yield every line of metrics.jsonl, in order; none where there is no file."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield _split_record(json.loads(line))


def read_metric_lines_after(path: Path, step: int, split: str) -> list[MetricLine]:
    """Return the lines of metrics.jsonl that come after one of them, in order. Reads only the end of the file."""
    found: list[MetricLine] = []
    if path.exists():
        for _, raw in _read_backwards(path):
            line = _split_record(json.loads(raw))
            # The line may be missing (nothing was measured by that split): an older step ends the search as well.
            if line[:2] == (step, split) or line[0] < step:
                break
            found.append(line)
    return found[::-1]


def _split_record(record: JsonObject) -> MetricLine:
    return record.pop("step"), record.pop("split"), record


def _parse_place(line: bytes) -> tuple[int | None, str]:
    """Return the step of a line, and what it tells of: a split or an event. No step: it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None, ""
    # The end of a longer line may be valid JSON by itself: a number, a string.
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None, ""
    return record.get("step"), record.get("split") or record.get("event", "")


def _read_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file from its last to its first, each with the offset of its first byte."""
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
            # The first line of a block may begin in the block before.
            tail = first
        if tail:
            yield 0, tail
