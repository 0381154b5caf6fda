"""Token files of others: `train.bin` and `val.bin` as nanoGPT writes them, and those of llm.c, with a header each.

nanoGPT's are nothing but little-endian numbers of two bytes, and say nowhere what they are: its `meta.pkl` is never
opened, for unpickling runs code. llm.c's begin with 256 numbers of four bytes: a magic number, a version, the count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.compressed import BINARY_KINDS
from data.fingerprint import hash_files, identify_file
from data.sources import Source, SourcePart, Sources
from data.splits import AmbiguousSplitError, Split, find_split, group_names
from data.token_files import HEADER, MappedWindows, check_vocabulary, read_token_header

HEADER_BYTES = 1024
# The magic number and the version that llm.c, modded-nanogpt and their kin write, and the type of a token behind it.
KNOWN_HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
MAGICS = {magic for magic, _ in KNOWN_HEADERS}
# Where no file is to evaluate on, so much of the end of what is to train on.
EVAL_FRACTION = 0.05
# The largest token is looked for in blocks of that many.
SCANNED_TOKENS = 1 << 24
# Bytes that are no text and no two-byte tokens: files that other programs call .bin as well.
OTHER_KINDS = tuple((magic, kind) for magic, kind in BINARY_KINDS if len(magic) > 3)


@dataclass(frozen=True)
class RawFile:
    """A file of tokens without tokens.json: the type of a token, and where the first one is."""

    file: Path
    dtype: np.dtype[Any]
    offset: int

    def map(self) -> np.ndarray:
        """Return the tokens, mapped into memory."""
        if self.file.stat().st_size == self.offset:
            return np.zeros(0, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset)


@dataclass(frozen=True)
class JoinedWindows:
    """The windows of several files, one file after the other; none crosses a border."""

    parts: tuple[MappedWindows, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum([len(part) for part in self.parts]))

    def __len__(self) -> int:
        return int(self._ends[-1])  # type: ignore[attr-defined]

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows at `indices`. Raises UnreadableError where they hold a token outside the vocabulary."""
        numbers = np.asarray(indices)
        ends: np.ndarray = self._ends  # type: ignore[attr-defined]
        which = np.searchsorted(ends, numbers, side="right")
        tokens = np.zeros((len(numbers), self.parts[0].seq_len + 1), self.parts[0].shown_dtype)
        for number in np.unique(which):
            here = which == number
            before = int(ends[number - 1]) if number else 0
            tokens[here] = self.parts[number].take(numbers[here] - before)["tokens"]
        return {"tokens": tokens}


def choose_token_format(
    folder: Path, encoding: str | None, vocab_size: int | None
) -> dict[Split, list[RawFile]] | None:
    """Return the token files of others in a folder; None where it holds those of `tokenize`, which are what they say.

    Raises ValueError where it holds neither, or not what was asked for.
    """
    if folder.is_file() and folder.suffix == ".bin":
        raise ValueError(f"path={folder} is a file; expected the folder that it is in")
    raw = None if (folder / HEADER).exists() else find_raw_files(folder)
    if raw is None:
        header = read_token_header(folder, encoding)
        if vocab_size not in (None, header.vocab_size):
            raise ValueError(
                f"vocab_size={vocab_size}, but {folder / HEADER} says {header.vocab_size}; leave data.vocab_size out"
            )
    elif encoding is not None:
        raise ValueError(
            f"encoding={encoding}, but {folder} has no {HEADER} that says what its tokens are; tokenize again"
        )
    return raw


def find_raw_files(folder: Path) -> dict[Split, list[RawFile]] | None:
    """Return the .bin files of a folder by the part that they are; None where it has none to train on.

    Raises ValueError where one is no file of tokens, or says that it holds more than there is.
    """
    names = sorted(file.name for file in folder.glob("*.bin") if file.is_file()) if folder.is_dir() else []
    try:
        groups = group_names(names)
    except AmbiguousSplitError as error:
        raise ValueError(
            f"path={folder} {error}; put what is to train and evaluate on in a folder of its own"
        ) from None
    if groups is None and names and all(find_split(name) == "train" for name in names):
        groups = {"train": names}
    if groups is None:
        return None
    return {part: [_read_header(folder / name) for name in group] for part, group in groups.items()}


def _read_header(file: Path) -> RawFile:
    """Return what the beginning of a file says of its tokens. Raises ValueError where it holds none."""
    with file.open("rb") as opened:
        head = opened.read(HEADER_BYTES)
    size = file.stat().st_size
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(numbers) > 2 and int(numbers[0]) in MAGICS:
        magic, version, count = map(int, numbers[:3])
        dtype = KNOWN_HEADERS.get((magic, version))
        if dtype is None:
            raise ValueError(f"path={file} has a header of version {version}, which is not known; tokenize again")
        expected = HEADER_BYTES + count * np.dtype(dtype).itemsize
        if size != expected:
            raise ValueError(f"path={file} has {size:,} bytes; its header says {expected:,}; copy it again")
        return RawFile(file, np.dtype(dtype), HEADER_BYTES)
    if kind := next((kind for magic, kind in OTHER_KINDS if head.startswith(magic)), None):
        raise ValueError(f"path={file} holds no tokens: it is {kind}")
    if size % 2:
        raise ValueError(f"path={file} has {size:,} bytes, which are no numbers of two bytes each; copy it again")
    words = np.frombuffer(head[: len(head) // 2 * 2], "<u2")
    # The upper halves of larger numbers: nearly always 0, while the lower ones are anything.
    if len(words) >= 64 and words[1::2].max() <= 3 and words[::2].max() > 3:
        raise ValueError(
            f"path={file} seems to hold numbers of four bytes; expected two, as numpy's uint16: write it again, or "
            "tokenize its text: python -m runner tokenize PATH --to DIR"
        )
    return RawFile(file, np.dtype("<u2"), 0)


def read_raw_tokens(
    folder: Path, found: Mapping[Split, list[RawFile]], vocab_size: int | None, seq_len: int
) -> Sources:
    """Return the token files of a folder that has no tokens.json.

    The vocabulary is `vocab_size`, or goes up to the largest token that is there. Raises ValueError where a file holds
    a larger one.
    """
    every = [raw for group in found.values() for raw in group]
    if other := next((raw for raw in every if raw.dtype != every[0].dtype), None):
        raise ValueError(
            f"path={other.file} holds {other.dtype.name}, {every[0].file.name} {every[0].dtype.name}; expected one type"
        )
    size = vocab_size or 1 + max(map(_find_largest_token, every))
    windows = {part: _make_windows(group, seq_len, size) for part, group in found.items()}
    for source in windows.values():
        check_vocabulary(source)
    train, held_out = windows["train"], windows.get("eval")
    if held_out is None:
        cut = int(len(train) * (1.0 - EVAL_FRACTION))
        whole, places = train, np.arange(len(train))
        train, held_out = SourcePart(whole, places[:cut]), SourcePart(whole, places[cut:])
    files = {raw.file.name: identify_file(raw.file) for raw in every}
    counts = {part: sum(len(raw.map()) for raw in group) for part, group in found.items()}
    how = "" if vocab_size else ", by the largest token"
    says = "eval" if "eval" in found else f"the last {EVAL_FRACTION:.0%} of it to evaluate on"
    sizes = " + ".join(_format_count(counts[part]) for part in ("train", "eval") if part in counts)
    test = f"; {_format_count(counts['test'])} of test, never trained on" if "test" in counts else ""
    unread = "; meta.pkl is not read, for that would run code" if (folder / "meta.pkl").exists() else ""
    return Sources(
        train,
        held_out,
        (seq_len,),
        size,
        hash_files(files, "raw", size),
        f"{sizes} tokens (train + {says}) as {every[0].dtype.name}, without tokens.json; vocabulary of "
        f"{size:,}{how}{test}{unread}",
        show_numbers,
        files=files,
        held_out={"test": windows["test"]} if "test" in windows else {},
    )


def _format_count(count: int) -> str:
    return f"{count:,}" if count < 100_000 else f"{count / 1e6:.1f} M"


def show_numbers(values: np.ndarray) -> str:
    """Return tokens as numbers: nobody knows what they mean."""
    return " ".join(str(int(value)) for value in np.asarray(values).ravel())


def _make_windows(group: list[RawFile], seq_len: int, vocab_size: int) -> Source:
    parts = [MappedWindows(raw.file, raw.dtype, seq_len, vocab_size, raw.offset) for raw in group]
    return parts[0] if len(parts) == 1 else JoinedWindows(tuple(parts))


def _find_largest_token(raw: RawFile) -> int:
    tokens = raw.map()
    blocks = (tokens[start : start + SCANNED_TOKENS] for start in range(0, len(tokens), SCANNED_TOKENS))
    return max((int(block.max()) for block in blocks), default=0)
