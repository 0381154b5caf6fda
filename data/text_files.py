"""Text as bytes: Python's standard library, or files of the user's."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from data.fingerprint import draw_from_name, identify_bytes
from data.sources import NUM_BYTES, Sources

# Folders of the standard library that are no part of it, or no text that anybody wrote to be read.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class TokenWindows:
    """Non-overlapping windows of `seq_len` tokens and the one after them, over one long run of tokens."""

    corpus: Integer[np.ndarray, "tokens"]
    seq_len: int

    def __len__(self) -> int:
        return max(len(self.corpus) - 1, 0) // self.seq_len

    def take(self, indices: Integer[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """Return the windows at `indices` as `tokens`, Integer[batch seq_len+1]."""
        positions = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return {"tokens": self.corpus[positions]}


def read_stdlib(seq_len: int, eval_fraction: float) -> Sources:
    """Return every module of the standard library of this Python, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _split_by_file(root, sorted(_find_modules(root, SKIPPED_FOLDERS)), seq_len, eval_fraction)


def _find_modules(root: Path, skip: set[str]) -> Iterator[Path]:
    """Yield every module below a folder, but nothing in folders of the names `skip`."""
    for folder, folders, names in os.walk(root):
        # Changed in place, which keeps `os.walk` from entering them: installed packages are most of the tree.
        folders[:] = [name for name in folders if name not in skip]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def read_text(path: Path, pattern: str, seq_len: int, eval_fraction: float) -> Sources:
    """Return a file, or the files of a folder that match `pattern`, in the order of their names."""
    root = path if path.is_dir() else path.parent
    return _split_by_file(root, find_files(path, pattern), seq_len, eval_fraction)


def find_files(path: Path, pattern: str) -> list[Path]:
    """Return a file, or the files of a folder that match `pattern`, in the order of their names."""
    return sorted(file for file in path.glob(pattern) if file.is_file()) if path.is_dir() else [path]


def _split_by_file(root: Path, files: list[Path], seq_len: int, eval_fraction: float) -> Sources:
    """Train and evaluate on different files. A file's side depends on its name alone, so new files move no old ones.

    Where the files are too few to fill both sides, the end of the whole text is for evaluation.
    """
    # Sizes are hashed too: text that moved from the end of one file to the beginning of the next is other data.
    whole, named = hashlib.sha256(), {}
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for file in files:
        name, content = file.relative_to(root).as_posix().encode(), file.read_bytes()
        whole.update(b"%d %s %d " % (len(name), name, len(content)))
        whole.update(content)
        named[os.fsdecode(name)] = identify_bytes(content)
        sides[draw_from_name(name) < eval_fraction].append(np.frombuffer(content, np.uint8))
    if not all(sides):
        joined = np.concatenate([np.zeros(0, np.uint8), *sides[0], *sides[1]])
        cut = int(len(joined) * (1.0 - eval_fraction))
        sides = ([joined[:cut]], [joined[cut:]])
    return make_byte_sources(*sides, seq_len, whole.hexdigest(), named)


def decode_bytes(tokens: Integer[np.ndarray, "seq"]) -> str:
    """Return bytes as the text that they are in UTF-8."""
    return np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")


def make_byte_sources(
    train: Iterable[np.ndarray],
    held_out: Iterable[np.ndarray],
    seq_len: int,
    fingerprint: str,
    files: Mapping[str, str],
) -> Sources:
    """Join pieces of bytes into one run to train and one to evaluate on."""
    # Concatenating nothing is an error in numpy, hence an empty piece first.
    empty = np.zeros(0, np.uint8)
    train_windows, held_out_windows = (
        TokenWindows(np.concatenate([empty, *side]), seq_len) for side in (train, held_out)
    )
    sizes = f"{len(train_windows.corpus) / 1e6:.1f} + {len(held_out_windows.corpus) / 1e6:.1f}"
    number = f"{len(files)} file{'' if len(files) == 1 else 's'}"
    return Sources(
        train_windows,
        held_out_windows,
        (seq_len,),
        NUM_BYTES,
        fingerprint,
        f"{sizes} MB of text (train + eval) in {number}",
        decode_bytes,
        files=files,
    )
