"""RUN/profile/FIRST-LAST: a trace with profile.json, what it says. It gets its name when it is whole.

Until then it has a hidden name: a process that is killed in the middle of it leaves nothing that could be taken for a
trace, and the next attempt takes it away. A record of somebody else's may hold anything: what is read has the types
that readers expect, or it is as if it were not there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.files import format_json, make_folder, read_json_object, remove_tree, rename_path, replace_file, sync_path
from runner.profiling.operations import KINDS, Kind
from runner.profiling.trace_summary import MOST_NAME_CHARS, MOST_OPERATIONS, Operation, TraceSummary
from runner.profiling.window import Window
from runner.rundir.side_files import is_count, is_number
from runner.text import format_duration, format_percent, shorten
from runner.types import JsonObject

RECORD = "profile.json"
HIDDEN = ".tracing"
WHOLE = re.compile(r"\d{1,16}-\d{1,16}(\.\d{1,4})?")
# What a person is told of the shares, in this order.
WORDS = {
    "matmul": "matrix products",
    "copy": "copies",
    "collective": "collectives",
    "other": "other work",
    "idle": "idle",
}
MOST_RECORDS = 100


@dataclass(frozen=True)
class ProfileRecord:
    """What profile.json says.

    Attributes:
        window: the steps that were traced.
        hardware: the devices of the run.
        summary: what the trace says; None where it could not be read.
        problem: why not.
        folder: where it lies, beside its trace.
    """

    window: Window
    hardware: str
    summary: TraceSummary | None
    problem: str
    folder: Path

    def describe(self) -> str:
        """Return one line: `steps 100 to 104, 42 ms a step: matrix products 61 %, …, idle 12 %`."""
        if self.summary is None:
            return f"{self.window}: {self.problem}"
        count = self.window.last - self.window.first + 1
        shares = [f"{WORDS[name]} {format_percent(share, 1.0)}" for name, share in self.summary.shares.items() if share]
        return f"{self.window}, {format_pace(self.summary.seconds / count)} a step: {', '.join(shares)}"

    def document(self) -> JsonObject:
        """Return it as plain JSON values, as profile.json has it."""
        summary = None if self.summary is None else asdict(self.summary)
        return {
            "steps": [self.window.first, self.window.last],
            "asked": self.window.asked,
            "hardware": self.hardware,
            "problem": self.problem,
            **(summary or {}),
        }


def format_pace(seconds: float) -> str:
    """Return the time of a step: `41.3 ms`, `2.4 s`."""
    return format_duration(seconds) if seconds >= 1.0 else f"{1000 * seconds:.3g} ms"


def begin_record(profiles: Path) -> Path:
    """Make the hidden folder into which a trace is written, and return it; what is there goes. Raises OSError."""
    make_folder(profiles)
    remove_tree(profiles / HIDDEN)
    make_folder(profiles / HIDDEN)
    return profiles / HIDDEN


def remove_cut_short(profiles: Path) -> bool:
    """Remove what a killed process left of a trace; return whether there was something."""
    is_there = os.path.lexists(profiles / HIDDEN)
    if is_there:
        remove_tree(profiles / HIDDEN)
    return is_there


def publish_record(record: ProfileRecord) -> Path:
    """Write profile.json beside the trace in the hidden folder, and give that its name; return it. Raises OSError."""
    profiles = record.folder.parent
    replace_file(record.folder / RECORD, format_json(record.document(), indent=1) + "\n")
    for folder, _, names in os.walk(record.folder):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            sync_path(Path(path))
    name = f"{record.window.first}-{record.window.last}"
    # Steps that are done again after a kill may be traced again: what is there stays.
    taken = [each for each in (name, *(f"{name}.{count}" for count in range(2, 1000))) if (profiles / each).exists()]
    target = profiles / (name if not taken else f"{name}.{len(taken) + 1}")
    rename_path(record.folder, target)
    sync_path(profiles)
    return target


def list_profiles(profiles: Path) -> list[ProfileRecord]:
    """Return the traces of a run, in the order of their steps; what cannot be read is left out."""
    names: list[str] = []
    # A folder and no link to one: what it leads to is not of this run.
    with suppress(OSError):
        if not profiles.is_symlink():
            names = [entry.name for entry in os.scandir(profiles) if WHOLE.fullmatch(entry.name) and entry.is_dir()]
    found = []
    for name in sorted(names)[:MOST_RECORDS]:
        document = None
        with suppress(OSError):
            document = read_json_object(profiles / name / RECORD)
        if document is not None and (record := parse_record(document, profiles / name)):
            found.append(record)
    return sorted(found, key=lambda record: (record.window.first, record.window.last, record.folder.name))


def parse_record(document: JsonObject, folder: Path) -> ProfileRecord | None:
    """Return what profile.json says; None where its steps are none."""
    steps, asked = document.get("steps"), document.get("asked")
    if not isinstance(steps, list) or len(steps) != 2 or not all(map(is_count, steps)) or steps[0] > steps[1]:
        return None
    window = Window(steps[0], steps[1], asked if is_count(asked) else None)
    summary = _parse_summary(document)
    problem = "" if summary else shorten(str(document.get("problem") or "what it says cannot be read"), 300)
    return ProfileRecord(window, shorten(str(document.get("hardware", "")), 100), summary, problem, folder)


def _parse_summary(document: JsonObject) -> TraceSummary | None:
    values: list[Any] = [document.get(key) for key in ("seconds", "devices", "shares")]
    seconds, devices, shares = values
    if not is_number(seconds) or seconds < 0 or not is_count(devices) or not isinstance(shares, dict):
        return None
    if not all(_is_share(shares.get(name)) for name in WORDS):
        return None
    operations = document.get("operations")
    listed = operations[:MOST_OPERATIONS] if isinstance(operations, list) else []
    known = [found for each in listed if (found := _parse_operation(each))]
    return TraceSummary(float(seconds), devices, {name: float(shares[name]) for name in WORDS}, known)


def _parse_operation(found: Any) -> Operation | None:
    if not isinstance(found, Mapping):
        return None
    kind: Kind | None = next((kind for kind in KINDS if kind == found.get("kind")), None)
    values: list[Any] = [found.get(key) for key in ("seconds", "share", "count")]
    seconds, share, count = values
    if kind is None or not is_number(seconds) or not _is_share(share) or not is_count(count):
        return None
    return Operation(shorten(str(found.get("name", "")), MOST_NAME_CHARS), kind, float(seconds), float(share), count)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0.0 <= value <= 1.0
