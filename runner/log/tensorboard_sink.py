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

from runner import files
from runner.log.jsonl import read_metric_lines_after
from runner.log.sinks import CutPoint, SinkContext
from runner.values import MetricValues

# At the end of a file, where a power loss may have left anything, checksums are looked at; before that, only lengths.
PROVEN_BYTES = 1 << 16
PNG_MARK = b"\x89PNG\r\n\x1a\n"


class TensorBoardSink:
    """Write scalars, pictures and texts named `split/name`: one event a line, with the system when `log` returns.

    The package's own SummaryWriter hands every scalar to a thread, which cost a small step ten times as much
    (measured), and a kill lost what was queued.
    """

    name = "tensorboard"

    def __init__(self, context: SinkContext):
        self._context, self._folder = context, context.logs / "tensorboard"
        self._out: BinaryIO

    def catch_up(self) -> None:
        """Cut the event files back, begin a new one, and write the lines that they lack into it."""
        files.make_folder(self._folder)
        cut_point = self._context.cut_point
        held = cut_event_files(self._folder, cut_point, self._folder / f"cut-{self._context.attempt}.events")
        fresh = files.open_file(_next_file_name(self._folder), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._out = os.fdopen(fresh, "wb", buffering=0)
        self._write(Event(file_version="brain.Event:2"))
        # In every file, not only after a cut: TensorBoard takes no notice of the first START it meets (measured on
        # 2.21).
        self._write(Event(step=cut_point.step + 1, session_log=SessionLog(status=SessionLog.START)))
        for line in read_metric_lines_after(self._context.metrics, *held):
            self.log(*line)

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Write the values of one line as one event."""
        encoded = [self._encode_value(f"{split}/{name}", value) for name, value in metrics.items()]
        self._write(Event(step=step, summary=Summary(value=[value for value in encoded if value is not None])))

    def close(self) -> None:
        """Make the file durable and close it."""
        os.fsync(self._out.fileno())
        self._out.close()

    def _encode_value(self, tag: str, value: float | str) -> Summary.Value | None:
        """Return a number as a scalar, a PNG file as an image, any other file as a text.

        None for a file that somebody has deleted: the curves are worth having without it.
        """
        if not isinstance(value, str):
            return Summary.Value(tag=tag, simple_value=value)
        content = self._context.read_media(value)
        if content is None:
            return None
        if value.endswith(".png") and content.startswith(PNG_MARK) and len(content) >= 24:
            # The size of a PNG stands at bytes 16 to 24, big-endian.
            width, height = struct.unpack(">II", content[16:24])
            return Summary.Value(tag=tag, image=Summary.Image(height=height, width=width, encoded_image_string=content))
        # TensorBoard shows a text as Markdown, so it is fenced, by more backticks than are in it.
        fence = b"`" * max(3, 1 + max(map(len, re.findall(b"`+", content)), default=0))
        fenced = fence + b"\n" + content + b"\n" + fence
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        return Summary.Value(tag=tag, metadata=kind, tensor=TensorProto(dtype=DT_STRING, string_val=[fenced]))

    def _write(self, event: Event) -> None:
        """Write one record: its length, the checksum of that, the event, the checksum of that."""
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        # A disk that is almost full takes a part and raises nothing; the next start cuts the torn record off.
        if self._out.write(record) != len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_event_files(directory: Path, cut_point: CutPoint, aside: Path) -> tuple[int, str]:
    """Drop the events that come after a point, and torn ones; append them to `aside`.

    Returns the last (step, split) that is still held; (0, "") where there is none.
    """
    # From the newest file back, and no further than the first event that stays: older files hold older events alone.
    for path in sorted(directory.glob("*tfevents*"), reverse=True):
        held, end = (0, ""), 0
        with os.fdopen(files.open_file(path, os.O_RDWR), "r+b") as file:
            for after, event in _read_events(file):
                split = event.summary.value[0].tag.partition("/")[0] if event.summary.value else ""
                if not cut_point.holds(event.step, split):
                    break
                end = after
                if split:
                    held = event.step, split
            file.seek(end)
            if rest := file.read():
                handle = files.open_file(aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                with os.fdopen(handle, "ab") as out:
                    out.write(rest)
                file.truncate(end)
                os.fsync(file.fileno())
        if held[0] > 0:
            return held
    return 0, ""


def _read_events(file: BinaryIO) -> Iterator[tuple[int, Event]]:
    """Yield the whole events of a file, each with the offset of its end. Stops at a torn one."""
    size, end = os.fstat(file.fileno()).st_size, 0
    while len(header := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", header[:8])
        # Zeros are what a power loss leaves of a file that had grown.
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


def _next_file_name(directory: Path) -> Path:
    """Return the name of a file that is not there yet, and that readers take for the newest.

    They sort by the time in the name; the clocks of two machines, and two starts in one second, may disagree with that.
    """
    stamps = [int(found[1]) for path in directory.iterdir() if (found := re.search(r"tfevents\.(\d+)", path.name))]
    stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
    return directory / f"events.out.tfevents.{stamp}.{socket.gethostname()}"
