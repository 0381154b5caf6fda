"""Text files become token files, in parallel: the same bytes whatever the number of processes.

A file is a document. Its side (train or eval) depends on its name alone, as for data=text; where that leaves a side
empty, the last documents are for evaluation, or the end of the only one.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data.encodings import TOKENIZER, Encoding, load_encoding
from data.fingerprint import draw_from_name, identify_file
from data.orphans import end_with_parent
from data.text_files import find_files
from data.token_files import HEADER, SIDES, TokenFile, TokenHeader, choose_dtype

_mine: Encoding | None = None  # of a worker: made once, used for every document


@dataclass(frozen=True)
class Document:
    """A file, and the name that decides its side."""

    file: Path
    name: str


@dataclass
class SideCount:
    """What has been written of one side."""

    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0


def find_documents(paths: list[Path], pattern: str) -> list[Document]:
    """Every file that was named or lies in a folder that was named. Raises ValueError where there is none."""
    found = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: does not exist")
        root = path if path.is_dir() else path.parent
        here = [Document(file, file.relative_to(root).as_posix()) for file in find_files(path, pattern)]
        if not here:
            raise ValueError(f"{path}: holds no file that matches --pattern '{pattern}'")
        found += here
    return found


def write_token_files(
    documents: list[Document],
    target: Path,
    wanted: str,
    *,
    eos: bool,
    eval_fraction: float,
    workers: int,
    progress: Callable[[int, int], None],
) -> TokenHeader:
    """Write the folder `target`, all of it or nothing. Raises ValueError where something stands in the way.

    `progress` hears of each document: how many are done, and how many tokens there are.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: is there already, and not empty; name a new directory")
    how = load_encoding(wanted, eos=eos)
    fresh = target.parent / f".{target.name}.{os.getpid()}"
    fresh.mkdir(parents=True)
    try:
        header = _written(
            documents, fresh, how, partial(load_encoding, wanted, eos=eos), eval_fraction, workers, progress
        )
        (fresh / HEADER).write_text(header.to_json())
        if how.file is not None:
            shutil.copyfile(how.file, fresh / TOKENIZER)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return header


def _written(
    documents: list[Document],
    folder: Path,
    how: Encoding,
    make: Callable[[], Encoding],
    eval_fraction: float,
    workers: int,
    progress: Callable[[int, int], None],
) -> TokenHeader:
    sides = _sides(documents, eval_fraction)
    dtype, counts = choose_dtype(how.vocab_size), {side: SideCount() for side in SIDES}
    end = np.array([] if how.eos is None else [how.eos], dtype)
    with ExitStack() as opened:
        out = {side: opened.enter_context((folder / f"{side}.bin").open("wb")) for side in SIDES}
        done = zip(sides, _encoded(documents, how, make, workers), strict=True)
        for number, (side, (tokens, size)) in enumerate(done, 1):
            row, count = np.concatenate([tokens.astype(dtype), end]), counts[side]
            out[side].write(row.tobytes())
            count.tokens, count.documents = count.tokens + len(row), count.documents + 1
            count.text_bytes += size
            progress(number, sum(count.tokens for count in counts.values()))
    if len(documents) == 1:
        _cut(folder, counts, eval_fraction, dtype.itemsize)
    mine, theirs = (
        TokenFile(
            counts[side].tokens, counts[side].documents, counts[side].text_bytes, identify_file(folder / f"{side}.bin")
        )
        for side in SIDES
    )
    return TokenHeader(how.name, how.vocab_size, how.eos, mine, theirs)


def _sides(documents: list[Document], eval_fraction: float) -> list[str]:
    """On which side each document is."""
    sides = [SIDES[draw_from_name(document.name.encode()) < eval_fraction] for document in documents]
    if len(set(sides)) == 2 or len(documents) == 1:
        return sides if len(documents) > 1 else ["train"]
    held_out = min(max(round(len(documents) * eval_fraction), 1), len(documents) - 1)
    return ["train"] * (len(documents) - held_out) + ["eval"] * held_out


def _cut(folder: Path, counts: dict[str, SideCount], eval_fraction: float, itemsize: int) -> None:
    """Move the end of the only document to the other side. Its bytes of text are shared in proportion."""
    whole, (train, held_out) = counts["train"], (folder / f"{side}.bin" for side in SIDES)
    kept = int(whole.tokens * (1.0 - eval_fraction))
    content = np.fromfile(train, np.uint8)
    held_out.write_bytes(content[kept * itemsize :].tobytes())
    train.write_bytes(content[: kept * itemsize].tobytes())
    size = round(whole.text_bytes * kept / max(whole.tokens, 1))
    counts["eval"] = SideCount(whole.tokens - kept, 1, whole.text_bytes - size)
    counts["train"] = SideCount(kept, 1, size)


def _encoded(
    documents: list[Document], how: Encoding, make: Callable[[], Encoding], workers: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The tokens of each document and its size as text, in the order of the documents."""
    files = [document.file for document in documents]
    if workers <= 1:
        yield from (_one(how, file) for file in files)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(files)), _begin, (make,)) as pool:
        yield from pool.imap(_ours, files, chunksize=max(1, min(64, len(files) // (4 * workers))))


def _begin(make: Callable[[], Encoding]) -> None:
    global _mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's, which ends the pool
    end_with_parent()
    _mine = make()


def _ours(file: Path) -> tuple[np.ndarray, int]:
    assert _mine is not None
    return _one(_mine, file)


def _one(how: Encoding, file: Path) -> tuple[np.ndarray, int]:
    content = file.read_bytes()
    return how.encode(content), len(content)
