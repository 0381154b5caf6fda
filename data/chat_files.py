"""Files of conversations, as rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data.chat_messages import Conversation
from data.chat_options import Chat, ConversationOptions
from data.chat_rows import ChatRows, cut_text, make_rows
from data.chat_template import ChatTemplateError
from data.chat_tokenizer import ChatFormat, TokenizedText
from data.compressed import find_binary_kind, read_beginning, read_plain
from data.documents import find_text_files, group_text_files
from data.fingerprint import draw_from_name, hash_files, identify_bytes
from data.json_lines import iter_json_values
from data.sources import Source, Sources

# So many lines of a file are looked at before jax starts, and so many conversations are made tokens at once.
CHECKED_LINES, CHUNK = 20, 512
ReadRow = Callable[[object], list[Conversation]]


@dataclass(frozen=True)
class ChatPlace:
    """Where conversations are: a file or a folder, which files of it, and another one to evaluate on."""

    path: Path
    pattern: str
    eval_path: Path | None = None


@dataclass(frozen=True)
class PlacedConversation:
    """A conversation and where it stands, for a message."""

    where: str
    conversation: Conversation


@dataclass
class TooLong:
    """Count conversations that are longer than a row, and those of them that had no answer before the cut."""

    count: int = 0
    dropped: int = 0
    first: str = ""
    lengths: list[int] = field(default_factory=list)


def check_conversations(file: Path, read_row: ReadRow, chat_format: ChatFormat) -> None:
    """Raise ValueError where the first lines of a file are no conversations, or the template refuses one."""
    content = read_beginning(file)
    if kind := find_binary_kind(content):
        raise ValueError(f"path={file} is no text: it is {kind}")
    # The last line may be cut off here. A list is read as a whole later.
    lines = content.removeprefix(b"\xef\xbb\xbf")
    if lines.lstrip()[:1] == b"[":
        return
    whole = b"\n".join(islice(lines.split(b"\n")[:-1], CHECKED_LINES))
    tokenize_all(iter_conversations(whole, str(file), read_row), chat_format)


def iter_conversations(content: bytes, name: str, read_row: ReadRow) -> Iterator[PlacedConversation]:
    """Yield the conversations of a file. Raises ValueError, which names file and line, where a line is none."""
    for where, row in iter_json_values(content, name):
        try:
            found = read_row(row)
        except ValueError as error:
            raise ValueError(f"path={name}: {where} {error}") from None
        yield from (PlacedConversation(f"path={name}: {where}", each) for each in found)


def tokenize_all(placed: Iterator[PlacedConversation], chat_format: ChatFormat) -> list[TokenizedText]:
    """Return conversations as tokens. Raises ValueError, which names file and line, where a template refuses one."""
    found: list[TokenizedText] = []
    while chunk := list(islice(placed, CHUNK)):
        try:
            found += chat_format.tokenize([each.conversation for each in chunk])
        except ChatTemplateError:
            # One of them: which, is found one by one.
            for each in chunk:
                try:
                    chat_format.tokenize([each.conversation])
                except ChatTemplateError as error:
                    raise ValueError(f"{each.where}: the chat template {error}") from None
            raise
    return found


@dataclass(frozen=True)
class ChatPart:
    """Hold the conversations of one part of the data, and the identity of each of its files."""

    placed: list[PlacedConversation]
    files: dict[str, str]


def read_chat(place: ChatPlace, option: Chat, chat_format: ChatFormat) -> Sources:
    """Return conversations as rows to train and to evaluate on.

    Raises ValueError where there are none, or one cannot be learnt from.
    """
    found, too_long = read_sides(place, option), TooLong()
    rows = {
        name: make_rows(
            _fit_texts(tokenize_placed(side, chat_format), option, too_long), option.seq_len, packed=option.packing
        )
        for name, side in found.sides.items()
    }
    refuse_too_long(too_long, option)
    return make_sources(found, rows, chat_format, option.seq_len, describe_rows(rows, too_long, option))


@dataclass(frozen=True)
class ChatSides:
    """Hold the conversations of each side, `train`, `eval` and perhaps `test`.

    Attributes:
        sides: the conversations, by side.
        files: the identity of each file, by its name.
        parts: the names of the parts that the files came in.
    """

    sides: Mapping[str, Sequence[PlacedConversation]]
    files: Mapping[str, str]
    parts: Sequence[str]


def read_sides(place: ChatPlace, option: ConversationOptions) -> ChatSides:
    """Read all conversations. Raises ValueError where a line is none."""
    parts = read_parts(place, option.read_row)
    files = {name: entry for part in parts.values() for name, entry in part.files.items()}
    return ChatSides(split_conversations(parts, option.eval_fraction), files, sorted(parts))


def refuse_too_long(too_long: TooLong, option: ConversationOptions) -> None:
    """Raise ValueError where a conversation is longer than a row, and the option forbids that."""
    if option.too_long == "raise" and too_long.count:
        raise ValueError(
            f"{too_long.first} has {too_long.lengths[0]:,} tokens, and a row has room for {option.seq_len + 1:,} "
            f"({too_long.count:,} conversations are longer); raise data.seq_len, or say data.too_long=cut"
        )


def make_sources(
    found: ChatSides, rows: Mapping[str, Source], chat_format: ChatFormat, seq_len: int, summary: str
) -> Sources:
    """Return rows of each side as what is trained and evaluated on."""
    files = {**found.files, **chat_format.files}
    return Sources(
        rows["train"],
        rows["eval"],
        (seq_len,),
        chat_format.vocab_size,
        hash_files(files, *found.parts),
        summary,
        chat_format.decode,
        files=files,
        held_out={"test": rows["test"]} if "test" in rows else {},
    )


def read_parts(place: ChatPlace, read_row: ReadRow) -> dict[str, ChatPart]:
    """Return what is in the files of each part: `train`, and perhaps `eval` and `test`."""
    root = place.path if place.path.is_dir() else place.path.parent
    files, _ = find_text_files(place.path, place.pattern)
    groups = group_text_files(files, root)
    if place.eval_path is None:
        named = {"train": files} if groups is None else {str(name): group for name, group in groups.items()}
        return {name: _read_part(root, group, read_row) for name, group in named.items()}
    if groups is not None:
        raise ValueError(
            f"eval_path={place.eval_path} is one thing to evaluate on, and path={place.path} has parts of its own; "
            "leave data.eval_path out, or name in data.path what is to train on"
        )
    evaluated, _ = find_text_files(place.eval_path, place.pattern)
    eval_root = place.eval_path if place.eval_path.is_dir() else place.eval_path.parent
    return {
        "train": _read_part(root, files, read_row),
        "eval": _read_part(eval_root, evaluated, read_row, "eval_path/"),
    }


def _read_part(root: Path, files: Sequence[Path], read_row: ReadRow, prefix: str = "") -> ChatPart:
    placed, entries = [], {}
    for file in files:
        content = read_plain(file)
        if kind := find_binary_kind(content):
            raise ValueError(f"path={file} is no text: it is {kind}")
        entries[prefix + file.relative_to(root).as_posix()] = identify_bytes(content)
        placed += list(iter_conversations(content, str(file), read_row))
    return ChatPart(placed, entries)


def split_conversations(parts: Mapping[str, ChatPart], eval_fraction: float) -> dict[str, list[PlacedConversation]]:
    """Return the conversations of each side, `train`, `eval` and perhaps `test`.

    Where no part is to evaluate on, the content of a conversation decides, so that the same one is never on both sides;
    of a few, at least one is to evaluate on.
    """
    sides = {name: part.placed for name, part in parts.items()}
    if "eval" in sides:
        return sides
    drawn = [draw_from_name(each.conversation.source) for each in sides["train"]]
    cut = max(eval_fraction, min(drawn, default=0.0) + 1e-12)
    held_out = [each for each, number in zip(sides["train"], drawn, strict=True) if number < cut]
    rest = [each for each, number in zip(sides["train"], drawn, strict=True) if number >= cut]
    return {**sides, "train": rest, "eval": held_out}


def tokenize_placed(
    side: Sequence[PlacedConversation], chat_format: ChatFormat
) -> list[tuple[PlacedConversation, TokenizedText]]:
    """Return conversations, each with its tokens."""
    return list(zip(side, tokenize_all(iter(side), chat_format), strict=True))


def _fit_texts(
    side: Sequence[tuple[PlacedConversation, TokenizedText]], option: Chat, too_long: TooLong
) -> list[TokenizedText]:
    """Return the conversations that fit into a row, cut where the option says so; note those that are too long."""
    kept, room = [], option.seq_len + 1
    for placed, text in side:
        if len(text.tokens) <= room:
            kept.append(text)
            continue
        too_long.count += 1
        too_long.first = too_long.first or placed.where
        too_long.lengths.append(len(text.tokens))
        cut = cut_text(text, room)
        if option.too_long == "cut" and cut.answers.any():
            kept.append(cut)
        else:
            too_long.dropped += 1
    return kept


def describe_rows(rows: Mapping[str, ChatRows], too_long: TooLong, option: Chat) -> str:
    """Return how many conversations there are, how full their rows are, and what became of those that are too long."""
    train, held_out = rows["train"], rows["eval"]
    used = sum(len(text.tokens) for text in train.texts)
    learnt = sum(int(text.answers.sum()) for text in train.texts)
    room = max(len(train) * (option.seq_len + 1), 1)
    told = [
        f"{len(train.texts):,} + {len(held_out.texts):,} conversations (train + eval) in {len(train):,} + "
        f"{len(held_out):,} rows, {used / room:.0%} full; {learnt / max(used, 1):.0%} of the tokens are learnt"
    ]
    if "test" in rows:
        told.append(f"{len(rows['test'].texts):,} conversations of test, never trained on")
    return "; ".join([*told, *describe_too_long(too_long, option, "no answer begins before the cut")])


def describe_too_long(too_long: TooLong, option: ConversationOptions, why: str) -> list[str]:
    """Return what became of what is longer than a row, where anything is; `why` some is left out where it is cut."""
    if not too_long.count:
        return []
    kept = too_long.count - too_long.dropped
    what = [f"{kept:,} cut"] if kept else []
    if too_long.dropped:
        what.append(f"{too_long.dropped:,} left out" + (f", for {why}" if option.too_long == "cut" else ""))
    return [f"{too_long.count:,} longer than a row (up to {max(too_long.lengths):,} tokens): {', '.join(what)}"]
