"""One checkpoint on disk, as its sidecar describes it, and how checkpoints are found. Reads files only: no jax.

    checkpoints/<step>/state/         every array, as Orbax writes them
    checkpoints/<step>/progress/      a JSON value: position of the data, best score so far
    checkpoints/<step>/holdfast.json  the sidecar: why it was saved, what was measured, size and digest of every file
    checkpoints/<step>/pinned         an empty file: retention keeps it (`python -m runner pin`)

The sidecar ends with a checksum of its own bytes. It is the last file to be written before a checkpoint gets its name,
so a directory without one was never finished.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeGuard

import xxhash

from runner.errors import RefusedError, StorageError
from runner.files import format_json, parse_json, parse_nonfinite, read_file
from runner.log.sinks import LogDigest
from runner.text import display_path, shorten
from runner.types import JsonObject

# The layout of a checkpoint directory. A sidecar that gains a key keeps its number, for keys that are not known are
# passed over; where an older reader would misread it, the number is raised. 3 lists the arrays and the log: the readers
# of format 2 took a sidecar with any other key for a damaged one.
FORMAT = 3
READABLE_FORMATS = (2, 3)
MAX_SHOWN = 200  # characters of what was typed, in a message
YEAR_10000 = 253402300800  # in seconds since 1970: later than any clock says
SIDECAR, PIN = "holdfast.json", "pinned"
REASON = "reason.txt"  # why a checkpoint was set aside, in its directory under `quarantine/`
STATE, PROGRESS = "state", "progress"
# Where processes that hold a state among them talk of a save: process 0 says `{"into": …}` and `{"over": …}`, and each
# gives its report.
SAVE_CHANNEL = "written"
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
        log: what metrics.jsonl was up to this step; None where it is not known.
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
    log: LogDigest | None = None
    format: int = FORMAT


FileFacts = JsonObject  # bytes: the size; xxh3: the checksum, where one was taken
FileTable = dict[str, FileFacts]  # by the name of the file, relative to the checkpoint
ArrayTable = dict[str, str]  # by the name of the array, its type and shape: `float32[64, 33]` (LeafSpec in arrays.py)


class NewerFormatError(RefusedError):
    """Raised where a checkpoint is of a later format than this version reads: it may be good, so it stays."""


class Sidecar(NamedTuple):
    """Hold what a sidecar says.

    Attributes:
        record: of the checkpoint.
        files: every file beside it.
        arrays: every array that the state had; None where an older version wrote it, which did not list them.
    """

    record: Record
    files: FileTable
    arrays: ArrayTable | None


@dataclass(frozen=True)
class SavedPosition:
    """Say where training is at a checkpoint.

    Attributes:
        position: that of the data.
        data: the fingerprint of the data.
        best: the best evaluation so far: its metric, value and step; None where there was none.
        owes_evaluation: whether the evaluation of this step is still to be made.
    """

    position: JsonObject
    data: str
    best: JsonObject | None
    owes_evaluation: bool


def encode_sidecar(sidecar: Sidecar) -> bytes:
    """Return the content of the sidecar: the record, the arrays, the files beside it, and a checksum of all that."""
    # Left out are what the file system says by itself (the pin), and what the table of files adds up to.
    document = {key: value for key, value in asdict(sidecar.record).items() if key not in ("pinned", "num_bytes")}
    document |= {"arrays": sidecar.arrays, "files": sidecar.files}
    body = format_json(document, indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "xxh3": "%s"\n}\n' % xxhash.xxh3_128(body).hexdigest().encode()


def read_sidecar(directory: Path, step: int | None = None) -> Sidecar:
    """Return what the sidecar of a checkpoint directory says. Keys that it does not know are passed over.

    `step` is what it should hold, where the directory is not named after it.

    Raises:
        OSError: the sidecar is missing or cannot be read.
        ValueError: it is not what was written, its fields are not those of a format, or it is of another step.
        NewerFormatError: it is what was written, by a later version.
    """
    content = _read_own_file(directory, SIDECAR)
    checksum = _CHECKSUM.search(content)
    # First of all: only a document that is what was written says by itself which format it is of.
    if checksum is None or xxhash.xxh3_128(content[: checksum.start()]).hexdigest().encode() != checksum[1]:
        raise ValueError(f"{SIDECAR} is not what was written")
    document: Any = parse_json(content)
    number = document.get("format") if isinstance(document, dict) else None
    if _is_count(number) and number > FORMAT:
        raise NewerFormatError(
            f"{display_path(directory)}: was saved by a later version, in format {number:.6g}, and this one reads "
            f"formats up to {FORMAT}; go on with the later version"
        )
    if number not in READABLE_FORMATS or isinstance(number, bool):
        raise ValueError(f"{SIDECAR} is of no format that is known")
    sidecar = _parse_sidecar(document, pinned=(directory / PIN).exists())
    # A copied or renamed directory would put its state under a step that it is not of.
    if str(sidecar.record.step) != (directory.name if step is None else str(step)):
        raise ValueError(f"{SIDECAR} belongs to step {sidecar.record.step}")
    return sidecar


def _read_own_file(directory: Path, name: str) -> bytes:
    """Return the content of a file of a checkpoint, and never of what a link in it leads to. Raises OSError."""
    return read_file(Path(os.path.realpath(directory)) / name)


def _parse_sidecar(document: JsonObject, *, pinned: bool) -> Sidecar:
    """Return what a document says, every value of which was looked at. Raises ValueError where one is wrong.

    A checksum proves that it is what somebody wrote, and not who did.
    """
    files: Any = document.get("files")
    metrics: Any = document.get("metrics")
    arrays, log = document.get("arrays"), document.get("log")
    if isinstance(metrics, dict):
        metrics = {name: parse_nonfinite(value) for name, value in metrics.items()}
    stall, write = document.get("stall_seconds", 0.0), document.get("write_seconds", 0.0)
    wrong = {
        "step": not _is_count(document.get("step")),
        "reason": not isinstance(document.get("reason"), str),
        "metrics": not _is_table(metrics, _is_number),
        "saved_unix_seconds": not _is_time(document.get("saved_unix_seconds")),
        "mark": document.get("mark", "") not in ("", "error"),
        "stall_seconds": not _is_time(stall),
        "write_seconds": not _is_time(write),
        "log": log is not None and not _is_proof(log, checksum=True),
        "arrays": arrays is not None and not _is_table(arrays, lambda text: isinstance(text, str)),
        "files": not _is_table(files, _is_proof) or not all(map(_is_inside, files or ())),
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise ValueError(f"{SIDECAR}: {names[0]} is not what this version writes")
    record = Record(
        step=document["step"],
        reason=document["reason"],
        metrics=metrics,
        saved_unix_seconds=document["saved_unix_seconds"],
        pinned=pinned,
        mark=document.get("mark", ""),
        stall_seconds=stall,
        write_seconds=write,
        num_bytes=sum(facts["bytes"] for facts in files.values()),
        log=LogDigest(log["bytes"], log["xxh3"]) if log else None,
        format=document["format"],
    )
    return Sidecar(record, files, arrays)


def _is_count(value: object) -> TypeGuard[int]:
    """Tell whether a value is a count that a file system or a state can hold; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    """Tell whether a value is a number, finite or not; an integer of 400 digits is none that was measured."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63)


def _is_time(value: object) -> bool:
    """Tell whether a value is a number of seconds, or a time from 1970 to the year 9999."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < YEAR_10000


def _is_table(value: object, is_good: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_good, value.values()))


def _is_proof(value: object, *, checksum: bool = False) -> bool:
    """Tell whether a value is a size with a checksum; that may be missing where none is asked for."""
    if not isinstance(value, dict) or not _is_count(value.get("bytes")):
        return False
    digest = value.get("xxh3", None if checksum else "0" * 32)
    return isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest) is not None


def _is_inside(name: str) -> bool:
    """Tell whether a name of a file stays in the checkpoint's own directory."""
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and "\0" not in name


def list_steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a directory, oldest first; whether one holds a good checkpoint is another matter.

    Raises StorageError where the directory is there and cannot be listed: that is not the same as an empty one.
    """
    try:
        with os.scandir(checkpoints) as entries:
            # A link is no checkpoint: what it leads to has a name of its own, and would be counted, or deleted, twice.
            return sorted(
                int(entry.name) for entry in entries if is_step_name(entry.name) and entry.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:
        return []
    except OSError as error:
        # Nothing can have such a name.
        if error.errno == errno.ENAMETOOLONG:
            return []
        raise StorageError(f"{display_path(checkpoints)}: cannot be listed ({error.strerror})") from error


def is_step_name(name: str) -> bool:
    """Tell whether a directory of this name would be a checkpoint: `1000`, not `01000`, `1000.tmp` or `best`."""
    # Of 18 digits at most: no run is longer, and what is typed may be as long as it likes.
    return re.fullmatch("0|[1-9][0-9]{0,17}", name) is not None


def list_records(checkpoints: Path) -> list[Record]:
    """Return the record of every checkpoint that has a readable sidecar, oldest first.

    Raises StorageError where the directory cannot be listed.
    """
    records = []
    for step in list_steps(checkpoints):
        # Not a checkpoint, a damaged one, or one of a later version: restoring says so, and nothing is said twice.
        with suppress(OSError, ValueError, NewerFormatError):
            records.append(read_sidecar(checkpoints / str(step)).record)
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
    """Return the JSON value saved beside the state: position of the data, its fingerprint, the best score so far.

    Raises OSError where it cannot be read, and RefusedError where it is none.
    """
    try:
        progress = parse_json(_read_own_file(directory, f"{PROGRESS}/metadata"))
    except ValueError as error:
        raise RefusedError(f"{display_path(directory)}: its {PROGRESS} is no JSON ({error})") from None
    if not isinstance(progress, dict):
        raise RefusedError(f"{display_path(directory)}: its {PROGRESS} is no JSON object")
    return progress


def read_saved_position(directory: Path) -> SavedPosition:
    """Return where training is at a checkpoint, every value of which was looked at.

    Raises OSError where it cannot be read, and RefusedError where it is not what this version writes.
    """
    progress = read_progress(directory)
    data, position = progress.get("data"), progress.get("position")
    best, owes = progress.get("best"), progress.get("owes_evaluation", False)
    wrong = {
        "data": not isinstance(data, str),
        "position": not _is_position(position),
        "best": best is not None and not _is_best(best),
        "owes_evaluation": not isinstance(owes, bool),
    }
    if names := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise RefusedError(
            f"{display_path(directory)}: its {PROGRESS} has no {names[0]} that this version can go on from; "
            "choose another step"
        )
    assert isinstance(data, str)
    assert isinstance(position, dict)
    return SavedPosition(position, data, best, owes_evaluation=owes)


def _is_position(value: object) -> bool:
    """Tell whether a value is a position in the data: how many batches came before; examples are counted in 64 bits."""
    return isinstance(value, dict) and _is_count(next_index := value.get("next_index")) and next_index < 1 << 40


def _is_best(value: object) -> bool:
    """Tell whether a value names the best evaluation so far: its metric, the value and the step."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("metric"), str) and _is_number(value.get("value")) and _is_count(value.get("step"))


def locate_checkpoint(reference: str) -> Path:
    """Return the directory of the checkpoint that `RUN`, `RUN@STEP`, `RUN@best` or `RUN@newest` names.

    Raises RefusedError where there is none, and NewerFormatError where the newest is of a later version.
    """
    try:
        return _locate_checkpoint(reference)
    # A name that is too long for a file, a folder that may not be entered, `~` of a user that is not there.
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedError(f"{shorten(reference, MAX_SHOWN)}: cannot be looked at ({reason})") from None


def _locate_checkpoint(reference: str) -> Path:
    # A directory may have an @ in its name.
    names_step = "@" in reference and not Path(reference).expanduser().is_dir()
    run_dir, _, which = reference.rpartition("@") if names_step else (reference, "", "newest")
    checkpoints = Path(run_dir).expanduser() / "checkpoints"
    steps = [record.step for record in list_records(checkpoints) if not record.mark]
    if which == "newest" and steps:
        _refuse_newer_formats(checkpoints, steps[-1])
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
    _refuse_newer_formats(checkpoints, -1)
    raise RefusedError(
        f"{run_dir} has no checkpoint '{shorten(which, MAX_SHOWN)}'; {there}; say @STEP, @best or @newest"
    )


def _refuse_newer_formats(checkpoints: Path, step: int) -> None:
    """Raise NewerFormatError where a later version has saved what comes after a step."""
    for newer in list_steps(checkpoints):
        if newer > step:
            with suppress(OSError, ValueError):
                read_sidecar(checkpoints / str(newer))
