"""One checkpoint on disk, as its sidecar tells it. Reads files only: no jax.

    checkpoints/<step>/state/         every array, as Orbax writes them
    checkpoints/<step>/progress/      a JSON value: position of the data, best score so far
    checkpoints/<step>/holdfast.json  the sidecar: why it was saved, what was measured, size and digest of every file
    checkpoints/<step>/pinned         an empty file: retention keeps it (`python -m runner pin`)

The sidecar ends with a checksum of its own bytes. It is the last file to be written before a checkpoint gets its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from runner.errors import RefusedError

FORMAT = 2  # the layout of a checkpoint directory; raised when an older reader would misread it
SIDECAR, PIN = "holdfast.json", "pinned"
STATE, PROGRESS = "state", "progress"
TRASH, WRITING = ".trash", ".writing"  # what is on its way out of, and into, `checkpoints/`
_SEAL = re.compile(rb',\n "xxh3": "([0-9a-f]{32})"\n}\n\Z')

Mode = Literal["min", "max"]
Mark = Literal["", "error"]


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
    """One committed checkpoint. What is marked was left for people to look at: nothing resumes from it unasked."""

    step: int
    reason: str  # why it was saved
    metrics: Mapping[str, float]  # what was measured at exactly this step
    saved_unix_seconds: float
    pinned: bool = False
    mark: Mark = ""
    stall_seconds: float = 0.0  # training waited for it
    write_seconds: float = 0.0  # from the decision to save until it was sealed
    num_bytes: int = 0  # of all its files, without the sidecar
    format: int = FORMAT


FileFacts = dict[str, Any]  # bytes, and where it was taken xxh3 (in format 1: crc32)
FileTable = dict[str, FileFacts]  # by name


def encode_sidecar(record: Record, files: FileTable) -> bytes:
    """The sidecar's content: the record, the files beside it, and a checksum of all that."""
    document = {key: value for key, value in asdict(record).items() if key not in ("pinned", "num_bytes")}
    body = json.dumps({**document, "files": files}, indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "xxh3": "%s"\n}\n' % xxhash.xxh3_128(body).hexdigest().encode()


def read_sidecar(directory: Path) -> tuple[Record, FileTable]:
    """The record of a checkpoint directory and its files. Raises OSError or ValueError where it is not one."""
    content = (directory / SIDECAR).read_bytes()
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("format") not in (1, FORMAT):
        raise ValueError(f"{SIDECAR} is not of format 1 to {FORMAT}")
    if document["format"] > 1:
        seal = _SEAL.search(content)
        if seal is None or xxhash.xxh3_128(content[: seal.start()]).hexdigest().encode() != seal[1]:
            raise ValueError(f"{SIDECAR} is not what was written")
        del document["xxh3"]
    files: FileTable = document.pop("files")
    document["num_bytes"] = sum(file["bytes"] for file in files.values())
    document["pinned"] = (directory / PIN).exists()
    record = Record(**document)
    if str(record.step) != directory.name:
        raise ValueError(f"{SIDECAR} belongs to step {record.step}")
    return record, files


def list_steps(checkpoints: Path) -> list[int]:
    """Every directory that is named like a step, oldest first; whether it holds a good checkpoint is another matter.

    A link is none: what it leads to has a name of its own.
    """
    if not checkpoints.is_dir():
        return []
    named = [path for path in checkpoints.iterdir() if is_step_name(path.name)]
    return sorted(int(path.name) for path in named if path.is_dir() and not path.is_symlink())


def is_step_name(name: str) -> bool:
    """Whether a directory of this name would be a checkpoint: `1000`, not `01000`, `1000.tmp` or `best`."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def list_records(checkpoints: Path) -> list[Record]:
    """The records of every checkpoint that has a readable sidecar, oldest first."""
    records = []
    for step in list_steps(checkpoints):
        try:
            records.append(read_sidecar(checkpoints / str(step))[0])
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not a checkpoint of ours: restoring sets it aside and says so
    return records


def newest_durable_step(checkpoints: Path) -> int:
    """The newest step that a restart would use, by a look at the disk; 0 where there is none."""
    return next((record.step for record in reversed(list_records(checkpoints)) if not record.mark), 0)


def newest_save_seconds(checkpoints: Path) -> float | None:
    """How long the newest checkpoint took to write; None where there is none."""
    return next((record.write_seconds for record in reversed(list_records(checkpoints)) if record.write_seconds), None)


def find_best(records: Iterable[Record], score: Score) -> Record | None:
    """The best record by score, the newest among equals; None where none ranks. What is marked never ranks."""
    ranked = [
        (value, -record.step, record)
        for record in records
        if not record.mark and (value := score.of(record.metrics)) is not None
    ]
    return min(ranked, key=lambda entry: entry[:2])[2] if ranked else None


def read_progress(directory: Path) -> Any:
    """The JSON value saved beside the state: position of the data, its fingerprint, the best score so far."""
    return json.loads((directory / PROGRESS / "metadata").read_bytes())


def _names_a_step(reference: str) -> bool:
    """Whether an @ is ours: a directory may have one in its name."""
    return "@" in reference and not Path(reference).expanduser().is_dir()


def locate_checkpoint(reference: str) -> Path:
    """The directory of the checkpoint that `RUN`, `RUN@STEP`, `RUN@best` or `RUN@newest` names.

    Raises RefusedError where there is none.
    """
    place, _, which = reference.rpartition("@") if _names_a_step(reference) else (reference, "", "newest")
    checkpoints = Path(place).expanduser() / "checkpoints"
    steps = [record.step for record in list_records(checkpoints) if not record.mark]
    if which == "newest" and steps:
        return checkpoints / str(steps[-1])
    if which == "best" and (checkpoints / "best").is_dir():
        return (checkpoints / "best").resolve()
    if is_step_name(which) and (checkpoints / which).is_dir():
        return checkpoints / which
    there = f"it has {', '.join(str(step) for step in steps)}" if steps else "it has no checkpoint"
    if not checkpoints.is_dir():
        raise RefusedError(
            f"{reference}: no checkpoints are in {place}; name a run as outputs/NAME/RUN, with @STEP or @best"
        )
    raise RefusedError(f"{place} has no checkpoint '{which}'; {there}; say @STEP, @best or @newest")
