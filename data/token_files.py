"""Token files: a folder with `train.bin`, `eval.bin` and `tokens.json`, which says what they are. Mapped into memory.

Documents lie one behind the other, each ended by the token `eos` where there is one. A token is a little-endian
unsigned number of one, two or four bytes, the least that holds the vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.data_errors import UnreadableError
from data.encodings import load_decoder
from data.fingerprint import hash_files, identify_file
from data.sources import Source, Sources
from data.text_files import TokenWindows

HEADER = "tokens.json"
SIDES = ("train", "eval")
VERSION = 1
# Windows that are looked at before training, from all over a file: tokens of another vocabulary show at once.
CHECKED_WINDOWS = 64


@dataclass(frozen=True)
class TokenFile:
    """What tokens.json says about one file of tokens.

    `text_bytes` is the size of the documents as UTF-8: bits per byte = bits per token × tokens / text_bytes.
    `identity` is "SIZE HASH" of the file.
    """

    tokens: int
    documents: int
    text_bytes: int
    identity: str


@dataclass(frozen=True)
class TokenHeader:
    """What tokens.json says. `encoding` is the name that decides what a token means."""

    encoding: str
    vocab_size: int
    eos: int | None
    train: TokenFile
    eval: TokenFile

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of a token in the files."""
        return choose_dtype(self.vocab_size)

    def to_json(self) -> str:
        """Return the content of tokens.json."""
        return json.dumps({"version": VERSION, "dtype": self.dtype.str, **asdict(self)}, indent=1) + "\n"


def choose_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds every token."""
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


def read_token_header(folder: Path, encoding: str | None = None) -> TokenHeader:
    """Return what a folder says of its tokens.

    Raises ValueError where it is no folder of tokens, is torn, or has another encoding than the one that is wanted.
    """
    try:
        document = json.loads((folder / HEADER).read_text())
        if document.pop("version") != VERSION:
            raise ValueError(f"path={folder} was written by another version; tokenize again")
        dtype = document.pop("dtype")
        header = TokenHeader(**{**document, **{side: TokenFile(**document[side]) for side in SIDES}})
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise ValueError(
            f"path={folder} holds no token files (no valid {HEADER}); "
            "python -m runner tokenize PATH --to DIR writes them"
        ) from None
    if encoding is not None and encoding != header.encoding:
        raise ValueError(f"encoding={encoding}, but {folder} holds tokens of {header.encoding}; tokenize again")
    if dtype != header.dtype.str:
        raise ValueError(f"path={folder}: {HEADER} says {dtype} for {header.vocab_size} tokens; tokenize again")
    for side in SIDES:
        _check_size(folder / f"{side}.bin", getattr(header, side).tokens * header.dtype.itemsize)
    return header


def _check_size(file: Path, expected: int) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != expected:
        got = "is missing" if size is None else f"has {size:,} bytes"
        raise ValueError(
            f"path={file.parent}: {file.name} {got}; expected {expected:,}; copy it again, or tokenize again"
        )


@dataclass(frozen=True)
class MappedWindows:
    """Windows over a token file, which every process that gets them maps for itself. `offset`: bytes before a token."""

    file: Path
    dtype: np.dtype[Any]
    seq_len: int
    vocab_size: int
    offset: int = 0

    def __post_init__(self) -> None:
        # An empty file cannot be mapped.
        is_empty = self.file.stat().st_size == self.offset
        corpus = np.zeros(0, self.dtype) if is_empty else np.memmap(self.file, self.dtype, "r", self.offset)
        object.__setattr__(self, "_windows", TokenWindows(corpus, self.seq_len))

    def __reduce__(self) -> tuple[Any, ...]:
        # Otherwise pickle would send the whole file to a worker.
        return MappedWindows, (self.file, self.dtype, self.seq_len, self.vocab_size, self.offset)

    @property
    def shown_dtype(self) -> np.dtype[Any]:
        """Return the type of the tokens that are given."""
        # int32 is what jax takes for an index, and holds every vocabulary there is.
        return self.dtype if self.dtype != np.uint32 else np.dtype(np.int32)

    def __len__(self) -> int:
        return len(self._windows)  # type: ignore[attr-defined]

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the windows at `indices`. Raises UnreadableError where they hold a token outside the vocabulary."""
        tokens = self._windows.take(indices)["tokens"]  # type: ignore[attr-defined]
        if int(tokens.max(initial=0)) >= self.vocab_size:
            raise UnreadableError(
                f"{self.file}: holds the token {tokens.max()}, but its vocabulary has {self.vocab_size}; tokenize again"
            )
        return {"tokens": tokens.astype(self.shown_dtype, copy=False)}


def read_tokens(folder: Path, encoding: str | None, seq_len: int) -> Sources:
    """Return the two token files of a folder. Raises ValueError where they are not what tokens.json says."""
    header = read_token_header(folder, encoding)
    files = {HEADER: identify_file(folder / HEADER)}
    for side in SIDES:
        files[f"{side}.bin"] = identify_file(folder / f"{side}.bin")
    train, held_out = (
        MappedWindows(folder / f"{side}.bin", header.dtype, seq_len, header.vocab_size) for side in SIDES
    )
    for source in (train, held_out):
        check_vocabulary(source)
    documents = header.train.documents + header.eval.documents
    return Sources(
        train,
        held_out,
        (seq_len,),
        header.vocab_size,
        hash_files(files),
        f"{header.train.tokens / 1e6:.1f} + {header.eval.tokens / 1e6:.1f} M tokens of {header.encoding} "
        f"(train + eval) in {documents:,} documents",
        partial(decode_tokens, folder, header),
        header.eval.text_bytes / max(header.eval.tokens, 1),
        files=files,
    )


def check_vocabulary(source: Source) -> None:
    """Raise UnreadableError where a few windows from all over the file hold a token outside the vocabulary."""
    if len(source):
        source.take(np.linspace(0, len(source) - 1, CHECKED_WINDOWS).astype(np.int64))


def decode_tokens(folder: Path, header: TokenHeader, values: np.ndarray) -> str:
    """Return tokens as text, without those that end a document; as numbers where the encoding cannot be had here."""
    tokens = [int(value) for value in np.asarray(values).ravel() if value != header.eos]
    try:
        return load_decoder(header.encoding, folder)(tokens)
    except (ImportError, OSError):
        return " ".join(map(str, tokens))
