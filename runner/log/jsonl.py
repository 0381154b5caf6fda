"""metrics.jsonl, the truth about metrics, and timing.jsonl, the truth about seconds: one JSON object a line.

metrics.jsonl holds no clock, and after a resume exactly what an uninterrupted run would hold: it is cut back to the
restored step, and what was cut off is kept beside it. A step's lines are durable before its checkpoint is made, and the
checkpoint carries a digest of all of them; what other sinks lack is filled in from here. A line that is no longer what
was written stays where it is, and readers pass over it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

import xxhash

from runner.files import format_json, make_folder, open_file, parse_json, parse_nonfinite, sync_path
from runner.log.sinks import CutPoint, LogDigest, SinkContext
from runner.text import format_count
from runner.types import JsonObject
from runner.values import MetricValues, Say

BLOCK_BYTES = 1 << 16
MetricLine = tuple[int, str, dict[str, float | str]]  # step, split, values


def open_metrics(context: SinkContext) -> JsonLinesFile:
    """Open metrics.jsonl, cut back to where training goes on from; what is cut off is kept beside it.

    Where it is not what the checkpoint says, that is said: the state is proven, so training goes on all the same.
    Raises OSError.
    """
    path, known = context.metrics, context.digests
    aside = path.with_name(f"{path.stem}.cut-{context.attempt}.jsonl")
    damage = find_log_damage(path, known[-1:]) and find_log_damage(path, known)
    if damage is None and known and known[-1][0] == context.cut_point.step:
        # To the byte, whatever the lines after it have become. What is owed was not in the log when it was saved.
        cut_to_length(path, known[-1][1].bytes, aside)
    else:
        cut_json_lines(path, context.cut_point, aside)
    if damage:
        context.say(f"warning: {damage}; training goes on, for the state is proven")
        if num_lines := sum(parse_metric_line(line) is None for line in _iter_lines(path)):
            context.say(f"warning: {path.name}: {format_count(num_lines, 'line')} cannot be read and count for nothing")
    return JsonLinesFile(path, context.say, context.check_held)


def open_json_lines(path: Path, context: SinkContext) -> JsonLinesFile:
    """Open a log, cut back to where training goes on from; what is cut off is kept beside it. Raises OSError."""
    cut_json_lines(path, context.cut_point, path.with_name(f"{path.stem}.cut-{context.attempt}.jsonl"))
    return JsonLinesFile(path, context.say, context.check_held)


class LogHash:
    """Add up a log from its beginning, as it grows."""

    def __init__(self) -> None:
        self.num_bytes, self.ends_line, self._hash = 0, True, xxhash.xxh3_128()

    def update(self, content: bytes) -> None:
        """Take in what follows."""
        self._hash.update(content)
        self.num_bytes += len(content)
        self.ends_line = content.endswith(b"\n")

    def digest(self) -> LogDigest:
        """Return what it adds up to so far."""
        return LogDigest(self.num_bytes, self._hash.hexdigest())


class JsonLinesFile:
    """Append lines to a log: each is in the file when `write` returns, and on disk after `flush`.

    What a full disk does not take is told once, kept in memory and tried again with the next line; `trouble` says why.
    `check_held` is called before each write: it raises LostRunError where the run is no longer this process's.
    """

    def __init__(self, path: Path, say: Say, check_held: Callable[[], None] = lambda: None):
        make_folder(path.parent)
        # Unbuffered: a kill loses nothing that was written, and no line is torn by a buffer that is full.
        self._out = os.fdopen(open_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b", buffering=0)
        self._name, self._say, self._check_held = path.name, say, check_held
        self._waiting, self.trouble = b"", ""
        # What is there already, once: 100 MB in 10 ms.
        self._hash = hash_log(path)
        # The name of a new file is durable only when its folder is, and that folder may be new as well.
        for directory in (path.parent, path.parent.parent):
            sync_path(directory)

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Append what a split measured at a step."""
        self.write({"step": step, "split": split, **metrics})

    def write(self, record: JsonObject) -> None:
        """Append a line."""
        self._waiting += format_json(record).encode() + b"\n"
        self._write_waiting()

    def flush(self) -> bool:
        """Return whether every line so far is durable: a power loss does not take it."""
        if not self._write_waiting():
            return False
        try:
            os.fsync(self._out.fileno())
        except OSError as error:
            return self._report_failure(error, "is not durable ({}); no checkpoint is made")
        return True

    def digest(self) -> LogDigest:
        """Return what every line that is in the file adds up to: as they were written, and not as they are read."""
        return self._hash.digest()

    def close(self) -> None:
        """Close the file; what waits in memory is lost (see `flush`)."""
        self._out.close()

    def _write_waiting(self) -> bool:
        """Return whether every line so far is in the file."""
        if not self._waiting:
            return True
        self._check_held()
        size = None
        try:
            size = os.fstat(self._out.fileno()).st_size
            # Where the file ends in the middle of a line, the next one must not become part of it.
            content = b"\n" * self._ends_torn(size) + self._waiting
            count = self._out.write(content) or 0
            # A disk that is almost full takes a part and raises nothing.
            if count < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # No torn line may stay: all of it is written later.
            if size is not None:
                with suppress(OSError):
                    os.ftruncate(self._out.fileno(), size)
            return self._report_failure(error, "cannot be written ({}); its lines wait in memory")
        self._hash.update(content)
        self._waiting, self.trouble = b"", ""
        return True

    def _ends_torn(self, size: int) -> bool:
        """Tell whether the file does not end with the end of a line. Its last byte is known, unless others wrote."""
        is_known = size == self._hash.num_bytes and self._hash.ends_line
        return size > 0 and not is_known and os.pread(self._out.fileno(), 1, size - 1) != b"\n"

    def _report_failure(self, error: OSError, what: str) -> bool:
        if not self.trouble:
            self._say(f"warning: {self._name} {what.format(error.strerror)}")
        self.trouble = error.strerror or str(error)
        return False


def _open_log(path: Path, mode: Literal["rb", "r+b", "ab"] = "rb") -> BinaryIO:
    """Open a log as `open` does, but never through a link, and nothing that is no plain file."""
    flags = {"rb": os.O_RDONLY, "r+b": os.O_RDWR, "ab": os.O_WRONLY | os.O_CREAT | os.O_APPEND}[mode]
    return os.fdopen(open_file(path, flags), mode)


def hash_log(path: Path) -> LogHash:
    """Return what all of a log adds up to; nothing where there is none."""
    found = LogHash()
    if path.exists():
        with _open_log(path) as file:
            while block := file.read(BLOCK_BYTES):
                found.update(block)
    return found


def find_log_damage(path: Path, known: Sequence[tuple[int, LogDigest]]) -> str | None:
    """Return where a log is not what it was when steps were saved, in words; None where it is.

    It is read once, up to the last of them. `known` holds what it was at each step.
    """
    good, found = 0, LogHash()
    with _open_log(path) if path.exists() else BytesIO() as file:
        for step, digest in sorted(known, key=lambda one: one[1].bytes):
            while block := file.read(min(BLOCK_BYTES, digest.bytes - found.num_bytes)):
                found.update(block)
            if found.digest() != digest:
                if not path.exists():
                    return f"{path.name} is missing"
                since = f"after step {good}" if good else "from its beginning"
                return f"{path.name} is not what was written, {since} up to step {step}"
            good = step
    return None


def cut_to_length(path: Path, num_bytes: int, aside: Path) -> None:
    """Drop from a log what comes after so many bytes; append that to `aside`."""
    if not path.exists() or path.stat().st_size <= num_bytes:
        return
    with _open_log(path, "r+b") as file, _open_log(aside, "ab") as out:
        file.seek(num_bytes)
        shutil.copyfileobj(file, out)
        out.flush()
        file.truncate(num_bytes)


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
        step, kind, _ = _parse_place(line)
        if step is None or not cut_point.holds(step, kind):
            dropped.append(line.rstrip(b"\n") + b"\n")
        elif kind == "train":
            start = offset + len(line)
            break
        else:
            kept.append(line)
    if not dropped:
        return
    with _open_log(aside, "ab") as out:
        out.writelines(reversed(dropped))
    with _open_log(path, "r+b") as file:
        # Written over in place, then cut to its length: a kill between the two leaves a torn line, which the next cut
        # drops.
        os.pwrite(file.fileno(), b"".join(reversed(kept)), start)
        file.truncate(start + sum(map(len, kept)))


def read_metric_lines(path: Path) -> Iterator[MetricLine]:
    """Yield every line of metrics.jsonl that can be read, in order; none where there is no file."""
    for raw in _iter_lines(path):
        if line := parse_metric_line(raw):
            yield line


def read_metric_lines_after(path: Path, step: int, split: str) -> list[MetricLine]:
    """Return the lines of metrics.jsonl that come after one of them, in order. Reads only the end of the file."""
    found: list[MetricLine] = []
    if path.exists():
        for _, raw in _read_backwards(path):
            line = parse_metric_line(raw)
            if line is None:
                continue
            # The line may be missing (nothing was measured by that split): an older step ends the search as well.
            if line[:2] == (step, split) or line[0] < step:
                break
            found.append(line)
    return found[::-1]


def parse_metric_line(line: bytes) -> MetricLine | None:
    """Return step, split and values of a line of metrics.jsonl; None where it is none, whatever its bytes are."""
    step, split, found = _parse_place(line)
    values = {name: parse_nonfinite(value) for name, value in found.items()}
    return (step, split, values) if step is not None and split and all(map(_is_value, values.values())) else None


def _is_value(value: object) -> bool:
    """Tell whether a value is what a split measures: a number, or the name of a file in the run's directory."""
    if isinstance(value, str):
        return "\0" not in value and not value.startswith("/") and ".." not in PurePosixPath(value).parts
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def _parse_place(line: bytes) -> tuple[int | None, str, JsonObject]:
    """Return the step of a line, what it tells of (a split or an event), and the rest. No step: it is torn."""
    try:
        record = parse_json(line)
    except ValueError:
        return None, "", {}
    # The end of a longer line may be valid JSON by itself: a number, a string.
    if not line.endswith(b"\n") or not isinstance(record, dict):
        return None, "", {}
    step, kind = record.pop("step", None), record.pop("split", "") or record.get("event", "")
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 63
    return (step, kind, record) if is_step and isinstance(kind, str) else (None, "", {})


def _iter_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; none where there is no file."""
    if path.exists():
        with _open_log(path) as file:
            yield from file


def _read_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file from its last to its first, each with the offset of its first byte."""
    with _open_log(path) as file:
        # The blocks of a line whose beginning is not found yet, the last one first: they are put together once, for a
        # power loss may leave a line of zeros that is as long as the file.
        position, tail = file.seek(0, os.SEEK_END), list[bytes]()
        while position > 0:
            size = min(BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            tail.append(file.read(size))
            if len(tail) > 1 and not (b"\n" in tail[-1] or b"\r" in tail[-1]):
                continue
            first, *whole = b"".join(reversed(tail)).splitlines(keepends=True)
            offset = position + len(first) + sum(map(len, whole))
            for line in reversed(whole):
                offset -= len(line)
                yield offset, line
            tail = [first]
        if tail:
            yield 0, b"".join(reversed(tail))
