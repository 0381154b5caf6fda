"""Read the data of a run, record it once in data.json, and compare it whenever the run goes on. No jax."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from data import Data, Hub, Text
from data.bad_examples import SkippedExample, SkippingSource
from data.data_errors import UnreadableError
from data.fingerprint import fold_into_folders
from data.pipeline import NumberedBatches, ShuffledBatches, TrainingStream
from data.sources import Source, Sources, Table
from runner import files
from runner.checkpoint.trouble import PASSING_ERRNOS
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
    "examples": is_count,
    # The label, or the token, that is left out of losses and metrics, where there is one.
    "ignored": lambda value: type(value) is int,
    "classes": list_of(is_text),
    # Files that could not be decoded, each with its entry as it was then: they may be mended.
    "broken": object_of(is_text),
    # What the fingerprint was before files were mended: checkpoints of that time have it.
    "earlier": list_of(is_text),
    # The numbers of examples that are passed over, by source, each with what is wrong with it.
    "skipped": object_of(object_of(object_of(is_text))),
}
# One example is smaller than that.
MAX_EXAMPLE_BYTES = 1 << 30


def read_sources(option: Data) -> Sources:
    """Read what a data option stands for. Raises ConfigError where it cannot be read, or leaves a side empty."""
    try:
        sources = option.sources()
        # What a model is built for is the shape of the first example that is evaluated.
        if len(sources.eval):
            sources.eval.take(np.zeros(1, np.int64))
    except ValueError as error:
        if option.kind == "external":
            # Of the user's own code: whoever asked for the data says where it happened.
            raise
        raise ConfigError(f"data={option.kind}: {error}") from None
    except OSError as error:
        # A disk in trouble is no mistake in the command.
        if option.kind == "external" or error.errno in PASSING_ERRNOS:
            raise
        raise ConfigError(f"data={option.kind}: {_name_file(error)}; bring it back, or make it readable") from None
    for side, source in (("train", sources.train), ("evaluate", sources.eval)):
        if len(source) == 0:
            shorter = " a shorter data.seq_len," if option.gives == "tokens" else ""
            raise ConfigError(
                f"data={option.kind}: nothing is left to {side} on ({sources.summary}); give it more data,{shorter} or "
                "another data.eval_fraction"
            )
    return sources


def read_as_before(option: Data, run: RunDir) -> Sources | None:
    """Return the data of a run as it was read when it began, where the same option gives more today; None elsewhere.

    Raises ConfigError where it cannot be read.
    """
    if not isinstance(option, Hub | Text) or not option.list_earlier() or (record := read_data_record(run)) is None:
        return None
    sources = read_sources(option)
    if sources.fingerprint == record["fingerprint"]:
        return sources
    older = (read_sources(each) for each in option.list_earlier())
    return next((each for each in older if each.fingerprint == record["fingerprint"]), sources)


def _name_file(error: OSError) -> str:
    where = f"{mask_unprintable(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
    return f"{where}{error.strerror or error}"


def make_stream(
    option: Data, sources: Sources, seed: int, objective: str = "", rows: slice | None = None
) -> TrainingStream:
    """Return the training batches in their order, made as the option says.

    `objective` is what labels are for. Of each batch only `rows` are made; None: all.
    """
    if option.kind == "none":
        return TrainingStream(NumberedBatches())
    # As it is when a worker starts: what was passed over until then.
    skipped = sources.train.skipped if isinstance(sources.train, SkippingSource) else {}
    batches = ShuffledBatches(
        sources.train,
        batch_size=option.batch_size,
        seed=seed,
        augment=getattr(option, "augment", None) if option.gives == "images" else None,
        rows=rows,
        reopen=partial(_read_again, option, sources.fingerprint_as_read or sources.fingerprint, skipped, objective),
    )
    return TrainingStream(batches, workers=getattr(option, "workers", 0), prefetch=getattr(option, "prefetch", 0))


def _read_again(option: Data, fingerprint: str, skipped: Mapping[int, SkippedExample], objective: str) -> Source:
    """Read the training data once more, in a process that makes batches. Raises UnreadableError where it changed."""
    sources = option.sources()
    if sources.fingerprint != fingerprint and isinstance(option, Hub | Text):
        older = (each.sources() for each in option.list_earlier())
        sources = next((each for each in older if each.fingerprint == fingerprint), sources)
    if sources.fingerprint != fingerprint:
        raise UnreadableError(
            f"data={option.kind}: changed since training began ({sources.summary} now); bring it back"
        )
    if isinstance(sources.train, SkippingSource):
        sources.train.remember(skipped)
    return watch_labels(option, sources, objective).train


def watch_labels(option: Data, sources: Sources, objective: str) -> Sources:
    """Return sources whose labels are looked at batch by batch, where nobody could look at all of them beforehand."""
    if option.kind != "external":
        return sources
    from data.user_data import watch_user_labels

    return watch_user_labels(sources, objective)


def suggest_faster_data(option: Data) -> str:
    """Return what may help where training waits for data."""
    workers = getattr(option, "workers", 0)
    return "try data.workers=2" if not workers else f"try more than data.workers={workers}, or data.prefetch=4"


def record_or_compare(run: RunDir, sources: Sources) -> list[str]:
    """Write data.json for a run that has trained on nothing yet; else check that the data is the same.

    A file that could not be decoded may be another one now: then data.json says so from now on. Returns what a person
    is told. Raises RefusedError, naming the files that changed.
    """
    before = read_data_record(run)
    # As long as no state depends on it, the data may still be put right.
    if before is None or not run.holds_checkpoints():
        write_data_record(run, _describe_sources(sources))
        return []
    refuse_other_data(run, sources)
    if before["fingerprint"] == sources.fingerprint:
        return []
    now, mended = _describe_sources(sources), find_mended_files(before, sources)
    kept = {
        "earlier": [*before.get("earlier", []), before["fingerprint"]],
        "broken": {name: entry for name, entry in before["broken"].items() if name not in mended},
        "skipped": before.get("skipped", {}),
    }
    write_data_record(run, {**now, **kept})
    return [f"mended since: {_name_some(mended)}; going on with the same examples"]


def refuse_other_data(run: RunDir, sources: Sources) -> None:
    """Raise RefusedError, naming the files that changed, where this is not what the run was trained on."""
    before = read_data_record(run)
    if before is None or before["fingerprint"] == sources.fingerprint or find_mended_files(before, sources):
        return
    now = fold_into_folders({**sources.files, **_find_replaced(before, sources)})
    raise RefusedError(explain_refusal(run, sources.summary, describe_changes(before.get("files", {}), now)))


def find_mended_files(before: Mapping[str, Any], sources: Sources) -> list[str]:
    """Return the files that could not be decoded and were replaced; none where anything else changed as well."""
    replaced = _find_replaced(before, sources)
    same = fold_into_folders({**sources.files, **replaced}) == before.get("files", {})
    return sorted(replaced) if same else []


def _find_replaced(before: Mapping[str, Any], sources: Sources) -> dict[str, str]:
    """Return the entries, as they were, of files that could not be decoded and are there with other content now."""
    broken = before.get("broken", {})
    return {name: entry for name, entry in broken.items() if sources.files.get(name, entry) != entry}


def list_fingerprints(run: RunDir, sources: Sources) -> set[str]:
    """Return the fingerprints that a checkpoint of this run may have: of the data now, and before files were mended."""
    before = read_data_record(run) or {}
    return {sources.fingerprint, *before.get("earlier", [])}


def write_data_record(run: RunDir, document: Mapping[str, Any]) -> None:
    """Replace data.json, all of it or nothing."""
    files.replace_file(run.data, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


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
        "bring it back (for data=stdlib: the same Python; for a function of yours: the same seed in it), or start a "
        "new run"
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
    """Return sources that have the shape of a run's data, and one made-up example; None where data.json does not say.

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
                # One that is left out would be nothing to measure.
                fill = 1 if name in ("label", "tokens") and document.get("ignored") == 0 else 0
                fields[name] = np.full((1, *shape), fill, kind)
    # Less than all of them is no example.
    if fields.keys() != document["example"].keys():
        return None
    zeros, inputs = Table(fields), tuple(document["inputs"])
    summary, classes = document.get("summary", "unknown data"), tuple(document.get("classes", ()))
    made = Sources(zeros, zeros, inputs, document["num_outputs"], document["fingerprint"], summary, classes=classes)
    return replace(made, may_ignore=True, ignore_label=document["ignored"]) if "ignored" in document else made


def _describe_sources(sources: Sources) -> dict[str, Any]:
    example = sources.eval.take(np.zeros(1, np.int64))
    return {
        "example": {name: [str(value.dtype), *value.shape[1:]] for name, value in example.items()},
        "inputs": list(sources.inputs),
        "num_outputs": sources.num_outputs,
        "examples": len(sources.train),
        "classes": list(sources.classes),
        "fingerprint": sources.fingerprint,
        "summary": sources.summary,
        "files": fold_into_folders(sources.files),
        **({} if sources.ignored is None else {"ignored": sources.ignored}),
    }
