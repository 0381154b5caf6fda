"""Rows of a fixed length that hold one conversation or several, and which of their tokens are answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from data.chat_tokenizer import TokenizedText


@dataclass(frozen=True)
class ChatRows:
    """Rows of `seq_len` tokens and the one after them; each is filled up with padding, which is no answer.

    Attributes:
        texts: the conversations, none longer than a row.
        rows: the numbers of those in each row.
        seq_len: tokens in a row, without the last one.
        packed: whether a row may hold several, so that a batch says which token belongs to which.
    """

    texts: Sequence[TokenizedText]
    rows: Sequence[Sequence[int]]
    seq_len: int
    packed: bool

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """Return the rows at `indices`: `tokens`, Int[batch seq_len+1], and arrays of that shape beside them.

        `answers` is 1 where a token is to be foretold. `segments`, where rows are packed, numbers the conversations of
        a row from 1; 0 is padding.
        """
        shape = (len(indices), self.seq_len + 1)
        tokens, answers, segments = np.zeros(shape, np.int32), np.zeros(shape, np.uint8), np.zeros(shape, np.int32)
        for place, index in enumerate(np.asarray(indices).tolist()):
            start = 0
            for number, text in enumerate((self.texts[which] for which in self.rows[index]), 1):
                here = (place, slice(start, start := start + len(text.tokens)))
                tokens[here], answers[here], segments[here] = text.tokens, text.answers, number
        batch: dict[str, np.ndarray] = {"tokens": tokens, "answers": answers}
        return {**batch, "segments": segments} if self.packed else batch


def make_rows(texts: Sequence[TokenizedText], seq_len: int, *, packed: bool) -> ChatRows:
    """Return conversations in rows, as few as best fit finds where they are packed, else one in each."""
    lengths = [len(text.tokens) for text in texts]
    rows = pack_best_fit(lengths, seq_len + 1) if packed else [[number] for number in range(len(texts))]
    return ChatRows(texts, rows, seq_len, packed)


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the numbers of the lengths that share each row: best fit, the longest first (Ding et al. 2024).

    Each goes into the fullest row that has room for it (arXiv:2404.10830). No length is more than `capacity`; what
    comes depends on the lengths alone.
    """
    rows: list[list[int]] = []
    # Rows by the room that is left in them; and of the rooms that there are, a bit each, so that the least one that is
    # enough is found without looking at every row.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        enough = rooms >> lengths[number]
        if enough:
            room = lengths[number] + (enough & -enough).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - lengths[number]
        by_room[left].append(row)
        rooms |= 1 << left
    return rows


def cut_text(text: TokenizedText, length: int) -> TokenizedText:
    """Return the beginning of a conversation."""
    return TokenizedText(text.tokens[:length], text.answers[:length])
