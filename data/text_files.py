"""Text as bytes: Python's standard library, or files of the user's."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from data.compressed import strip_ending
from data.documents import USUAL_PATTERN, find_text_files, group_text_files, is_json_file, read_documents
from data.fingerprint import draw_from_name, hash_files, identify_bytes
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
    modules = sorted(_find_modules(root, SKIPPED_FOLDERS))
    texts = [NamedText(file.relative_to(root).as_posix().encode(), file.read_bytes()) for file in modules]
    return _split_by_file(texts, seq_len, eval_fraction)


def _find_modules(root: Path, skip: set[str]) -> Iterator[Path]:
    """Yield every module below a folder, but nothing in folders of the names `skip`."""
    for folder, folders, names in os.walk(root):
        # Changed in place, which keeps `os.walk` from entering them: installed packages are most of the tree.
        folders[:] = [name for name in folders if name not in skip]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


@dataclass(frozen=True)
class TextPlace:
    """Where text is: a file or a folder, which files of a folder, which field of JSON, and what to evaluate on.

    `field` is that of the text where files hold JSON. `eval_path` is another file or folder; None: a part of `path`.
    """

    path: Path
    pattern: str = USUAL_PATTERN
    field: str | None = None
    eval_path: Path | None = None


@dataclass(frozen=True)
class NamedText:
    """The text of a file by the name that decides its side: relative to its folder, as it was before compression."""

    name: bytes
    content: bytes


def read_text(place: TextPlace, seq_len: int, eval_fraction: float) -> Sources:
    """Return a file, or the files of a folder that match the pattern, in the order of their names.

    Files that their names call parts of a data set (`wiki.train.txt`, `valid/a.txt`) are these parts: `test` is held
    out. Raises ValueError where there is no text, or which file is to train on is not clear.
    """
    root = place.path if place.path.is_dir() else place.path.parent
    files, left_out = find_text_files(place.path, place.pattern)
    groups = group_text_files(files, root)
    if place.eval_path is not None:
        if groups is not None:
            raise ValueError(
                f"eval_path={place.eval_path} is one thing to evaluate on, and path={place.path} has parts of its own; "
                "leave data.eval_path out, or name in data.path what is to train on"
            )
        evaluated, _ = find_text_files(place.eval_path, place.pattern)
        eval_root = place.eval_path if place.eval_path.is_dir() else place.eval_path.parent
        held_out = _load_texts(eval_root, evaluated, place.field)
        # Both folders may have files of the same name.
        renamed = [replace(text, name=b"eval_path/" + text.name) for text in held_out]
        parts = {"train": _load_texts(root, files, place.field), "eval": renamed}
        return _add_left_out(_join_parts(parts, seq_len, eval_fraction), left_out)
    if groups is None:
        return _add_left_out(_split_by_file(_load_texts(root, files, place.field), seq_len, eval_fraction), left_out)
    parts = {str(name): _load_texts(root, group, place.field) for name, group in groups.items()}
    return _add_left_out(_join_parts(parts, seq_len, eval_fraction), left_out)


def _add_left_out(sources: Sources, left_out: str) -> Sources:
    """Return the sources with what is not read told to a person."""
    return replace(sources, summary=f"{sources.summary}; not read: {left_out}") if left_out else sources


def _load_texts(root: Path, files: Iterable[Path], field: str | None) -> list[NamedText]:
    """Return the texts of files. Raises ValueError where two are the same file, once compressed and once not."""
    loaded: dict[bytes, NamedText] = {}
    for file in files:
        documents = read_documents(file, field)
        # Between objects of JSON comes a line; a file of text stays as it is.
        content = b"".join(text + b"\n" for text in documents) if is_json_file(file, field) else documents[0]
        name = strip_ending(file.relative_to(root).as_posix()).encode(errors="surrogateescape")
        if name in loaded:
            raise ValueError(f"path={file} is there twice, once compressed and once not; choose with data.pattern")
        loaded[name] = NamedText(name, content)
    return list(loaded.values())


def _identify_texts(texts: Iterable[NamedText]) -> tuple[str, dict[str, str]]:
    """Return one hash of all texts in their order, and "SIZE HASH" of each by its name."""
    # Sizes are hashed too: text that moved from the end of one file to the beginning of the next is other data.
    whole, named = hashlib.sha256(), {}
    for text in texts:
        whole.update(b"%d %s %d " % (len(text.name), text.name, len(text.content)))
        whole.update(text.content)
        named[os.fsdecode(text.name)] = identify_bytes(text.content)
    return whole.hexdigest(), named


def _draw_sides(texts: Iterable[NamedText], eval_fraction: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return texts to train and to evaluate on. A side depends on the name alone, so new files move no old ones.

    Where the files are too few to fill both sides, the end of the whole text is for evaluation.
    """
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for text in texts:
        sides[draw_from_name(text.name) < eval_fraction].append(np.frombuffer(text.content, np.uint8))
    if not all(sides):
        joined = np.concatenate([np.zeros(0, np.uint8), *sides[0], *sides[1]])
        cut = int(len(joined) * (1.0 - eval_fraction))
        return [joined[:cut]], [joined[cut:]]
    return sides


def _split_by_file(texts: list[NamedText], seq_len: int, eval_fraction: float) -> Sources:
    """Return texts of which some files are to evaluate on."""
    fingerprint, named = _identify_texts(texts)
    return make_byte_sources(*_draw_sides(texts, eval_fraction), seq_len, fingerprint, named)


def _join_parts(parts: Mapping[str, list[NamedText]], seq_len: int, eval_fraction: float) -> Sources:
    """Return texts that come in parts: `train`, and perhaps `eval` and `test`."""
    identified = {name: _identify_texts(texts) for name, texts in sorted(parts.items())}
    files = {file: content for _, named in identified.values() for file, content in named.items()}
    fingerprint = hash_files({name: digest for name, (digest, _) in identified.items()}, "parts")
    as_arrays = {name: [np.frombuffer(text.content, np.uint8) for text in texts] for name, texts in parts.items()}
    train, held_out = as_arrays["train"], as_arrays.get("eval")
    if held_out is None:
        train, held_out = _draw_sides(parts["train"], eval_fraction)
    sources = make_byte_sources(train, held_out, seq_len, fingerprint, files)
    if "test" not in parts:
        return sources
    test = TokenWindows(np.concatenate([np.zeros(0, np.uint8), *as_arrays["test"]]), seq_len)
    size = f"{len(test.corpus) / 1e6:.1f} MB of test, never trained on"
    return replace(sources, held_out={"test": test}, summary=f"{sources.summary}; {size}")


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
