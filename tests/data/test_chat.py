"""Conversations: what a template makes of them, which tokens are answers, how they share rows, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import Chat
from data.chat_messages import read_conversation
from data.chat_rows import pack_best_fit
from data.chat_template import PLAIN_TEMPLATE, ChatTemplate, ChatTemplateError, write_conversation
from data.chat_tokenizer import find_answer_tokens, load_chat_format
from tests.places import write_chat_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Zwölf und 3? 🙂"},
    {"role": "assistant", "content": "15 — fünfzehn."},
    {"role": "user", "content": "And 1?"},
    {"role": "assistant", "content": "16 🙂"},
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'assistant' %}\n"
    "<|im_start|>assistant\n{% generation %}\n{{ m.content | trim }}<|im_end|>{% endgeneration %}\n"
    "    {% else %}\n<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n    {% endif %}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Older answers are written otherwise than the last one, as models that think have it.
FORGETS = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}"
    "{% endif %}{{ m.content + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def talk(messages: list[dict[str, Any]] = TALK, *, only_last: bool = False, **beside: Any) -> Any:
    return read_conversation({"messages": messages, **beside}, only_last=only_last)


def written(template: ChatTemplate, **how: Any) -> list[str]:
    text, spans = write_conversation(template, talk(**how))
    return [text[start:stop] for start, stop in spans]


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sums(count: int) -> list[Any]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{n} + {n}?"},
                {"role": "assistant", "content": "=" * (n % 7) + str(2 * n)},
            ]
        }
        for n in range(count)
    ]


# --- what is an answer ---


def test_an_answer_is_what_is_marked_or_what_a_message_adds() -> None:
    assert written(ChatTemplate(PLAIN_TEMPLATE)) == ["15 — fünfzehn.<|end|>\n", "16 🙂<|end|>\n"]
    assert written(ChatTemplate(MARKED, {"bos_token": "<s>"})) == ["15 — fünfzehn.<|im_end|>", "16 🙂<|im_end|>"]
    assert written(ChatTemplate(CHATML)) == ["15 — fünfzehn.<|im_end|>\n", "16 🙂<|im_end|>\n"]
    for template in (PLAIN_TEMPLATE, CHATML, MARKED, FORGETS):
        (only,) = written(ChatTemplate(template), only_last=True)
        assert only.strip().startswith(("16 🙂", "<think></think>16 🙂"))


def test_what_nobody_can_tell_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match=r"message 3 otherwise when others follow.*data.answers=last"):
        written(ChatTemplate(FORGETS))
    with pytest.raises(ChatTemplateError, match="writes no answer of it"):
        written(ChatTemplate("{% if false %}{% generation %}x{% endgeneration %}{% endif %}hi"))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for %}", "is no Jinja"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{{ messages[99].content }}", "refuses it: .*has no element 99"),
        ("{{ messages.append(1) }}", "refuses it: .*unsafe|not callable"),
        ("{{ ''.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
        ("{{ strftime_now('%Y') }}", "writes the date of today.*data.date=DATE"),
    ],
)
def test_a_template_that_cannot_be_used_is_told(template: str, said: str) -> None:
    with pytest.raises(ChatTemplateError, match=said):
        ChatTemplate(template).render(TALK, None)


def test_today_is_a_day_that_one_names() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, date(2026, 12, 31))
    assert template.render(TALK, None)[0] == "31 Dec 2026"


def test_a_token_is_an_answer_where_it_holds_a_character_of_one() -> None:
    offsets = np.array([[0, 3], [3, 5], [5, 5], [5, 8], [8, 9]])
    assert find_answer_tokens(offsets, [(4, 6)]).tolist() == [False, True, True, True, False]
    assert find_answer_tokens(offsets, [(5, 8)]).tolist() == [False, False, False, True, False]
    assert find_answer_tokens(offsets, [(0, 3), (8, 9)]).tolist() == [False, False, False, False, True]
    assert not find_answer_tokens(offsets, [(3, 3)]).any()


def test_bytes_have_the_place_of_their_character() -> None:
    chat_format = load_chat_format(None, None, None)
    (made,) = chat_format.tokenize([talk()])
    assert bytes(made.tokens[made.answers].astype(np.uint8)).decode() == "15 — fünfzehn.<|end|>\n16 🙂<|end|>\n"
    assert chat_format.decode(made.tokens).startswith("<|system|>\nBe brief.<|end|>\n<|user|>\nZwölf")


# --- a tokenizer's folder, against transformers ---


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "marked"])
def test_a_folder_gives_what_transformers_gives(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_chat_tokenizer(tmp_path / "tokenizer", template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    tools = [
        {"type": "function", "function": {"name": "add", "description": "<'é'>", "parameters": {"type": "object"}}}
    ]
    chat_format = load_chat_format(str(folder), None, None)
    for beside in ({}, {"tools": tools}):
        (made,) = chat_format.tokenize([talk(**beside)])
        given = theirs.apply_chat_template(
            TALK, return_dict=True, return_assistant_tokens_mask=template == MARKED, **beside
        )
        assert made.tokens.tolist() == given["input_ids"]
        if template == MARKED:
            assert made.answers.astype(int).tolist() == given["assistant_masks"]
            assert 0 < made.answers.sum() < len(made.answers)
        assert chat_format.template.render(TALK, beside.get("tools"))[0] == theirs.apply_chat_template(
            TALK, tokenize=False, **beside
        )
    assert chat_format.vocab_size == len(theirs)
    assert chat_format.decode(made.tokens) == theirs.decode(made.tokens)


def test_what_is_in_a_folder_is_found(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(
        tmp_path / "tokenizer", [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    )
    assert load_chat_format(str(folder), None, None).template.text == CHATML
    (folder / "chat_template.jinja").write_text(MARKED)
    (folder / "config.json").write_text('{"vocab_size": 4096}')
    found = load_chat_format(str(folder), None, None)
    assert (found.template.text, found.vocab_size) == (MARKED, 4096)
    assert found.template.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    other = tmp_path / "other.jinja"
    other.write_text(CHATML)
    again = load_chat_format(str(folder), str(other), None)
    assert again.template.text == CHATML
    assert again.files != found.files


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer=.*there is no file tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer=.*tokenizer.json is no tokenizer"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
            "tokenizer_config.json is no object of JSON",
        ),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no chat template .*data.template=FILE"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"), "tokenizer=.*is no Jinja"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"chat_template": [{"name": "rag"}]}'),
            r"several chat templates \(rag\) and no default",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "tokenizer", CHATML)
    damage(folder)
    with pytest.raises(ValueError, match=said):
        load_chat_format(str(folder), None, None)


# --- rows ---


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_loses_none_and_needs_few_rows(lengths: list[int]) -> None:
    rows = pack_best_fit(lengths, 20)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < total <= 20 for total in filled)
    # No two rows would fit into one: each is begun for what had room in no other.
    assert all(a + b > 20 for at, a in enumerate(filled) for b in filled[:at])


def test_a_batch_says_which_token_belongs_to_which_conversation(tmp_path: Path) -> None:
    option = Chat(path=str(write_lines(tmp_path / "chat.jsonl", sums(40))), seq_len=127, eval_fraction=0.2)
    sources = option.sources()
    assert len(sources.train.texts) + len(sources.eval.texts) == 40
    for source in (sources.train, sources.eval):
        batch = source.take(np.arange(len(source)))
        assert {name: value.shape[1] for name, value in batch.items()} == dict.fromkeys(batch, 128)
        seen = []
        for tokens, answers, segments in zip(*batch.values(), strict=True):
            assert not tokens[segments == 0].any()
            assert not answers[segments == 0].any()
            for number in range(1, segments.max() + 1):
                here = segments == number
                text = bytes(tokens[here].astype(np.uint8)).decode()
                learnt = bytes(tokens[here][answers[here] > 0].astype(np.uint8)).decode()
                n = int(text.split("\n")[1].split(" ")[0])
                assert learnt == "=" * (n % 7) + f"{2 * n}<|end|>\n"
                assert text == f"<|user|>\n{n} + {n}?<|end|>\n<|assistant|>\n{learnt}"
                seen.append(n)
        assert len(seen) == len(source.texts)
        assert len(source) < len(source.texts)
    plain = replace(option, packing=False).sources()
    assert plain.train.take(np.array([0])).keys() == {"tokens", "answers"}
    assert len(plain.train) == len(sources.train.texts)


def test_the_same_conversation_is_on_one_side_alone(tmp_path: Path) -> None:
    rows = sums(30)
    few = Chat(path=str(write_lines(tmp_path / "few.jsonl", rows)), seq_len=100).sources()
    many = Chat(path=str(write_lines(tmp_path / "many.jsonl", rows * 3)), seq_len=100).sources()
    assert (len(many.train.texts), len(many.eval.texts)) == (3 * len(few.train.texts), 3 * len(few.eval.texts))
    two = Chat(path=str(write_lines(tmp_path / "two.jsonl", sums(2))), seq_len=100, eval_fraction=0.001).sources()
    assert (len(two.train.texts), len(two.eval.texts)) == (1, 1)


def test_named_parts_are_used(tmp_path: Path) -> None:
    for name, count in {"train": 9, "valid": 4, "test": 2}.items():
        write_lines(tmp_path / f"parts/{name}.jsonl", sums(count))
    option = Chat(path=str(tmp_path / "parts"), seq_len=100)
    option.check_readable()
    sources = option.sources()
    assert (len(sources.train.texts), len(sources.eval.texts)) == (9, 4)
    assert len(sources.held_out["test"].texts) == 2
    with pytest.raises(ValueError, match="eval_path=.*leave data.eval_path out"):
        replace(option, eval_path=str(tmp_path / "parts/test.jsonl")).sources()
    other = Chat(
        path=str(tmp_path / "parts/train.jsonl"), eval_path=str(tmp_path / "parts/test.jsonl"), seq_len=100
    ).sources()
    assert (len(other.train.texts), len(other.eval.texts)) == (9, 2)


def test_what_is_too_long_is_cut_left_out_or_refused(tmp_path: Path) -> None:
    late = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "late"}]}
    early = {"prompt": "Count.", "completion": "1 2 3 " * 60}
    file = write_lines(tmp_path / "long.jsonl", [*sums(20), late, early, early])
    option = Chat(path=str(file), seq_len=100, eval_fraction=0.001)
    cut = option.sources()
    assert (
        "3 longer than a row (up to 405 tokens): 2 cut, 1 left out, for no answer begins before the cut" in cut.summary
    )
    assert max(len(text.tokens) for text in cut.train.texts) == 101
    skipped = replace(option, too_long="skip").sources()
    assert "3 longer than a row (up to 405 tokens): 3 left out" in skipped.summary
    assert max(len(text.tokens) for text in skipped.train.texts) <= 101
    with pytest.raises(
        ValueError, match=r"line 2[123] has \d+ tokens, and a row has room for 101 \(3 conversations are longer\)"
    ):
        replace(option, too_long="raise").sources()


def test_other_tokens_are_other_data(tmp_path: Path) -> None:
    file, folder = write_lines(tmp_path / "chat.jsonl", sums(20)), write_chat_tokenizer(tmp_path / "tokenizer", CHATML)
    option = Chat(path=str(file), tokenizer=str(folder), seq_len=100)
    before = option.sources()
    assert before.fingerprint == option.sources().fingerprint
    (folder / "chat_template.jinja").write_text(MARKED)
    marked = option.sources()
    assert marked.fingerprint != before.fingerprint
    assert {name for name, entry in marked.files.items() if before.files[name] != entry} == {"chat template"}
    assert replace(option, date="2026-12-31").sources().fingerprint != marked.fingerprint
    write_lines(file, sums(21))
    assert option.sources().fingerprint != marked.fingerprint


# --- what is refused ---

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "is a list; expected an object"),
        ({"text": "hi"}, "has no messages.*and no prompt with its completion"),
        ({"messages": []}, "has no message"),
        ({"messages": "hi"}, "messages is text; expected a list of messages"),
        ({"messages": [USER]}, "ends with a message of user; expected one of assistant"),
        (
            {"messages": [USER, {"role": "asistant", "content": "x"}]},
            "message 2 of messages has the role 'asistant'; did you mean assistant",
        ),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "message 2 of messages is an empty answer"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "its content is null; expected text"),
        ({"messages": [USER, "ho"]}, "message 2 of messages is no message"),
        ({"prompt": "hi", "completion": ""}, "completion is an empty answer"),
        ({"prompt": "hi", "completion": 3}, "completion is a number"),
    ],
)
def test_a_line_that_is_no_conversation_is_told(row: Any, said: str, tmp_path: Path) -> None:
    rows = [*sums(3), row, *sums(2)]
    option = Chat(path=str(write_lines(tmp_path / "chat.jsonl", rows)), seq_len=100)
    for look in (option.check_readable, option.sources):
        with pytest.raises(ValueError, match=f"^path=.*chat.jsonl: line 4 .*({said})"):
            look()


def test_what_others_call_them_is_the_same_conversation() -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "5"},
    ]
    shared = [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]
    with_system = [{"from": "system", "value": "Be brief."}, *shared]
    parts = [
        {**message, "content": [{"type": "text", "text": each} for each in message["content"]]} for message in said
    ]
    for row in (
        {"messages": said},
        {"conversations": with_system},
        {"conversations": shared, "system": "Be brief."},
        {"conversations": said},
        {"messages": parts},
    ):
        assert list(read_conversation(row, only_last=False).messages) == said, row


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"conversations": [{"from": "gtp", "value": "5"}]},
            "message 1 of conversations is from 'gtp'; did you mean gpt?",
        ),
        ({"conversations": [{"from": "gpt", "text": "5"}]}, "conversations: its content is null; expected text"),
        ({"conversations": [{"from": "human", "value": "2 + 3?"}]}, "ends with a message of user"),
        ({"conversations": "2 + 3?"}, "conversations is text; expected a list"),
        ({"conversations": [{"from": "system", "value": "a"}], "system": "b"}, "leave one of them out"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "url": "a.png"}]}]},
            "a part of its content is of type 'image'; only",
        ),
        ({"messages": [{"role": "assistant", "content": ["5"]}]}, "a part of its content is text; only"),
        ({"messages": [{"role": "assistant", "content": []}]}, "messages is an empty answer"),
    ],
)
def test_what_is_none_of_theirs_is_told(row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("?", r"\?").replace("+", r"\+")):
        read_conversation(row, only_last=False)


def test_calls_of_tools_may_have_no_words(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    assert len(talk([USER, called, {"role": "tool", "content": "3"}, ANSWER]).messages) == 4


def test_a_date_is_one() -> None:
    with pytest.raises(ValueError, match="date=today is no date"):
        Chat(path="x", date="today")
