"""Text to tokens and back: bytes, a `tokenizers` file, or one of tiktoken's. The last two are extras."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TOKENIZER = "tokenizer.json"  # a copy, so that a folder of tokens can be read without the file it came from
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "[SEP]")  # what the field calls the end of a document


@dataclass(frozen=True)
class Encoding:
    """One way to make tokens of text. `vocab_size` counts the token that ends a document."""

    name: str
    vocab_size: int
    eos: int | None
    encode: Callable[[bytes], np.ndarray]
    file: Path | None = None


def load_encoding(wanted: str, *, eos: bool = True) -> Encoding:
    """`bytes`, `tokenizers:FILE.json` or `tiktoken:NAME`. Raises ValueError where it cannot be had, saying why."""
    kind, _, rest = wanted.partition(":")
    if wanted == "bytes":
        return Encoding("bytes", 257 if eos else 256, 256 if eos else None, lambda text: np.frombuffer(text, np.uint8))
    if kind == "tokenizers" and rest:
        return _tokenizers(Path(rest).expanduser(), eos=eos)
    if kind == "tiktoken" and rest:
        return _tiktoken(rest, eos=eos)
    raise ValueError(f"--encoding {wanted}: expected bytes, tokenizers:FILE.json or tiktoken:NAME")


def load_decoder(name: str, folder: Path) -> Callable[[list[int]], str]:
    """From tokens to text, for an encoding by the name that tokens.json has."""
    if name == "bytes":
        return lambda tokens: bytes(tokens).decode(errors="replace")
    if name.startswith("tokenizers"):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / TOKENIZER)).decode
    import tiktoken

    return tiktoken.get_encoding(name.partition(":")[2]).decode


def _tokenizers(file: Path, *, eos: bool) -> Encoding:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("--encoding tokenizers needs a package: pip install tokenizers") from None
    if not file.is_file():
        raise ValueError(f"--encoding tokenizers:{file}: no such file")
    from data.fingerprint import identify_file

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more precise
        raise ValueError(f"--encoding tokenizers:{file}: is no tokenizer ({str(error).splitlines()[0]})") from None
    end = next((tokenizer.token_to_id(name) for name in EOS_NAMES if tokenizer.token_to_id(name) is not None), None)
    if eos and end is None:
        raise ValueError(
            f"--encoding tokenizers:{file}: has no token to end a document with (one of {', '.join(EOS_NAMES)}); "
            "add one, or say --no-eos"
        )

    def encode(text: bytes) -> np.ndarray:
        return np.array(tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids, np.uint32)

    digest = identify_file(file).split()[1]
    return Encoding(f"tokenizers:{digest}", tokenizer.get_vocab_size(), end if eos else None, encode, file)


def _tiktoken(name: str, *, eos: bool) -> Encoding:
    try:
        import tiktoken
    except ImportError:
        raise ValueError("--encoding tiktoken needs a package: pip install tiktoken") from None
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"--encoding tiktoken:{name}: there are {', '.join(tiktoken.list_encoding_names())}")
    try:
        found = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise ValueError(
            f"--encoding tiktoken:{name}: its file must be fetched from the internet once, and that failed "
            f"({type(error).__name__}); do it where there is a network and set TIKTOKEN_CACHE_DIR"
        ) from None

    def encode(text: bytes) -> np.ndarray:
        return np.array(found.encode_ordinary(text.decode(errors="replace")), np.uint32)

    return Encoding(f"tiktoken:{name}", found.n_vocab, found.eot_token if eos else None, encode)
