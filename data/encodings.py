"""Text to tokens and back: bytes, a `tokenizers` file, or one of tiktoken's encodings. The last two are extras."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.fingerprint import identify_file

# The name of the copy that lies beside the tokens, so that they can be read without the file it came from.
TOKENIZER = "tokenizer.json"
# What the field calls the token that ends a document.
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class Encoding:
    """One way to make tokens of text. `vocab_size` counts `eos` too, the token that ends a document, if there is one.

    `file` is what the encoding was read from, where it is a file of the user's.
    """

    name: str
    vocab_size: int
    eos: int | None
    encode: Callable[[bytes], np.ndarray]
    file: Path | None = None


@dataclass(frozen=True)
class EncodingChoice:
    """What a user chose on the command line: `--encoding`, and whether documents end with a token.

    Small and plain, so that it can be sent to a process that loads the encoding itself.
    """

    name: str
    has_eos: bool = True

    def load(self) -> Encoding:
        """Return the encoding `bytes`, `tokenizers:FILE.json` or `tiktoken:NAME`. Raises ValueError where it cannot."""
        kind, _, rest = self.name.partition(":")
        if self.name == "bytes":
            return _make_bytes_encoding(has_eos=self.has_eos)
        if kind == "tokenizers" and rest:
            return _load_tokenizers(Path(rest).expanduser(), has_eos=self.has_eos)
        if kind == "tiktoken" and rest:
            return _load_tiktoken(rest, has_eos=self.has_eos)
        raise ValueError(f"--encoding {self.name}: expected bytes, tokenizers:FILE.json or tiktoken:NAME")


def load_decoder(name: str, folder: Path) -> Callable[[list[int]], str]:
    """Return a function from tokens to text, for an encoding by the name that tokens.json has in `folder`."""
    if name == "bytes":
        return lambda tokens: bytes(tokens).decode(errors="replace")
    if name.startswith("tokenizers"):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / TOKENIZER)).decode
    import tiktoken

    return tiktoken.get_encoding(name.partition(":")[2]).decode


def _make_bytes_encoding(*, has_eos: bool) -> Encoding:
    def encode(text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    return Encoding("bytes", 257, 256, encode) if has_eos else Encoding("bytes", 256, None, encode)


def _load_tokenizers(file: Path, *, has_eos: bool) -> Encoding:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("--encoding tokenizers needs a package: pip install tokenizers") from None
    if not file.is_file():
        raise ValueError(f"--encoding tokenizers:{file}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    # The package raises nothing more precise.
    except Exception as error:
        raise ValueError(f"--encoding tokenizers:{file}: is no tokenizer ({str(error).splitlines()[0]})") from None
    end = next((tokenizer.token_to_id(name) for name in EOS_NAMES if tokenizer.token_to_id(name) is not None), None)
    if has_eos and end is None:
        raise ValueError(
            f"--encoding tokenizers:{file}: has no token to end a document with (one of {', '.join(EOS_NAMES)}); "
            "add one, or say --no-eos"
        )

    def encode(text: bytes) -> np.ndarray:
        return np.array(tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids, np.uint32)

    # Its name is its content: a file that is moved stays the same encoding, one that is changed does not.
    digest = identify_file(file).split()[1]
    return Encoding(f"tokenizers:{digest}", tokenizer.get_vocab_size(), end if has_eos else None, encode, file)


def _load_tiktoken(name: str, *, has_eos: bool) -> Encoding:
    try:
        import tiktoken
    except ImportError:
        raise ValueError("--encoding tiktoken needs a package: pip install tiktoken") from None
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"--encoding tiktoken:{name}: there are {', '.join(tiktoken.list_encoding_names())}")
    try:
        found = tiktoken.get_encoding(name)
    # It fetches its file with requests, whose errors are OSErrors.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--encoding tiktoken:{name}: its file must be fetched from the internet once, and that failed "
            f"({type(error).__name__}); do it where there is a network and set TIKTOKEN_CACHE_DIR"
        ) from None

    def encode(text: bytes) -> np.ndarray:
        return np.array(found.encode_ordinary(text.decode(errors="replace")), np.uint32)

    return Encoding(f"tiktoken:{name}", found.n_vocab, found.eot_token if has_eos else None, encode)
