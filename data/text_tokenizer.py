"""Text as tokens of a tokenizer in a file: the bytes that a reader gives, encoded part by part, and text of tokens.

The tokenizer is that of the package `tokenizers`, which every folder of Hugging Face has as tokenizer.json.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from data.encodings import TOKENIZER
from data.fingerprint import hash_files, identify_file
from data.sources import Sources
from data.text_files import TokenWindows

# So many bytes are encoded at once, up to the next line: the package needs many times the memory of what it is given.
PART_BYTES = 1 << 20
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
            return Tokenizer.from_file(str(self.file))
        # The package raises nothing more precise.
        except Exception as error:
            raise ValueError(f"tokenizer={self.file}: is no tokenizer ({str(error).splitlines()[0][:80]})") from None

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
        whole = content.tobytes()
        parts, start = [], 0
        while start < len(whole):
            end = start + PART_BYTES
            # A line is never cut, nor a character of several bytes.
            end = len(whole) if end >= len(whole) or (line := whole.find(b"\n", end)) < 0 else line + 1
            text = whole[start:end].decode(errors="replace")
            parts.append(np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32))
            start = end
        tokens = np.concatenate([np.zeros(0, np.uint32), *parts])
        # The types that jax takes for an index, the smaller one where it holds them all.
        return tokens.astype(np.uint16 if self.vocab_size <= 2**16 else np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text of tokens, without those of the kind that marks ends and roles."""
        text: str = self._tokenizer.decode([int(token) for token in np.asarray(tokens).ravel()])
        return text


def find_tokenizer(place: str) -> Path:
    """Return the file of a tokenizer, in a folder or by itself. Raises ValueError where there is none."""
    path = Path(place).expanduser()
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer={place}: there is no {TOKENIZER}; name its folder, or say data.tokenizer={BYTES}")
    return file


def encode_sources(sources: Sources, place: str | None) -> Sources:
    """Return sources of bytes as sources of tokens; as they are where no tokenizer is chosen.

    Raises ValueError where there is none at that place.
    """
    if place is None or place == BYTES:
        return sources
    tokenizer = TextTokenizer(find_tokenizer(place))
    encode = partial(_encode_windows, tokenizer)
    train, held_out = encode(sources.train), encode(sources.eval)
    files = {**sources.files, TOKENIZER: identify_file(tokenizer.file)}
    counts = f"{len(train.corpus) / 1e6:.1f} + {len(held_out.corpus) / 1e6:.1f} M tokens"
    return replace(
        sources,
        train=train,
        eval=held_out,
        held_out={name: encode(part) for name, part in sources.held_out.items()},
        num_outputs=tokenizer.vocab_size,
        fingerprint=hash_files({"text": sources.fingerprint, TOKENIZER: files[TOKENIZER]}, "tokenizer"),
        summary=f"{sources.summary}, {counts} of {tokenizer.vocab_size:,} kinds",
        decode=tokenizer.decode,
        bytes_per_token=sources.eval.corpus.size / max(len(held_out.corpus), 1),  # type: ignore[attr-defined]
        files=files,
    )


def _encode_windows(tokenizer: TextTokenizer, windows: Any) -> TokenWindows:
    return TokenWindows(tokenizer.encode(windows.corpus), windows.seq_len)
