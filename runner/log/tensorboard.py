"""TensorBoard, written without TensorFlow. After a resume the steps that are done again replace the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter


class TensorBoard:
    """Scalars named `split/metric`. The writer has a thread of its own: training does not wait for its files."""

    def __init__(self, directory: Path, first_step: int):
        purge = first_step if first_step > 1 else None
        # flush_secs=0: its thread flushes each event, so that a kill leaves no hole before the restored step.
        self._writer = SummaryWriter(str(directory), purge_step=purge, flush_secs=0)

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()
