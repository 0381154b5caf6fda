"""One checkpoint on disk, as its sidecar tells it. Reads files only: no jax."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FORMAT = 1  # the layout of a checkpoint directory; raised when an older reader would misread it
SIDECAR = "holdfast.json"

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Score:
    """What "best" means: one metric, and whether less or more of it is better."""

    metric: str = "eval/loss"
    mode: Mode = "min"

    def of(self, metrics: Mapping[str, float]) -> float | None:
        """The value to rank by, less is better; None where the metric is missing or not finite: that never ranks."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return value if self.mode == "min" else -value


@dataclass(frozen=True)
class Record:
    """One committed checkpoint."""

    step: int
    reason: str  # why it was saved
    metrics: Mapping[str, float]  # what was measured at exactly this step
    saved_unix_seconds: float
    pinned: bool = False
    format: int = FORMAT


def dump(record: Record, files: Mapping[str, object]) -> bytes:
    """The sidecar's content: the record, and the digests of the files beside it."""
    return json.dumps({**asdict(record), "files": files}, indent=1).encode()


def load(directory: Path) -> tuple[Record, dict[str, object]]:
    """The record of a checkpoint directory and its digests. Raises OSError or ValueError where it is not one."""
    document = json.loads((directory / SIDECAR).read_bytes())
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{SIDECAR} has not format {FORMAT}")
    files = document.pop("files")
    record = Record(**document)
    if str(record.step) != directory.name:
        raise ValueError(f"{SIDECAR} belongs to step {record.step}")
    return record, files


def steps_in(checkpoints: Path) -> list[int]:
    """Every directory that is named like a step, oldest first; whether it holds a good checkpoint is another matter."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal() and path.is_dir())


def records_in(checkpoints: Path) -> list[Record]:
    """The records of every checkpoint that has a readable sidecar, oldest first."""
    records = []
    for step in steps_in(checkpoints):
        try:
            records.append(load(checkpoints / str(step))[0])
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not a checkpoint of ours: restoring sets it aside and says so
    return records


def best_of(records: Iterable[Record], score: Score) -> Record | None:
    """The best record by score, the newest among equals; None where none ranks."""
    ranked = [(value, -record.step, record) for record in records if (value := score.of(record.metrics)) is not None]
    return min(ranked)[2] if ranked else None
