"""metrics.jsonl, the truth about metrics, and timing.jsonl, the truth about seconds: one JSON object a line.

metrics.jsonl holds no clock, and after a resume exactly what an uninterrupted run would hold: it is cut back to the
restored step, and what was cut is kept beside it. Each line reaches the system before the step's checkpoint does.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Jsonl:
    """Appends one line a (step, split), each on its way to disk when `write` returns.

    What a full disk does not take is told once, kept in memory and tried again with the next line.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out, self._name, self._tell = path.open("ab", buffering=0), path.name, tell
        self._waiting, self._failing = b"", False

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.write({"step": step, "split": split, **metrics})

    def write(self, record: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(record).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Whether every line so far is in the file."""
        size = os.fstat(self._out.fileno()).st_size
        try:
            count = self._out.write(self._waiting) or 0
            if count < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._out.fileno(), size)  # no torn line: all of it comes later
            if not self._failing:
                self._tell(f"warning: {self._name} cannot be written ({error.strerror}); its lines wait in memory")
            self._failing = True
            return False
        self._waiting, self._failing = b"", False
        return True

    def close(self) -> None:
        self._out.close()


def cut(path: Path, step: int, aside: Path) -> None:
    """Drop the lines after `step` from a log, and a torn last line; keep them in `aside`."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    if len(kept) == len(lines):
        return
    dropped = [line for line in lines if not line.endswith(b"\n") or json.loads(line)["step"] > step]
    with aside.open("ab") as out:
        out.writelines(line.rstrip(b"\n") + b"\n" for line in dropped)
    fresh = path.with_name(f".{path.name}")
    fresh.write_bytes(b"".join(kept))
    fresh.replace(path)
