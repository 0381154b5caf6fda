"""Which sinks lack lines of metrics.jsonl when a run ends: written down beside it, so that they can be mended later."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from runner import files

LACKING_FILE = "lacking.json"


@dataclass(frozen=True)
class LackingSinks:
    """The names of the sinks that lack lines; `logs` is the folder of the run's logs."""

    logs: Path
    names: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, logs: Path) -> LackingSinks:
        """Return what the file says; no sink where there is none, or where it cannot be read."""
        with suppress(OSError):
            found = (files.read_json_object(logs / LACKING_FILE) or {}).get("lacking")
            return cls(logs, {name for name in found if isinstance(name, str)} if isinstance(found, list) else set())
        return cls(logs)

    def write(self) -> None:
        """Write the file, or remove it where no sink lacks any line; a disk that does not take it is not told."""
        with suppress(OSError):
            if self.names:
                files.replace_file(self.logs / LACKING_FILE, json.dumps({"lacking": sorted(self.names)}) + "\n")
            else:
                files.remove_file(self.logs / LACKING_FILE)
