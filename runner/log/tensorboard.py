"""TensorBoard event files, without TensorFlow: each (step, split) once, for a reader that knows nothing of restarts.

After a resume the files are cut back to the restored step, what they lack is filled in from metrics.jsonl, and a file
of its own is begun, so that a TensorBoard that is looking goes on. A START event tells it to forget what it has seen
and we have cut.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.proto.types_pb2 import DT_STRING
from tensorboardX.record_writer import masked_crc32c

from runner.log.jsonl import CutPoint, read_metric_lines_after
from runner.values import Values

PROVEN_BYTES = 1 << 16  # at the end of a file, where a power loss may have left anything, checksums are looked at


class TensorBoard:
    """Scalars, pictures and texts named `split/name`: one event a line of the log, with the system when `log` returns.

    The package's own SummaryWriter hands every scalar to a thread, which cost a small step ten times as much
    (measured), and a kill lost what was queued.
    """

    def __init__(self, directory: Path, truth: Path, until: CutPoint, aside: str):
        directory.mkdir(parents=True, exist_ok=True)
        held = cut(directory, until, directory / aside)
        self._out, self._run = _next_name(directory).open("xb", buffering=0), truth.parent.parent
        self._write(Event(file_version="brain.Event:2"))
        # In every file: TensorBoard takes no notice of the first START it meets (measured on 2.21).
        self._write(Event(step=until.step + 1, session_log=SessionLog(status=SessionLog.START)))
        for line in read_metric_lines_after(truth, *held):
            self.log(*line)

    def log(self, step: int, split: str, metrics: Values) -> None:
        there = {name: value for name, value in metrics.items() if not self._is_gone(value)}
        values = [self._value(f"{split}/{name}", value) for name, value in there.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def _is_gone(self, value: float | str) -> bool:
        """Whether it is a file that somebody has deleted: the curves are worth having without it."""
        return isinstance(value, str) and not (self._run / value).exists()

    def _value(self, tag: str, value: float | str) -> Summary.Value:
        if not isinstance(value, str):
            return Summary.Value(tag=tag, simple_value=value)
        content = (self._run / value).read_bytes()
        if value.endswith(".png"):
            width, height = struct.unpack(">II", content[16:24])  # where a PNG says it
            return Summary.Value(tag=tag, image=Summary.Image(height=height, width=width, encoded_image_string=content))
        fenced = b"```\n" + content + b"\n```"  # it is shown as Markdown
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        return Summary.Value(tag=tag, metadata=kind, tensor=TensorProto(dtype=DT_STRING, string_val=[fenced]))

    def close(self) -> None:
        os.fsync(self._out.fileno())
        self._out.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        if self._out.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut(directory: Path, until: CutPoint, aside: Path) -> tuple[int, str]:
    """Drop the events that come later, and torn ones; keep them in `aside`. Returns the last (step, split) held.

    Only the newest files are read: those before the first event that stays hold older ones alone.
    """
    for path in sorted(directory.glob("*tfevents*"), reverse=True):
        held, end = (0, ""), 0
        with path.open("r+b") as file:
            for after, event in _events(file):
                split = event.summary.value[0].tag.partition("/")[0] if event.summary.value else ""
                if not until.holds(event.step, split):
                    break
                end = after
                if split:
                    held = event.step, split
            file.seek(end)
            if rest := file.read():
                with aside.open("ab") as out:
                    out.write(rest)
                file.truncate(end)
                os.fsync(file.fileno())
        if held[0] > 0:
            return held
    return 0, ""


def _events(file: BinaryIO) -> Iterator[tuple[int, Event]]:
    """The whole events of a file, each with where it ends. Stops at a torn one."""
    size, end = os.fstat(file.fileno()).st_size, 0
    while len(header := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", header[:8])
        if length == 0 or end + length + 16 > size:
            return
        data, checksum = file.read(length), file.read(4)
        end += length + 16
        if end > size - PROVEN_BYTES and struct.pack("<I", masked_crc32c(data)) != checksum:
            return
        try:
            yield end, Event.FromString(data)
        except DecodeError:
            return


def _next_name(directory: Path) -> Path:
    """A file name that readers take for the newest, whatever the clocks of the machines say, and that is not there."""
    stamps = [int(found[1]) for path in directory.iterdir() if (found := re.search(r"tfevents\.(\d+)", path.name))]
    stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
    return directory / f"events.out.tfevents.{stamp}.{socket.gethostname()}"
