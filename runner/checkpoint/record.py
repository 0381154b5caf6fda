"""One checkpoint on disk, as its sidecar describes it, and how checkpoints are found. Reads files only: no jax.

    checkpoints/<step>/state/         every array, as Orbax writes them
    checkpoints/<step>/progress/      a JSON value: position of the data, best score so far
    checkpoints/<step>/holdfast.json  the sidecar: why it was saved, what was measured, size and digest of every file
    checkpoints/<step>/pinned         an empty file: retention keeps it (`python -m runner pin`)

The sidecar ends with a checksum of its own bytes. It is the last file to be written before a checkpoint gets its name,
so a directory without one was never finished.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import xxhash

from runner.errors import RefusedError
from runner.types import JsonObject

FORMAT = 2  # the layout of a checkpoint directory; raised when an older reader would misread it
SIDECAR, PIN = "holdfast.json", "pinned"
STATE, PROGRESS = "state", "progress"
TRASH, WRITING = ".trash", ".writing"  # what is on its way out of, and into, `checkpoints/`
# Searched for at the end of the sidecar's bytes, so that what is checked is what lies on disk, not what was parsed.
_CHECKSUM = re.compile(rb',\n "xxh3": "([0-9a-f]{32})"\n}\n\Z')

Mode = Literal["min", "max"]
Mark = Literal["", "error"]


@dataclass(frozen=True)
class Score:
    """Define what "best" means: one metric, and whether less or more of it is better.

    Attributes:
        metric: what an evaluation measures, as `eval/loss` or `eval/accuracy`.
        mode: whether the least (`min`) or the most (`max`) is best.
    """

    metric: str = "eval/loss"
    mode: Mode = "min"

    def of(self, metrics: Mapping[str, float]) -> float | None:
        """Return the value to rank by, less is better; None where the metric is missing or not finite."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return value if self.mode == "min" else -value


@dataclass(frozen=True)
class Record:
    """Describe one committed checkpoint.

    Attributes:
        step: the completed updates it holds; also the name of its directory.
        reason: why it was saved, for people.
        metrics: what was measured at exactly this step.
        saved_unix_seconds: when the save was decided.
        pinned: whether a person has asked that it be kept.
        mark: "error" where it was left for people to look at; nothing resumes from a marked one unasked.
        stall_seconds: how long training waited for it.
        write_seconds: from the decision to save until it was sealed.
        num_bytes: the size of all its files, without the sidecar.
        format: the layout of its directory.
    """

    step: int
    reason: str
    metrics: Mapping[str, float]
    saved_unix_seconds: float
    pinned: bool = False
    mark: Mark = ""
    stall_seconds: float = 0.0
    write_seconds: float = 0.0
    num_bytes: int = 0
    format: int = FORMAT


FileFacts = JsonObject  # bytes: the size; xxh3: the checksum, where one was taken
FileTable = dict[str, FileFacts]  # by the name of the file, relative to the checkpoint


def encode_sidecar(record: Record, files: FileTable) -> bytes:
    """Return the content of the sidecar: the record, the files beside it, and a checksum of all that."""
    # Left out are what the file system says by itself (the pin), and what the table of files adds up to.
    document = {key: value for key, value in asdict(record).items() if key not in ("pinned", "num_bytes")}
    body = json.dumps({**document, "files": files}, indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "xxh3": "%s"\n}\n' % xxhash.xxh3_128(body).hexdigest().encode()


def read_sidecar(directory: Path, step: int | None = None) -> tuple[Record, FileTable]:
    """Return the record of a checkpoint directory, and its files.

    `step` is what it should hold, where the directory is not named after it.

    Raises:
        OSError: the sidecar is missing or cannot be read.
        ValueError: it is of another format, not what was written, or of another step.
        TypeError, KeyError: its fields are not those of the format.
    """
    content = (directory / SIDECAR).read_bytes()
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{SIDECAR} is not of format {FORMAT}")
    checksum = _CHECKSUM.search(content)
    if checksum is None or xxhash.xxh3_128(content[: checksum.start()]).hexdigest().encode() != checksum[1]:
        raise ValueError(f"{SIDECAR} is not what was written")
    del document["xxh3"]
    files: FileTable = document.pop("files")
    document["num_bytes"] = sum(file["bytes"] for file in files.values())
    document["pinned"] = (directory / PIN).exists()
    record = Record(**document)
    # A copied or renamed directory would put its state under a step that it is not of.
    if str(record.step) != (directory.name if step is None else str(step)):
        raise ValueError(f"{SIDECAR} belongs to step {record.step}")
    return record, files


def list_steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a directory, oldest first; whether one holds a good checkpoint is another matter."""
    if not checkpoints.is_dir():
        return []
    named = [path for path in checkpoints.iterdir() if is_step_name(path.name)]
    # A link is no checkpoint: what it leads to has a name of its own, and would be counted, or deleted, twice.
    return sorted(int(path.name) for path in named if path.is_dir() and not path.is_symlink())


def is_step_name(name: str) -> bool:
    """Tell whether a directory of this name would be a checkpoint: `1000`, not `01000`, `1000.tmp` or `best`."""
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def list_records(checkpoints: Path) -> list[Record]:
    """Return the record of every checkpoint that has a readable sidecar, oldest first."""
    records = []
    for step in list_steps(checkpoints):
        try:
            records.append(read_sidecar(checkpoints / str(step))[0])
        except (OSError, ValueError, TypeError, KeyError):
            # Not a checkpoint, or a damaged one: restoring sets it aside and says so; nothing is said twice.
            continue
    return records


def newest_durable_step(checkpoints: Path) -> int:
    """Return the newest step that a restart would use, by a look at the disk; 0 where there is none."""
    return next((record.step for record in reversed(list_records(checkpoints)) if not record.mark), 0)


def newest_save_seconds(checkpoints: Path) -> float | None:
    """Return how long the newest checkpoint took to write; None where there is none."""
    return next((record.write_seconds for record in reversed(list_records(checkpoints)) if record.write_seconds), None)


def find_best(records: Iterable[Record], score: Score) -> Record | None:
    """Return the best record by score, the newest among equals; None where none ranks. What is marked never ranks."""
    best: tuple[float, Record] | None = None
    for record in records:
        value = None if record.mark else score.of(record.metrics)
        if value is not None and (best is None or (value, -record.step) < (best[0], -best[1].step)):
            best = value, record
    return best[1] if best else None


def read_progress(directory: Path) -> JsonObject:
    """Return the JSON value saved beside the state: position of the data, its fingerprint, the best score so far."""
    return json.loads((directory / PROGRESS / "metadata").read_bytes())


def _names_a_step(reference: str) -> bool:
    """Tell whether an @ separates a run from a step: a directory may have one in its name."""
    return "@" in reference and not Path(reference).expanduser().is_dir()


def locate_checkpoint(reference: str) -> Path:
    """Return the directory of the checkpoint that `RUN`, `RUN@STEP`, `RUN@best` or `RUN@newest` names.

    Raises RefusedError where there is none.
    """
    run_dir, _, which = reference.rpartition("@") if _names_a_step(reference) else (reference, "", "newest")
    checkpoints = Path(run_dir).expanduser() / "checkpoints"
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
            f"{reference}: no checkpoints are in {run_dir}; name a run as outputs/NAME/RUN, with @STEP or @best"
        )
    raise RefusedError(f"{run_dir} has no checkpoint '{which}'; {there}; say @STEP, @best or @newest")
