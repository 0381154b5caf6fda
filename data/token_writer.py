"""Text files become token files, in parallel: the same bytes whatever the number of processes.

A file is a document; of JSON, each object is one. The side of a file (train or eval) depends on its name alone, as for
data=text; where that leaves a side empty, the last files are for evaluation, or the end of the only one.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.compressed import strip_ending
from data.documents import find_text_files, group_text_files, read_documents
from data.encodings import TOKENIZER, Encoding, EncodingChoice
from data.fingerprint import draw_from_name, identify_file
from data.orphans import end_with_parent
from data.safe_path import leave_safe_path, safe_path_for_children
from data.splits import Split
from data.token_files import HEADER, SIDES, TokenFile, TokenHeader, choose_dtype

# Is told how many files are done, and how many tokens they gave.
Progress = Callable[[int, int], None]

# The encoding of a worker process: loaded once, used for every document.
_worker_encoding: Encoding | None = None


@dataclass(frozen=True)
class Document:
    """A file, and the name that decides its side, unless the name says which part of a data set it is.

    `field` is that of the text where the file holds JSON.
    """

    file: Path
    name: str
    field: str | None = None
    part: Split | None = None


@dataclass
class SideCount:
    """What has been written of one side."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0


@dataclass(frozen=True)
class EncodedFile:
    """The tokens of each document of a file, and their size as text in bytes."""

    documents: list[np.ndarray]
    text_bytes: int


def find_documents(paths: list[Path], pattern: str, field: str | None = None) -> list[Document]:
    """Return every file that was named or lies in a folder that was named, with the part that its name says it is.

    Raises ValueError where there is none, or which are to train on is not clear.
    """
    found: list[Document] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: does not exist")
        root = path if path.is_dir() else path.parent
        for file in find_text_files(path, pattern)[0]:
            found.append(Document(file, strip_ending(file.relative_to(root).as_posix()), field))
    groups = group_text_files([Path(document.name) for document in found], Path())
    if groups is None:
        return found
    parts = {name.as_posix(): part for part, names in groups.items() for name in names}
    return [replace(document, part=parts[document.name]) for document in found]


def write_token_files(
    documents: list[Document],
    target: Path,
    choice: EncodingChoice,
    *,
    eval_fraction: float,
    workers: int,
    progress: Progress,
) -> TokenHeader:
    """Write the folder `target`, all of it or nothing. Raises ValueError where something stands in the way.

    `progress` is called after each document.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: is there already, and not empty; name a new directory")
    encoding = choice.load()
    # Beside the target, so that the rename is within one file system; by process, so that two of them do not meet.
    fresh = target.parent / f".{target.name}.{os.getpid()}"
    fresh.mkdir(parents=True)
    try:
        encoded = _encode_documents(documents, encoding, choice, workers)
        header = _write_sides(documents, encoded, fresh, encoding, eval_fraction, progress)
        (fresh / HEADER).write_text(header.to_json())
        if encoding.file is not None:
            shutil.copyfile(encoding.file, fresh / TOKENIZER)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return header


def _write_sides(
    documents: list[Document],
    encoded: Iterator[EncodedFile],
    folder: Path,
    encoding: Encoding,
    eval_fraction: float,
    progress: Progress,
) -> TokenHeader:
    """Write the tokens of each document to the file of its side, and return what is said about the two files."""
    dtype, counts = choose_dtype(encoding.vocab_size), {side: SideCount() for side in SIDES}
    end = np.array([] if encoding.eos is None else [encoding.eos], dtype)
    sides = _choose_sides(documents, eval_fraction)
    with ExitStack() as opened:
        out = {side: opened.enter_context((folder / f"{side}.bin").open("wb")) for side in SIDES}
        for number, (side, file) in enumerate(zip(sides, encoded, strict=True), 1):
            count = counts[side]
            for tokens in file.documents:
                row = np.concatenate([tokens.astype(dtype), end])
                out[side].write(row.tobytes())
                count.tokens += len(row)
            count.documents += len(file.documents)
            count.text_bytes += file.text_bytes
            progress(number, sum(count.tokens for count in counts.values()))
    if len(documents) == 1:
        _move_end_to_eval(folder, counts, eval_fraction, dtype.itemsize)
    train, held_out = (
        TokenFile(
            counts[side].tokens, counts[side].documents, counts[side].text_bytes, identify_file(folder / f"{side}.bin")
        )
        for side in SIDES
    )
    return TokenHeader(encoding.name, encoding.vocab_size, encoding.eos, train, held_out)


def _choose_sides(documents: list[Document], eval_fraction: float) -> list[str]:
    """Return on which side each document is; a single one is to train on, all of it."""
    if len(documents) == 1:
        return ["train"]
    if any(document.part == "eval" for document in documents):
        return [str(document.part) for document in documents]
    sides = [SIDES[draw_from_name(document.name.encode()) < eval_fraction] for document in documents]
    if len(set(sides)) == 2:
        return sides
    held_out = min(max(round(len(documents) * eval_fraction), 1), len(documents) - 1)
    return ["train"] * (len(documents) - held_out) + ["eval"] * held_out


def _move_end_to_eval(folder: Path, counts: dict[str, SideCount], eval_fraction: float, itemsize: int) -> None:
    """Move the end of the only document to the other side. Its bytes of text are shared in proportion."""
    whole, (train, held_out) = counts["train"], (folder / f"{side}.bin" for side in SIDES)
    kept = int(whole.tokens * (1.0 - eval_fraction))
    content = np.fromfile(train, np.uint8)
    held_out.write_bytes(content[kept * itemsize :].tobytes())
    train.write_bytes(content[: kept * itemsize].tobytes())
    text_bytes = round(whole.text_bytes * kept / max(whole.tokens, 1))
    counts["eval"] = SideCount(whole.tokens - kept, 1, whole.text_bytes - text_bytes)
    counts["train"] = SideCount(kept, 1, text_bytes)


def _encode_documents(
    files: list[Document], encoding: Encoding, choice: EncodingChoice, workers: int
) -> Iterator[EncodedFile]:
    """Yield the tokens of each file, in the order of the files."""
    if workers <= 1:
        yield from (_encode_file(encoding, file) for file in files)
        return
    # Spawned, not forked: a tokenizer may have threads, which a fork would not take along. Each process loads the
    # encoding itself, for it cannot be pickled.
    context = multiprocessing.get_context("spawn")
    chunksize = max(1, min(64, len(files) // (4 * workers)))
    with safe_path_for_children():
        started = context.Pool(min(workers, len(files)), _start_worker, (choice,))
    with started as pool:
        yield from pool.imap(_encode_in_worker, files, chunksize=chunksize)


def _start_worker(choice: EncodingChoice) -> None:
    global _worker_encoding
    # A terminal's Ctrl-C reaches every process of the group; the parent ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    leave_safe_path()
    _worker_encoding = choice.load()


def _encode_in_worker(file: Document) -> EncodedFile:
    assert _worker_encoding is not None
    return _encode_file(_worker_encoding, file)


def _encode_file(encoding: Encoding, file: Document) -> EncodedFile:
    texts = read_documents(file.file, file.field)
    return EncodedFile([encoding.encode(text) for text in texts], sum(map(len, texts)))
