"""Write files so that a kill or a power loss leaves the old content or the new one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from runner.types import JsonObject


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file in one move: a reader sees the old content or the new one, and nothing between.

    Without `durable` the kernel writes it back when it likes: a kill loses nothing, a power loss may.
    Raises OSError; then the old content stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same temporary name: what a kill leaves behind is overwritten by the next call. Each file has one
    # writer, so that two of them cannot meet there.
    fresh = path.with_name(f".{path.name}")
    with fresh.open("wb") as out:
        out.write(content if isinstance(content, bytes) else content.encode())
        out.flush()
        # Before the rename: some file systems make the new name durable first, and the file would be empty.
        if durable:
            os.fsync(out.fileno())
    fresh.replace(path)


def append_json_line(path: Path, record: JsonObject) -> None:
    """Append one JSON line, durably. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(record) + "\n")
        out.flush()
        os.fsync(out.fileno())


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a directory, survive a power loss. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
