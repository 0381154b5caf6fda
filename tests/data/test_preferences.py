"""Pairs of answers: the forms of a line, which tokens are learnt, what is left out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import Preferences
from data.chat_tokenizer import load_chat_format
from data.preference_files import read_pair
from tests.data.test_chat import CHATML, MARKED, write_lines
from tests.places import write_chat_tokenizer

ASK = {"role": "user", "content": "2 + 3?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("5", "It is six."))
MORE = [{"role": "user", "content": "And 1?"}, {"role": "assistant", "content": "6"}]
# The same pair, in every form that trl reads.
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "2 + 3?", "chosen": "5", "rejected": "It is six."},
    "messages": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "whole": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "prompt-twice": {"prompt": "2 + 3?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "mixed": {"prompt": "2 + 3?", "chosen": [GOOD], "rejected": [BAD]},
}


def pairs(count: int) -> list[Any]:
    return [{"prompt": f"{n}?", "chosen": str(2 * n), "rejected": "=" * (n % 5) + str(2 * n + 1)} for n in range(count)]


def learnt(row: dict[str, Any], folder: Path | None = None) -> list[str]:
    """Return what is learnt of a pair, the chosen answer first."""
    chat_format = load_chat_format(None if folder is None else str(folder), None, None)
    return [chat_format.decode(text.tokens[text.answers]) for text in chat_format.tokenize(read_pair(row))]


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_pair(row: dict[str, Any]) -> None:
    found = read_pair(row)
    assert [list(each.messages) for each in found] == [[ASK, GOOD], [ASK, BAD]]
    assert learnt(row) == ["5<|end|>\n", "It is six.<|end|>\n"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
def test_all_answers_after_what_both_begin_with_are_learnt(template: str, tmp_path: Path) -> None:
    """And none before: an answer that is part of the prompt was given by nobody who is taught."""
    folder = write_chat_tokenizer(tmp_path / "tokenizer", template)
    row = {"chosen": [ASK, GOOD, *MORE], "rejected": [ASK, GOOD, MORE[0], BAD]}
    assert [text.strip() for text in learnt(row, folder)] == ["6<|im_end|>", "It is six.<|im_end|>"]
    row = {"chosen": [ASK, GOOD, *MORE], "rejected": [ASK, BAD, *MORE]}
    assert "".join(learnt(row, folder)[0].split()) == "5<|im_end|>6<|im_end|>"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "is a list; expected an object with prompt, chosen and rejected"),
        ({"prompt": "x", "choosen": "y", "rejected": "z"}, "has no chosen; did you mean choosen"),
        ({"prompt": "x", "chosen": "y"}, "has no rejected"),
        ({"chosen": "y", "rejected": "z"}, "do not begin with the same message"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "do not begin with the same message"),
        ({"chosen": [], "rejected": [BAD]}, "do not begin with the same message"),
        ({"prompt": "x", "chosen": [], "rejected": [BAD]}, "ends with a message of user"),
        ({"prompt": "x", "chosen": " ", "rejected": "z"}, "chosen is an empty answer"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, "ends with a message of user"),
        ({"prompt": 3, "chosen": "y", "rejected": "z"}, "prompt is a number; expected a list of messages or a text"),
    ],
)
def test_what_is_no_pair_is_told(row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_pair(row)


def test_rows_hold_the_chosen_answer_first_and_padding_is_no_answer(tmp_path: Path) -> None:
    option = Preferences(path=str(write_lines(tmp_path / "p.jsonl", pairs(40))), seq_len=47)
    option.check_readable()
    sources = option.sources()
    assert len(sources.train) + len(sources.eval) == 40
    assert len(sources.eval) > 0
    assert sources.num_outputs == 256
    batch = sources.train.take(np.arange(len(sources.train)))
    assert batch["tokens"].shape == batch["answers"].shape == (len(sources.train), 2, 48)
    seen = set()
    for tokens, answers in zip(batch["tokens"], batch["answers"], strict=True):
        texts = [bytes(row[row > 0].astype(np.uint8)).decode() for row in tokens]
        chosen, rejected = (
            bytes(row[mark > 0].astype(np.uint8)).decode() for row, mark in zip(tokens, answers, strict=True)
        )
        number = int(texts[0].split("\n")[1].split("?")[0])
        assert chosen == f"{2 * number}<|end|>\n"
        assert rejected == "=" * (number % 5) + f"{2 * number + 1}<|end|>\n"
        assert all(text.startswith(f"<|user|>\n{number}?<|end|>\n<|assistant|>\n") for text in texts)
        seen.add(number)
    # Both of a pair are on the same side.
    held_out = sources.eval.take(np.arange(len(sources.eval)))["tokens"]
    assert not seen & {int(bytes(row[0].astype(np.uint8)).decode().split("\n")[1].split("?")[0]) for row in held_out}


def test_what_teaches_nothing_and_what_is_too_long_is_counted(tmp_path: Path) -> None:
    long = {"prompt": "Go on.", "chosen": "a" * 80, "rejected": "b" * 10}
    # They differ after the cut alone.
    late = {"prompt": "Go on.", "chosen": "c" * 79 + "d", "rejected": "c" * 79 + "e"}
    same = {"prompt": "1?", "chosen": "1", "rejected": "1"}
    lines = [*pairs(30), long, late, same, {"prompt": "?" * 200, "chosen": "a", "rejected": "b"}]
    file = write_lines(tmp_path / "p.jsonl", lines)
    cut = Preferences(path=str(file), seq_len=63).sources()
    assert "1 left out, for both answers are the same" in cut.summary
    assert "3 longer than a row (up to 240 tokens): 1 cut, 2 left out, for before the cut both are" in cut.summary
    skipped = Preferences(path=str(file), seq_len=63, too_long="skip").sources()
    assert "3 longer than a row (up to 240 tokens): 3 left out" in skipped.summary
    with pytest.raises(ValueError, match=r"line 31 has \d+ tokens, and a row has room for 64 \(3 conversations"):
        Preferences(path=str(file), seq_len=63, too_long="raise").sources()


def test_a_line_that_is_no_pair_is_told_before_anything_starts(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "p.jsonl", [*pairs(3), {"prompt": "x", "completion": "y"}, *pairs(3)])
    with pytest.raises(ValueError, match=r"p.jsonl: line 4 has no chosen"):
        Preferences(path=str(file)).check_readable()


def test_another_pair_is_other_data(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "p.jsonl", pairs(20))
    before = Preferences(path=str(file)).sources().fingerprint
    rows = pairs(20)
    rows[7]["chosen"], rows[7]["rejected"] = rows[7]["rejected"], rows[7]["chosen"]
    write_lines(file, rows)
    assert json.loads(file.read_text().splitlines()[7])["chosen"] != pairs(20)[7]["chosen"]
    assert Preferences(path=str(file)).sources().fingerprint != before
