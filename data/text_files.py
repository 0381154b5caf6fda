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
    """Non-overlapping windows of `seq_len` tokens and the one after them, over one long run of tokens.

    Of text as bytes `documents` says where each document begins and ends, where somebody may ask for it.
    """

    corpus: Integer[np.ndarray, "tokens"]
    seq_len: int
    documents: Integer[np.ndarray, "documents 2"] | None = None

    def __len__(self) -> int:
        return max(len(self.corpus) - 1, 0) // self.seq_len

    def take(self, indices: Integer[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """Return the windows at `indices` as `tokens`, Integer[batch seq_len+1]."""
        positions = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return {"tokens": self.corpus[positions]}


@dataclass(frozen=True)
class TextRun:
    """Bytes of text in one run, and where each of the documents in it begins and ends.

    What is between two documents, as a line between rows, belongs to none of them.
    """

    content: Integer[np.ndarray, "bytes"]
    documents: Integer[np.ndarray, "documents 2"]

    def cut(self, at: int) -> tuple[TextRun, TextRun]:
        """Return what is before a byte, and the rest; a document that is cut is one on both sides."""
        first = np.minimum(self.documents, at)
        rest = np.maximum(self.documents, at) - at
        return (
            TextRun(self.content[:at], first[first[:, 0] < first[:, 1]]),
            TextRun(self.content[at:], rest[rest[:, 0] < rest[:, 1]]),
        )


def join_documents(documents: Iterable[bytes], between: bytes = b"\n") -> TextRun:
    """Return documents as one run, with `between` after each."""
    pieces, places, at = [], [], 0
    for document in documents:
        # A single piece is not copied.
        pieces += [document, between] if between else [document]
        places.append((at, at + len(document)))
        at += len(document) + len(between)
    return TextRun(np.frombuffer(b"".join(pieces), np.uint8), np.array(places, np.int64).reshape(-1, 2))


def _join_runs(runs: Iterable[TextRun]) -> TextRun:
    # Concatenating nothing is an error in numpy, hence an empty piece first.
    contents, places, at = [np.zeros(0, np.uint8)], [np.zeros((0, 2), np.int64)], 0
    for run in runs:
        contents.append(run.content)
        places.append(run.documents + at)
        at += len(run.content)
    return TextRun(np.concatenate(contents), np.concatenate(places))


def read_stdlib(seq_len: int, eval_fraction: float) -> Sources:
    """Return every module of the standard library of this Python, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(_find_modules(root, SKIPPED_FOLDERS))
    texts = [
        NamedText(file.relative_to(root).as_posix().encode(), join_documents([file.read_bytes()], b""))
        for file in modules
    ]
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
    run: TextRun

    @property
    def content(self) -> bytes:
        """Return its bytes."""
        return self.run.content.tobytes()


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
        run = join_documents(documents, b"\n" if is_json_file(file, field) else b"")
        name = strip_ending(file.relative_to(root).as_posix()).encode(errors="surrogateescape")
        if name in loaded:
            raise ValueError(f"path={file} is there twice, once compressed and once not; choose with data.pattern")
        loaded[name] = NamedText(name, run)
    return list(loaded.values())


def _identify_texts(texts: Iterable[NamedText]) -> tuple[str, dict[str, str]]:
    """Return one hash of all texts in their order, and "SIZE HASH" of each by its name."""
    # Sizes are hashed too: text that moved from the end of one file to the beginning of the next is other data.
    whole, named = hashlib.sha256(), {}
    for text in texts:
        content = text.content
        whole.update(b"%d %s %d " % (len(text.name), text.name, len(content)))
        whole.update(content)
        named[os.fsdecode(text.name)] = identify_bytes(content)
    return whole.hexdigest(), named


def _draw_sides(texts: Iterable[NamedText], eval_fraction: float) -> tuple[list[TextRun], list[TextRun]]:
    """Return texts to train and to evaluate on. A side depends on the name alone, so new files move no old ones.

    Where the files are too few to fill both sides, the end of the whole text is for evaluation.
    """
    sides: tuple[list[TextRun], list[TextRun]] = ([], [])
    for text in texts:
        sides[draw_from_name(text.name) < eval_fraction].append(text.run)
    if not all(sides):
        joined = _join_runs([*sides[0], *sides[1]])
        first, rest = joined.cut(int(len(joined.content) * (1.0 - eval_fraction)))
        return [first], [rest]
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
    runs = {name: [text.run for text in texts] for name, texts in parts.items()}
    train, held_out = runs["train"], runs.get("eval")
    if held_out is None:
        train, held_out = _draw_sides(parts["train"], eval_fraction)
    sources = make_byte_sources(train, held_out, seq_len, fingerprint, files)
    if "test" not in parts:
        return sources
    test = make_byte_windows(_join_runs(runs["test"]), seq_len)
    size = f"{len(test.corpus) / 1e6:.1f} MB of test, never trained on"
    return replace(sources, held_out={"test": test}, summary=f"{sources.summary}; {size}")


def decode_bytes(tokens: Integer[np.ndarray, "seq"]) -> str:
    """Return bytes as the text that they are in UTF-8."""
    return np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")


def make_byte_windows(run: TextRun, seq_len: int) -> TokenWindows:
    """Return windows over bytes of text."""
    return TokenWindows(run.content, seq_len, run.documents)


def make_byte_sources(
    train: Iterable[TextRun],
    held_out: Iterable[TextRun],
    seq_len: int,
    fingerprint: str,
    files: Mapping[str, str],
) -> Sources:
    """Join pieces of bytes into one run to train and one to evaluate on."""
    train_windows, held_out_windows = (make_byte_windows(_join_runs(side), seq_len) for side in (train, held_out))
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
