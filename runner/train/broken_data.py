"""Examples that cannot be decoded: found early, remembered in data.json, and told once. No jax."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data import Data, Hub, Images, Parquet
from data.bad_examples import SkippedExample, iter_skipping
from data.data_errors import UndecodableError, UnreadableError
from data.fingerprint import identify_file
from data.image_folders import EVAL_PREFIX
from data.images import EncodedImages
from data.sources import Source, Sources
from runner.errors import ConfigError
from runner.rundir.layout import RunDir
from runner.text import mask_unprintable
from runner.train.dataset import read_data_record, write_data_record
from runner.values import Say

# So long, at most, examples are decoded before training, in an order that lies all over them. What is decoded is kept
# for training where there is room.
LOOKED_AT_SECONDS = 1.0
EXAMPLES_AT_ONCE = 8

# How a failure is told that such an example is the reason of.
DATA_BROKE = "the data broke while training"

# The main thread, and one that makes batches ahead or evaluates, may pass over examples at the same time.
_writing = threading.Lock()


def look_at_examples(run: RunDir, sources: Sources) -> None:
    """Decode some examples of each source before training. Raises ConfigError, remembering the file that is broken."""
    sides = (sources.train, sources.eval, *sources.held_out.values())
    every = [source for source in sides if _is_decoded(source) and len(source)]
    try:
        for source in every:
            _decode_some(source, LOOKED_AT_SECONDS / len(every))
    except UndecodableError as error:
        remember_broken(run, sources, error)
        raise ConfigError(f"data: {error}") from None
    except UnreadableError as error:
        raise ConfigError(f"data: {error}") from None


def _is_decoded(source: Source) -> bool:
    """Tell whether examples are decoded when they are taken, which fails where one is torn."""
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    return isinstance(source, EncodedImages)


def _decode_some(source: Source, seconds: float) -> None:
    until = time.monotonic() + seconds
    order = np.random.default_rng(0).permutation(len(source))
    for start in range(0, len(order), EXAMPLES_AT_ONCE):
        if time.monotonic() >= until:
            return
        source.take(order[start : start + EXAMPLES_AT_ONCE])


def remember_broken(run: RunDir, sources: Sources, error: UnreadableError) -> None:
    """Note in data.json which file could not be decoded: the run may go on when exactly that one was mended."""
    name = getattr(error, "file", None)
    entry = sources.files.get(name) if name else None
    if name is None or entry is None:
        return
    with _writing:
        document = read_data_record(run)
        if document is not None and name not in document.get("broken", {}):
            write_data_record(run, {**document, "broken": {**document.get("broken", {}), name: entry}})


def is_mended(run: RunDir, option: Data, why: str) -> bool:
    """Tell whether what made training fail, in the words `why`, is mended or passed over now.

    Then failures of before say nothing about what comes. Raises OSError where data.json cannot be read.
    """
    if not why.startswith(DATA_BROKE) or not isinstance(option, Images | Hub | Parquet):
        return False
    broken = (read_data_record(run) or {}).get("broken", {})
    return option.on_bad == "skip" or any(_is_changed(option, name, entry) for name, entry in broken.items())


def _is_changed(option: Images | Hub | Parquet, name: str, entry: str) -> bool:
    """Tell whether a file is there with other content than the entry of a table of files says."""
    place = getattr(option, "eval_path", None) if name.startswith(EVAL_PREFIX) else option.path
    file = Path(place or option.path).expanduser() / name.removeprefix(EVAL_PREFIX)
    try:
        # Where a size alone is known, another size is another file.
        now = identify_file(file)
    except OSError:
        return False
    return now != entry and (not entry.endswith("-") or now.split()[0] != entry.split()[0])


def watch_skipped(run: RunDir, sources: Sources, say: Say) -> None:
    """Pass over the examples that this run has passed over before, and remember and tell each new one.

    So the same are passed over for as long as the run lives, also where a file was mended in between.
    """
    recall_skipped(run, sources)
    for name, source in iter_skipping(sources):
        source.listen(partial(_remember_skipped, run, sources, name, say))


def tell_skipped(run: RunDir, sources: Sources, say: Say) -> None:
    """Pass over the examples that a run has passed over, and tell each new one; the run stays as it is."""
    recall_skipped(run, sources)
    for name, source in iter_skipping(sources):
        source.listen(partial(_tell_skipped, name, say))


def recall_skipped(run: RunDir, sources: Sources) -> None:
    """Pass over the examples that a run has passed over."""
    recorded = (read_data_record(run) or {}).get("skipped", {})
    for name, source in iter_skipping(sources):
        source.remember(_parse_skipped(recorded.get(name, {}), len(source)))


def _parse_skipped(recorded: dict[str, Any], size: int) -> dict[int, SkippedExample]:
    """Return the examples that a record names, by their number; what is no number of an example is left out."""
    numbers = {int(index): entry for index, entry in recorded.items() if index.isascii() and index.isdecimal()}
    return {
        number: SkippedExample(number, entry.get("why", ""), entry.get("file"))
        for number, entry in numbers.items()
        if number < size
    }


def _remember_skipped(run: RunDir, sources: Sources, name: str, say: Say, example: SkippedExample) -> None:
    """Write an example that is passed over into data.json, and tell it."""
    file = {} if example.file is None else {"file": example.file}
    entry = {"why": _shorten_reason(example), **file}
    with _writing:
        document = read_data_record(run)
        if document is not None:
            skipped = document.get("skipped", {})
            skipped = {**skipped, name: {**skipped.get(name, {}), str(example.index): entry}}
            broken = document.get("broken", {})
            if example.file is not None and example.file in sources.files:
                broken = {**broken, example.file: sources.files[example.file]}
            write_data_record(run, {**document, "skipped": skipped, "broken": broken})
    _tell_skipped(name, say, example)


def _tell_skipped(name: str, say: Say, example: SkippedExample) -> None:
    why = mask_unprintable(_shorten_reason(example))
    say(f"warning: {why}; another example takes its place in {name} (data.on_bad=skip)")


def _shorten_reason(example: SkippedExample) -> str:
    # What could be done instead is said behind it.
    return example.why.partition("; ")[0]
