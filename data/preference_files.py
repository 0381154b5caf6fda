"""Pairs of answers to the same prompt, of which one is preferred, as rows of tokens.

The forms of a line are those that trl reads: a prompt, a chosen and a rejected answer, each a text or a list of
messages; or two whole conversations, of which what both begin with is the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from jaxtyping import Int

from data.chat_files import (
    ChatPlace,
    PlacedConversation,
    TooLong,
    describe_too_long,
    make_sources,
    read_sides,
    refuse_too_long,
    tokenize_placed,
)
from data.chat_messages import ANSWERER, Conversation, Message, make_conversation, read_messages
from data.chat_options import Preferences
from data.chat_rows import cut_text
from data.chat_tokenizer import ChatFormat, TokenizedText
from data.json_lines import name_json_type
from data.option_fields import explain_missing_name
from data.sources import Sources

CHOSEN, REJECTED = "chosen", "rejected"


@dataclass(frozen=True)
class TextPair:
    """The conversation with the preferred answer, and that with the other one."""

    chosen: TokenizedText
    rejected: TokenizedText


@dataclass(frozen=True)
class PairRows:
    """Pairs, each conversation in a row of its own of `seq_len` tokens and the one after them, filled up with padding.

    Padding is no answer, and comes after all that is: a model that looks back alone never sees it.
    """

    pairs: Sequence[TextPair]
    seq_len: int

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """Return the pairs at `indices`: `tokens` and `answers`, Int[batch 2 seq_len+1], the chosen answer first.

        `answers` is 1 where a token is to be foretold.
        """
        shape = (len(indices), 2, self.seq_len + 1)
        tokens, answers = np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
        for place, index in enumerate(np.asarray(indices).tolist()):
            pair = self.pairs[index]
            for side, text in enumerate((pair.chosen, pair.rejected)):
                here = (place, side, slice(len(text.tokens)))
                tokens[here], answers[here] = text.tokens, text.answers
        return {"tokens": tokens, "answers": answers}


@dataclass
class LeftOut:
    """Count the pairs that teach nothing, for both answers are the same tokens, and those with one too long."""

    same: int = 0
    too_long: TooLong = field(default_factory=TooLong)


def read_pair(row: object) -> list[Conversation]:
    """Return the chosen and the rejected conversation of a line. Raises ValueError, in words, where it is no pair."""
    if not isinstance(row, dict):
        raise ValueError(f"is {name_json_type(row)}; expected an object with prompt, chosen and rejected")
    for key in (CHOSEN, REJECTED):
        if key not in row:
            raise ValueError(f"has no {key}{explain_missing_name(key, row)}")
    chosen, rejected = (read_messages(row[key], key, ANSWERER) for key in (CHOSEN, REJECTED))
    prompt = row.get("prompt")
    # Some data sets have the prompt a second time as a text, beside conversations that begin with it.
    is_whole = isinstance(prompt, str) and bool(chosen) and chosen[0]["role"] != ANSWERER
    if prompt is None or is_whole:
        beginning = _find_common_beginning(chosen, rejected)
        if not beginning:
            raise ValueError("has no prompt, and chosen and rejected do not begin with the same message")
    else:
        beginning = read_messages(prompt, "prompt", "user")
        chosen, rejected = [*beginning, *chosen], [*beginning, *rejected]
    return [
        make_conversation(messages, row, num_learnt=_count_answers(messages[len(beginning) :]))
        for messages in (chosen, rejected)
    ]


def _find_common_beginning(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """Return the messages that both have first; where both are the same, all but the last."""
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    return [message for message, _ in takewhile(lambda pair: pair[0] == pair[1], both)]


def _count_answers(messages: Sequence[Message]) -> int:
    return sum(message["role"] == ANSWERER for message in messages)


def read_preferences(place: ChatPlace, option: Preferences, chat_format: ChatFormat) -> Sources:
    """Return pairs to train and to evaluate on. Raises ValueError where there are none, or one cannot be learnt."""
    found, left_out = read_sides(place, option), LeftOut()
    rows = {
        name: PairRows(_fit_pairs(tokenize_placed(side, chat_format), option, left_out), option.seq_len)
        for name, side in found.sides.items()
    }
    refuse_too_long(left_out.too_long, option)
    return make_sources(found, rows, chat_format, option.seq_len, describe_pairs(rows, left_out, option))


def _fit_pairs(
    side: Sequence[tuple[PlacedConversation, TokenizedText]], option: Preferences, left_out: LeftOut
) -> list[TextPair]:
    """Return the pairs of which both fit into a row, cut where the option says so; count those that are left out.

    Conversations come two by two, as `read_pair` gives them.
    """
    kept, room, too_long = [], option.seq_len + 1, left_out.too_long
    for (placed, chosen), (_, rejected) in zip(side[::2], side[1::2], strict=True):
        length = max(len(chosen.tokens), len(rejected.tokens))
        if np.array_equal(chosen.tokens, rejected.tokens):
            left_out.same += 1
            continue
        if length <= room:
            kept.append(TextPair(chosen, rejected))
            continue
        too_long.count += 1
        too_long.first = too_long.first or placed.where
        too_long.lengths.append(length)
        cut = TextPair(cut_text(chosen, room), cut_text(rejected, room))
        has_both = cut.chosen.answers.any() and cut.rejected.answers.any()
        # Two answers that begin alike may be the same after the cut.
        if option.too_long == "cut" and has_both and not np.array_equal(cut.chosen.tokens, cut.rejected.tokens):
            kept.append(cut)
        else:
            too_long.dropped += 1
    return kept


def describe_pairs(rows: Mapping[str, PairRows], left_out: LeftOut, option: Preferences) -> str:
    """Return how many pairs there are, how long they are, and how many were left out and why."""
    train, held_out = rows["train"], rows["eval"]
    lengths = [len(text.tokens) for pair in train.pairs for text in (pair.chosen, pair.rejected)]
    told = [f"{len(train):,} + {len(held_out):,} pairs (train + eval), of up to {max(lengths, default=0):,} tokens"]
    if "test" in rows:
        told.append(f"{len(rows['test']):,} pairs of test, never trained on")
    if left_out.same:
        told.append(f"{left_out.same:,} left out, for both answers are the same")
    return "; ".join(
        [*told, *describe_too_long(left_out.too_long, option, "before the cut both are the same, or one has no answer")]
    )
