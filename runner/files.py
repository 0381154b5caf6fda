"""TODO docstring."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def replace(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old content or the new one, and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(
        f".{path.name}"
    )  # one name: what a kill leaves is overwritten by the next; a run has one writer
    with fresh.open("wb") as out:
        out.write(content if isinstance(content, bytes) else content.encode())
        out.flush()
        if durable:
            os.fsync(out.fileno())
    fresh.replace(path)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")
        out.flush()
        os.fsync(out.fileno())
