"""Text as tokens of a tokenizer in a file: the bytes that a reader gives, encoded part by part, and text of tokens.

The tokenizer is that of the package `tokenizers`, which every folder of Hugging Face has as tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from data.encodings import EOS_NAMES, TOKENIZER
from data.fingerprint import hash_files, identify_bytes, identify_file
from data.sources import Sources
from data.text_files import TokenWindows

# So many bytes are encoded at once, up to the next line: the package needs many times the memory of what it is given.
PART_BYTES = 1 << 20
# What lies beside a tokenizer and names its special tokens.
TOKENIZER_CONFIG = "tokenizer_config.json"
# What the token that ends a document is called in a table of files.
END = "end of a document"
# What `data.tokenizer` says for text as bytes.
BYTES = "bytes"


@dataclass(frozen=True)
class TextTokenizer:
    """One tokenizer, by its file. It is read where it is needed: a process that makes batches is sent its path."""

    file: Path

    @cached_property
    def _tokenizer(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError("tokenizer needs a package: pip install tokenizers") from None
        try:
            tokenizer = Tokenizer.from_file(str(self.file))
        # The package raises nothing more precise.
        except Exception as error:
            raise ValueError(f"tokenizer={self.file}: is no tokenizer ({str(error).splitlines()[0][:80]})") from None
        # Of a text every token is wanted, and nothing else.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Return how many tokens there are, counted up to the highest number."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def numbers_alike(self, other: TextTokenizer) -> bool:
        """Tell whether every token has the same number in another tokenizer."""
        if self.file.read_bytes() == other.file.read_bytes():
            return True
        same: bool = self._tokenizer.get_vocab() == other._tokenizer.get_vocab()
        return same

    def encode(self, content: np.ndarray) -> np.ndarray:
        """Return the tokens of a text in UTF-8; bytes that are none become the sign for that."""
        return self._join([self._encode_text(part) for part in _iter_parts(content.tobytes())])

    def encode_documents(self, content: np.ndarray, documents: np.ndarray, end: int) -> np.ndarray:
        """Return the tokens of each document, with the token `end` between two of them."""
        pieces: list[np.ndarray] = []
        separator = np.array([end], np.uint32)
        for begin, stop in documents:
            # Not after the last one: it may go on where the other side of the data begins.
            pieces += [separator] if pieces else []
            pieces += [self._encode_text(part) for part in _iter_parts(content[begin:stop].tobytes())]
        return self._join(pieces)

    def _encode_text(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def _join(self, pieces: list[np.ndarray]) -> np.ndarray:
        tokens = np.concatenate([np.zeros(0, np.uint32), *pieces])
        # The types that jax takes for an index, the smaller one where it holds them all.
        return tokens.astype(np.uint16 if self.vocab_size <= 2**16 else np.int32)

    @cached_property
    def end(self) -> int | None:
        """Return the token that ends a document; None where there is none.

        It is what tokenizer_config.json beside the tokenizer calls so, else one that is known for it.
        """
        named = []
        with suppress(OSError, ValueError, AttributeError):
            said = json.loads((self.file.parent / TOKENIZER_CONFIG).read_text()).get("eos_token")
            named = [said.get("content") if isinstance(said, dict) else said]
        numbers = [self._tokenizer.token_to_id(name) for name in [*named, *EOS_NAMES] if isinstance(name, str)]
        return next((number for number in numbers if number is not None), None)

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text of tokens, without those of the kind that marks ends and roles."""
        text: str = self._tokenizer.decode([int(token) for token in np.asarray(tokens).ravel()])
        return text


def _iter_parts(whole: bytes) -> Iterator[str]:
    """Yield a text in parts of bounded size, cut after lines alone: no character is cut either."""
    start = 0
    while start < len(whole):
        end = start + PART_BYTES
        end = len(whole) if end >= len(whole) or (line := whole.find(b"\n", end)) < 0 else line + 1
        yield whole[start:end].decode(errors="replace")
        start = end


def find_tokenizer(place: str) -> Path:
    """Return the file of a tokenizer, in a folder or by itself. Raises ValueError where there is none."""
    path = Path(place).expanduser()
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer={place}: there is no {TOKENIZER}; name its folder, or say data.tokenizer={BYTES}")
    return file


def encode_sources(sources: Sources, place: str | None, *, ends: bool) -> Sources:
    """Return sources of bytes as sources of tokens; as they are where no tokenizer is chosen.

    With `ends` a token stands between two documents, where the tokenizer has one for that. Raises ValueError where
    there is no tokenizer at that place.
    """
    if place is None or place == BYTES:
        return sources
    tokenizer = TextTokenizer(find_tokenizer(place))
    end = tokenizer.end if ends else None
    encode = partial(_encode_windows, tokenizer, end)
    train, held_out = encode(sources.train), encode(sources.eval)
    files = {**sources.files, TOKENIZER: identify_file(tokenizer.file)}
    identity = {"text": sources.fingerprint, TOKENIZER: files[TOKENIZER]}
    said = "" if end is not None or not ends else ", none of which ends a document"
    if end is not None:
        # By its number, as the content of a file is: it tells this data from the same without.
        files[END] = identity[END] = identify_bytes(str(end).encode())
    counts = f"{len(train.corpus) / 1e6:.1f} + {len(held_out.corpus) / 1e6:.1f} M tokens"
    return replace(
        sources,
        train=train,
        eval=held_out,
        held_out={name: encode(part) for name, part in sources.held_out.items()},
        num_outputs=tokenizer.vocab_size,
        fingerprint=hash_files(identity, "tokenizer"),
        summary=f"{sources.summary}, {counts} of {tokenizer.vocab_size:,} kinds{said}",
        decode=tokenizer.decode,
        bytes_per_token=sources.eval.corpus.size / max(len(held_out.corpus), 1),  # type: ignore[attr-defined]
        files=files,
    )


def _encode_windows(tokenizer: TextTokenizer, end: int | None, windows: Any) -> TokenWindows:
    if end is None:
        return TokenWindows(tokenizer.encode(windows.corpus), windows.seq_len)
    return TokenWindows(tokenizer.encode_documents(windows.corpus, windows.documents, end), windows.seq_len)
