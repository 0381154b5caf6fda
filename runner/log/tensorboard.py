"""TensorBoard event files, without TensorFlow. After a resume, steps that are done again replace the old ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class TensorBoard:
    """Scalars named `split/metric`: one event a line of the log, on its way to disk when `log` returns.

    The package's own SummaryWriter hands every scalar to a thread, which cost a small step ten times as much
    (measured), and a kill lost what was queued.
    """

    def __init__(self, directory: Path, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))
        if first_step > 1:  # a reader drops what it has from this step on
            self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=f"{split}/{name}", simple_value=value) for name, value in metrics.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()
