"""metrics.jsonl, the truth about metrics, and timing.jsonl, the truth about seconds: one JSON object a line.

metrics.jsonl holds no clock, and after a resume exactly what an uninterrupted run would hold: it is cut back to the
restored step, and what was cut is kept beside it. Each line reaches the system before the step's checkpoint does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Jsonl:
    """Appends one line a (step, split)."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out: TextIO = path.open("a", buffering=1)  # a line at a time: a kill tears none but the last

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        self.write({"step": step, "split": split, **metrics})

    def write(self, record: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(record) + "\n")

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
