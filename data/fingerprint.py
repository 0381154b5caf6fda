"""What makes data the same data: the size and the content of each file, short enough to write down and compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

# Up to here every byte of a file is read: a tenth of a second.
WHOLE_BYTES = 256 * 2**20
# Of a larger file, so many blocks of such a size.
SAMPLES, SAMPLE_BYTES = 256, 64 * 1024
MOST_LINES = 20_000


def identify_bytes(*parts: bytes | memoryview) -> str:
    """Return `SIZE HASH` of bytes that are in memory anyway."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return f"{sum(map(len, parts))} {digest.hexdigest()}"


def identify_file(path: Path) -> str:
    """Return `SIZE HASH` of a file: of all its bytes, or of 256 blocks all over it where it is large.

    Enough to notice a file that was made again: another tokenizer, order or version changes nearly every block. A
    single byte that changed in a large file is not noticed.
    """
    size = path.stat().st_size
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            for number in range(SAMPLES):
                file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return f"{size} {digest.hexdigest()}"


def hash_files(files: Mapping[str, str], *more: object) -> str:
    """Return one hash of all files (name → `SIZE HASH`), and of whatever else decides which examples there are."""
    return hashlib.sha256(json.dumps([sorted(files.items()), *map(str, more)]).encode()).hexdigest()


def fold_into_folders(files: Mapping[str, str]) -> dict[str, str]:
    """Return the files as at most 20,000 lines or so: where there are more files, one line for each folder.

    The line of a folder has the sum of the sizes, and a hash of the names and contents.
    """
    if len(files) <= MOST_LINES:
        return dict(files)
    folders: dict[str, list[tuple[str, str]]] = {}
    for name, content in sorted(files.items()):
        folders.setdefault(f"{Path(name).parent.as_posix()}/", []).append((name, content))
    return {folder: _identify_folder(inside) for folder, inside in folders.items()}


def _identify_folder(files: Iterable[tuple[str, str]]) -> str:
    size, digest = 0, xxhash.xxh3_64()
    for name, content in files:
        size += int(content.split()[0])
        digest.update(f"{name} {content}\n".encode())
    return f"{size} {digest.hexdigest()}"


def draw_from_name(name: bytes) -> float:
    """Return a number in [0, 1) that depends on a name alone.

    It decides whether a file is to train or to evaluate on; files that are added later leave it where it is.
    """
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
