"""Data that lies elsewhere than where a run was begun with it: known again by its content, whatever it is called now.

A fingerprint is of contents and of names below the place. Where the place is a single file, or a name on the hub, it is
itself such a name; so a file that was only renamed is compared under the name that the run knows it by. No jax.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data import Data
from data.compressed import strip_ending
from data.sources import Sources
from runner.config.identity import PLACE_KEYS, find_places
from runner.config.read_yaml import decode_text, parse_yaml
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.files import read_file
from runner.rundir.layout import RunDir
from runner.train.dataset import read_data_record, read_sources

# A configuration of ours has 5 kB.
MAX_CONFIG_BYTES = 1 << 20
# What was read last, with the option that it was read for: the search for a run reads what its training needs then.
_last_read: list[tuple[Data, Sources]] = []


def read_places(run: RunDir) -> dict[str, Any]:
    """Return where a run was begun with its data; empty where its config.yaml names no place, or is none.

    Only the block of the data is parsed: a folder may hold thousands of runs. Raises OSError where it cannot be read.
    """
    content = read_file(run.config, MAX_CONFIG_BYTES)
    # Up to the next key: what is not indented begins it.
    found = re.search(rb"^data:.*\n(?:[ #].*\n|\n)*", content, re.MULTILINE)
    return dict(_parse_places(found[0])) if found else {}


@functools.lru_cache(maxsize=64)
def _parse_places(block: bytes) -> tuple[tuple[str, Any], ...]:
    """Return the places in the block of a configuration that is about data, by key. Most runs have the same."""
    try:
        document = parse_yaml(decode_text(block))
    except ValueError:
        return ()
    return tuple(find_places(document).items()) if isinstance(document, dict) else ()


def holds_same_data(run: RunDir, places: Mapping[str, Any], option: Data) -> bool:
    """Return whether the data of an option is what a run recorded, which was begun with its data at other places.

    Raises ConfigError where the data cannot be read.
    """
    return _name_as_recorded(run, places, option) is not None


def read_moved_data(config: Config, run: RunDir) -> Sources | None:
    """Return the data of a run that lies elsewhere than at its beginning, with the fingerprint and names of then.

    Returns None where it has not moved, or is other data: whoever compares it says what is different. Raises
    ConfigError where it cannot be read, OSError where the run cannot.
    """
    before = read_places(run) if run.config.exists() else {}
    if not before or before == find_places(config.document):
        return None
    return _name_as_recorded(run, before, config.data)


def is_same_content(before: Mapping[str, str], now: Mapping[str, str], renamed: Mapping[str, str]) -> bool:
    """Return whether two tables of files are the same but for the names of places, which are `renamed` now → then."""
    return bool(now) and before == {_rename(name, renamed): entry for name, entry in now.items()}


def _name_as_recorded(run: RunDir, before: Mapping[str, Any], option: Data) -> Sources | None:
    """Return the data of an option as a run recorded it; None where it is other data, or nothing was recorded."""
    record, sources = read_data_record(run), _read_once(option)
    if record is None:
        return None
    if record["fingerprint"] == sources.fingerprint:
        return sources
    renamed: dict[str, str] = {}
    for key in PLACE_KEYS:
        now = getattr(option, key.removeprefix("data."), None)
        if isinstance(now, str) and isinstance(before.get(key), str):
            # As the readers call what only is evaluated on.
            prefix = "" if key == "data.path" else f"{key.removeprefix('data.')}/"
            renamed |= {f"{prefix}{new}": f"{prefix}{old}" for new, old in _pair_names(now, before[key]).items()}
    if not renamed or not is_same_content(record.get("files", {}), sources.files, renamed):
        return None
    recorded = {"fingerprint": record["fingerprint"], "files": record["files"]}
    return replace(sources, **recorded, fingerprint_as_read=sources.fingerprint)


def _pair_names(now: str, then: str) -> dict[str, str]:
    """Return what a table of files may call a place now, each with what it called it then."""
    if Path(now).expanduser().is_dir():
        # It has names below it alone; but a dataset of the hub is called by its place.
        return {now: then}
    new, old = Path(now).name, Path(then).name
    # As it is, and without the ending of its compression.
    return {now: then, new: old, strip_ending(new): strip_ending(old)}


def _rename(name: str, renamed: Mapping[str, str]) -> str:
    # `PLACE, SPLIT` is how a dataset of the hub is called in a table of files.
    place, comma, rest = name.partition(", ")
    return f"{renamed.get(place, place)}{comma}{rest}"


def _read_once(option: Data) -> Sources:
    """Return the data of an option, from memory where it was read last. Raises ConfigError where it cannot be read."""
    if not (_last_read and _last_read[0][0] == option):
        _last_read.clear()
        try:
            _last_read.append((option, read_sources(option)))
        except OSError as error:
            raise ConfigError(f"data.path: {error.filename}: {error.strerror}") from None
    return _last_read[0][1]
