"""Data options of conversations, and of pairs of answers of which one is preferred, for fine-tuning.

Free of jax and numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import MinLen

from data.option_fields import BatchOptions, Count, Fraction, check_path_exists

if TYPE_CHECKING:
    from data.chat_files import ChatPlace
    from data.chat_messages import Conversation
    from data.chat_tokenizer import ChatFormat
    from data.sources import Sources

# So many files are looked into before jax starts.
CHECKED_FILES = 8


@dataclass(frozen=True, kw_only=True)
class ConversationOptions(BatchOptions):
    """Where conversations are, and how they become tokens.

    Attributes:
        path: a file of JSON lines, or a folder of them.
        eval_path: another file or folder to evaluate on; null: a part of `path`.
        pattern: which files of a folder.
        tokenizer: a folder with `tokenizer.json` and `tokenizer_config.json`, as Hugging Face has them; null: that of
            `model=hf`, else bytes, with a plain template; `bytes`: these in any case.
        template: a file with a chat template in Jinja, in place of the tokenizer's.
        date: what a template writes where it writes the date of today, as `2026-12-31`.
        seq_len: tokens in a row.
        batch_size: rows in a step, on all devices together.
        eval_fraction: share of the conversations held out for evaluation, where the data has no part for that.
        too_long: what is done about a conversation that is longer than a row: its end is cut off, it is left out, or
            the run is refused.
    """

    path: str
    eval_path: str | None = None
    pattern: Annotated[str, MinLen(1)] = "**/*.jsonl"
    tokenizer: str | None = None
    template: str | None = None
    date: str | None = None
    seq_len: Count = 512
    batch_size: Count = 8
    eval_fraction: Fraction = 0.1
    too_long: Literal["cut", "skip", "raise"] = "cut"

    gives: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        if self.date is not None:
            from datetime import date

            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"date={self.date} is no date; expected one such as 2026-12-31") from None

    def load_format(self) -> ChatFormat:
        """Return how conversations become tokens. Raises ValueError where tokenizer or template cannot be read."""
        from data.chat_tokenizer import load_chat_format

        return load_chat_format(self.tokenizer, self.template, self.date)

    def check_readable(self) -> None:
        """Raise ValueError where the data cannot be what it should be."""
        from data.chat_files import check_conversations
        from data.documents import find_text_files, group_text_files

        path, chat_format = check_path_exists(self.path), self.load_format()
        files, _ = find_text_files(path, self.pattern)
        group_text_files(files, path)
        if self.eval_path is not None:
            try:
                files += find_text_files(check_path_exists(self.eval_path), self.pattern)[0]
            except ValueError as error:
                raise ValueError(f"eval_{error}") from None
        # A few, for there may be a million; all of them are read before training.
        for file in [*files[:CHECKED_FILES], files[-1]]:
            check_conversations(file, self.read_row, chat_format)

    def read_row(self, row: object) -> list[Conversation]:
        """Return the conversations in a line of a file. Raises ValueError, in words, where it has none."""
        raise NotImplementedError

    def find_place(self) -> ChatPlace:
        """Return where the conversations are."""
        from data.chat_files import ChatPlace

        eval_path = None if self.eval_path is None else Path(self.eval_path).expanduser()
        return ChatPlace(Path(self.path).expanduser(), self.pattern, eval_path)


@dataclass(frozen=True, kw_only=True)
class Chat(ConversationOptions):
    """Conversations in JSON lines, to train a model to answer: only what the assistant says is learnt.

    A line is `{"messages": [{"role": …, "content": …}, …]}`, or `{"prompt": …, "completion": …}`, of texts or of
    messages. A text is said by the user, or by the assistant. Files that are called parts of a data set, such as
    `train.jsonl` and `valid.jsonl`, are these parts; those of `test` are never trained on.

    Attributes:
        answers: learn every answer of a conversation, or the last one; of a prompt and its completion, the completion.
        packing: several conversations share a row, and none of them sees another; false: a row for each.
    """

    kind: Literal["chat"] = "chat"
    answers: Literal["all", "last"] = "all"
    packing: bool = True

    objective: ClassVar[str] = "sft"

    def read_row(self, row: object) -> list[Conversation]:
        """Return the conversation in a line of the file. Raises ValueError where it is none."""
        from data.chat_messages import read_conversation

        return [read_conversation(row, only_last=self.answers == "last")]

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.chat_files import read_chat

        return read_chat(self.find_place(), self, self.load_format())


@dataclass(frozen=True, kw_only=True)
class Preferences(ConversationOptions):
    """Pairs of answers to the same prompt in JSON lines, of which one is preferred.

    A line is `{"prompt": …, "chosen": …, "rejected": …}`, of texts or of messages. Without a prompt, it is the messages
    that both begin with. Files that are called parts of a data set are these parts, as for `data=chat`.

    Attributes:
        batch_size: pairs in a step, on all devices together.
    """

    kind: Literal["preferences"] = "preferences"

    objective: ClassVar[str] = "dpo"

    def read_row(self, row: object) -> list[Conversation]:
        """Return the chosen and the rejected conversation in a line. Raises ValueError where it is no such pair."""
        from data.preference_files import read_pair

        return read_pair(row)

    def sources(self) -> Sources:
        """Return the training and the evaluation source. Raises ValueError where they cannot be read."""
        from data.preference_files import read_preferences

        return read_preferences(self.find_place(), self, self.load_format())
