"""From a conversation to tokens: a tokenizer's folder with its chat template, or bytes with a plain one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from data.chat_messages import Conversation
from data.chat_template import PLAIN_TEMPLATE, ChatTemplate, ChatTemplateError, Span, write_conversation
from data.encodings import TOKENIZER
from data.fingerprint import identify_bytes
from data.sources import NUM_BYTES
from data.text_files import decode_bytes
from data.text_tokenizer import BYTES, TOKENIZER_CONFIG

TEMPLATE_FILE, MODEL_CONFIG = "chat_template.jinja", "config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Text → tokens Int[tokens], and the first and last + 1 character of each, Int[tokens 2].
EncodeTexts = Callable[[Sequence[str]], list[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class TokenizedText:
    """A conversation as tokens, of which some are answers."""

    tokens: Int[np.ndarray, "tokens"]
    answers: Bool[np.ndarray, "tokens"]


@dataclass(frozen=True)
class ChatFormat:
    """Make tokens of conversations.

    Attributes:
        template: makes a text of them.
        encode: makes tokens of texts.
        decode: makes a text of tokens Int[seq].
        vocab_size: tokens are less than that.
        files: "SIZE HASH" of what it is made of, by its name.
    """

    template: ChatTemplate
    encode: EncodeTexts
    decode: Callable[[np.ndarray], str]
    vocab_size: int
    files: Mapping[str, str]

    def tokenize(self, conversations: Sequence[Conversation]) -> list[TokenizedText]:
        """Return conversations as tokens. Raises ChatTemplateError where the template refuses one."""
        written = [write_conversation(self.template, each) for each in conversations]
        encoded = self.encode([text for text, _ in written])
        return [
            TokenizedText(tokens, find_answer_tokens(offsets, spans))
            for (tokens, offsets), (_, spans) in zip(encoded, written, strict=True)
        ]


def find_answer_tokens(offsets: Int[np.ndarray, "tokens 2"], spans: Sequence[Span]) -> Bool[np.ndarray, "tokens"]:
    """Return which tokens hold a character of an answer.

    The first token of a text is never one: nothing foretells it.
    """
    answers = np.zeros(len(offsets), bool)
    for start, stop in (span for span in spans if span[0] < span[1]):
        first, last = np.searchsorted(offsets[:, 1], start, "right"), np.searchsorted(offsets[:, 0], stop, "left")
        answers[first:last] = True
    answers[:1] = False
    return answers


def load_chat_format(folder: str | None, template: str | None, day: str | None) -> ChatFormat:
    """Return the format of a tokenizer's folder, or that of bytes, with the template of a file where one is given.

    Raises ValueError, which begins with the key to blame, where one of them cannot be read.
    """
    own = None if template is None else _read_text(Path(template).expanduser(), f"template={template}")
    today = None if day is None else date.fromisoformat(day)
    if folder is None or folder == BYTES:
        chosen = ChatTemplate(own or PLAIN_TEMPLATE, {}, today)
        made = ChatFormat(chosen, _encode_bytes, decode_bytes, NUM_BYTES, _identify_template(chosen))
    else:
        made = _load_folder(Path(folder).expanduser(), own, today)
    try:
        made.template.check()
    except ChatTemplateError as error:
        raise ValueError(f"template={template}: {error}" if template else f"tokenizer={folder}: {error}") from None
    return made


def _encode_bytes(texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the bytes of texts; each byte of a character has the place of that character."""
    found = []
    for text in texts:
        try:
            tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        except UnicodeEncodeError:
            raise ChatTemplateError("gives text with half a character in it, which is no UTF-8") from None
        # All but the first byte of a character look like this: 10xxxxxx.
        place = np.cumsum((tokens & 0xC0) != 0x80) - 1
        found.append((tokens, np.stack([place, place + 1], axis=1)))
    return found


def _load_folder(folder: Path, own: str | None, today: date | None) -> ChatFormat:
    where = f"tokenizer={folder}"
    if not folder.is_dir():
        raise ValueError(f"{where} is no folder; name one with {TOKENIZER} and {TOKENIZER_CONFIG}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(f"{where} needs a package: pip install tokenizers") from None
    content = _read_text(folder / TOKENIZER, where)
    try:
        tokenizer = Tokenizer.from_str(content)
    # The package raises nothing more precise.
    except Exception as error:
        raise ValueError(f"{where}: {TOKENIZER} is no tokenizer ({str(error).splitlines()[0]})") from None
    # What a conversation is cut to is said by data.seq_len.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_object(folder / TOKENIZER_CONFIG, where)
    template = ChatTemplate(own or _find_template(folder, config, where), _find_special_tokens(config), today)

    def encode(texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        # The template writes the special tokens that it wants.
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encoded]

    def decode(tokens: np.ndarray) -> str:
        return str(tokenizer.decode([int(token) for token in np.asarray(tokens).ravel()], skip_special_tokens=False))

    # A vocabulary may have holes, and a model more room than its tokenizer has tokens.
    used = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
    room = _read_object(folder / MODEL_CONFIG, where).get("vocab_size") if (folder / MODEL_CONFIG).exists() else None
    vocab_size = max(used, room) if isinstance(room, int) else used
    files = {f"tokenizer/{TOKENIZER}": identify_bytes(content.encode()), **_identify_template(template)}
    return ChatFormat(template, encode, decode, vocab_size, files)


def _find_template(folder: Path, config: Mapping[str, Any], where: str) -> str:
    """Return the chat template of a folder. Raises ValueError where it has none, or several and none is the usual."""
    if (folder / TEMPLATE_FILE).exists():
        return _read_text(folder / TEMPLATE_FILE, where)
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
        if "default" not in named:
            names = ", ".join(named)
            raise ValueError(f"{where} has several chat templates ({names}) and no default; say data.template=FILE")
        found = named["default"]
    if not isinstance(found, str):
        raise ValueError(
            f"{where} has no chat template (chat_template in {TOKENIZER_CONFIG}, or {TEMPLATE_FILE}); say "
            "data.template=FILE"
        )
    return found


def _find_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a configuration names, by what a template calls them."""
    found = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _identify_template(template: ChatTemplate) -> dict[str, str]:
    beside = json.dumps([dict(template.special_tokens), str(template.date)], sort_keys=True)
    return {"chat template": identify_bytes(template.text.encode(errors="surrogateescape"), beside.encode())}


def _read_text(file: Path, where: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{where}: there is no file {file.name}") from None
    except OSError as error:
        raise ValueError(f"{where}: {file.name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{where}: {file.name} is no text in UTF-8") from None


def _read_object(file: Path, where: str) -> dict[str, Any]:
    """Return an object of JSON; an empty one where there is no such file."""
    if not file.exists():
        return {}
    try:
        found = json.loads(_read_text(file, where))
    except (json.JSONDecodeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {file.name} is no object of JSON")
    return found
