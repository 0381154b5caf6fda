"""Read the data of a run, record it once in data.json, and compare it whenever the run goes on. No jax."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from data import Data
from data.data_errors import UnreadableError
from data.fingerprint import fold_into_folders
from data.pipeline import ShuffledBatches, TrainingStream
from data.sources import Source, Sources, Table
from runner import files
from runner.errors import ConfigError, RefusedError
from runner.rundir.layout import RunDir
from runner.rundir.side_files import is_count, is_text, keep_typed, list_of, object_of
from runner.text import format_size, mask_unprintable, shorten

# A message names so many changed files, each by so many characters, and counts the rest.
MAX_NAMED_FILES, MAX_NAME_CHARS = 3, 120


def _is_field(value: Any) -> bool:
    """Tell whether a value is the type and the shape of one example: `["uint8", 8, 8, 3]`."""
    return isinstance(value, list) and bool(value) and is_text(value[0]) and all(map(is_count, value[1:]))


# The values of data.json. Somebody else may have written it; what is none of these is as if it were not there.
RECORD = {
    "fingerprint": is_text,
    "summary": is_text,
    "files": object_of(is_text),
    "example": object_of(_is_field),
    "inputs": list_of(is_count),
    "num_outputs": is_count,
}
# One example is smaller than that.
MAX_EXAMPLE_BYTES = 1 << 30


def read_sources(option: Data) -> Sources:
    """Read what a data option stands for. Raises ConfigError where it cannot be read, or leaves a side empty."""
    try:
        sources = option.sources()
    except ValueError as error:
        if option.kind == "external":
            # A bug in the user's own code: its traceback is what helps.
            raise
        raise ConfigError(f"data={option.kind}: {error}") from None
    for side, source in (("train", sources.train), ("evaluate", sources.eval)):
        if len(source) == 0:
            raise ConfigError(
                f"data={option.kind}: nothing is left to {side} on ({sources.summary}); give it more data, a shorter "
                "data.seq_len, or another data.eval_fraction"
            )
    return sources


def make_stream(option: Data, sources: Sources, seed: int) -> TrainingStream:
    """Return the training batches in their order, made as the option says."""
    batches = ShuffledBatches(
        sources.train,
        batch_size=option.batch_size,
        seed=seed,
        augment=getattr(option, "augment", None) if option.gives == "images" else None,
        reopen=partial(_read_again, option, sources.fingerprint_as_read or sources.fingerprint),
    )
    return TrainingStream(batches, workers=getattr(option, "workers", 0), prefetch=getattr(option, "prefetch", 0))


def _read_again(option: Data, fingerprint: str) -> Source:
    """Read the training data once more, in a process that makes batches. Raises UnreadableError where it changed."""
    sources = option.sources()
    if sources.fingerprint != fingerprint:
        raise UnreadableError(
            f"data={option.kind}: changed since training began ({sources.summary} now); bring it back"
        )
    return sources.train


def suggest_faster_data(option: Data) -> str:
    """Return what may help where training waits for data."""
    workers = getattr(option, "workers", 0)
    return "try data.workers=2" if not workers else f"try more than data.workers={workers}, or data.prefetch=4"


def record_or_compare(run: RunDir, sources: Sources) -> None:
    """Write data.json for a run that has trained on nothing yet; else check that the data is the same.

    Raises RefusedError, naming the files that changed.
    """
    # As long as no state depends on it, the data may still be put right.
    if read_data_record(run) is None or not run.holds_checkpoints():
        files.replace_file(run.data, json.dumps(_describe_sources(sources), indent=1, ensure_ascii=False) + "\n")
    else:
        refuse_other_data(run, sources)


def refuse_other_data(run: RunDir, sources: Sources) -> None:
    """Raise RefusedError, naming the files that changed, where this is not what the run was trained on."""
    before, now = read_data_record(run), _describe_sources(sources)
    if before is not None and before["fingerprint"] != now["fingerprint"]:
        raise RefusedError(
            explain_refusal(run, sources.summary, describe_changes(before.get("files", {}), now["files"]))
        )


def read_data_record(run: RunDir) -> dict[str, Any] | None:
    """Read data.json, values of the right types only.

    Returns None for a run that was killed before it had one, or where it is damaged. Raises OSError where it is there
    and cannot be read now, and RefusedError where it is no file at all.
    """
    try:
        document = keep_typed(files.read_json_object(run.data) or {}, RECORD)
    except OSError as error:
        if error.errno not in files.NOT_A_FILE:
            raise
        raise RefusedError(f"{run.data}: {error.strerror}; remove it, or bring back what the run wrote") from None
    # Each checkpoint has the fingerprint as well, so that nothing goes on with other data where this one is lost.
    return document if "fingerprint" in document else None


def explain_refusal(run: RunDir, summary: str, changes: str) -> str:
    """Return why a run cannot go on with this data, and the ways out."""
    what = changes or f"now: {summary}"
    return (
        f"{run}: the data is not what this run was trained on: {what}; "
        "bring it back (for data=stdlib: the same Python), or start a new run"
    )


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Compare two tables of files: `changed: cat/3.png (4.1 kB → 4.2 kB); 2 new; gone: b.txt`, or nothing."""
    changed = [
        f"{name} ({_describe_change(before[name], now[name])})"
        for name in before
        if name in now and now[name] != before[name]
    ]
    new, gone = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    groups = (("changed", changed), ("new", new), ("gone", gone))
    return "; ".join(f"{_count_several(len(names))}{what}: {_name_some(names)}" for what, names in groups if names)


def _count_several(count: int) -> str:
    return f"{count:,} " if count > 1 else ""


def _name_some(names: list[str]) -> str:
    rest = len(names) - MAX_NAMED_FILES
    shown = (shorten(mask_unprintable(name), MAX_NAME_CHARS) for name in names[:MAX_NAMED_FILES])
    return ", ".join(shown) + (f" and {rest:,} more" if rest > 0 else "")


def _read_entry_size(entry: str) -> int:
    """Return the bytes that an entry of a file table begins with; -1 where it does not."""
    digits = entry.partition(" ")[0]
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else -1


def _describe_change(before: str, now: str) -> str:
    """Compare two entries of a file table: `4.1 kB → 4.2 kB`, in bytes where that shows nothing."""
    old, new = _read_entry_size(before), _read_entry_size(now)
    if min(old, new) < 0:
        return "other content"
    if old == new:
        return f"still {format_size(new)}, other content"
    if format_size(old) == format_size(new):
        return f"{old:,} → {new:,} bytes"
    return f"{format_size(old)} → {format_size(new)}"


def sources_as_recorded(run: RunDir) -> Sources | None:
    """Return sources that have the shape of a run's data, and one example of zeros; None where data.json does not say.

    A model can be built from them on a machine that does not have the data.
    """
    document = read_data_record(run)
    if document is None or not document.keys() >= {"example", "inputs", "num_outputs"}:
        return None
    fields: dict[str, np.ndarray] = {}
    for name, (dtype, *shape) in document["example"].items():
        # TypeError, ValueError: of a name that is no type, and of too many dimensions.
        with suppress(TypeError, ValueError):
            kind = np.dtype(dtype)
            if kind.kind in "biufc" and math.prod(shape) * kind.itemsize <= MAX_EXAMPLE_BYTES:
                fields[name] = np.zeros((1, *shape), kind)
    # Less than all of them is no example.
    if fields.keys() != document["example"].keys():
        return None
    zeros, inputs = Table(fields), tuple(document["inputs"])
    return Sources(
        zeros, zeros, inputs, document["num_outputs"], document["fingerprint"], document.get("summary", "unknown data")
    )


def _describe_sources(sources: Sources) -> dict[str, Any]:
    example = sources.eval.take(np.zeros(1, np.int64))
    return {
        "example": {name: [str(value.dtype), *value.shape[1:]] for name, value in example.items()},
        "inputs": list(sources.inputs),
        "num_outputs": sources.num_outputs,
        "fingerprint": sources.fingerprint,
        "summary": sources.summary,
        "files": fold_into_folders(sources.files),
    }
