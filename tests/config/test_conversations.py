"""Data that is there for one objective, and objectives that need such data."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.chat_template import PLAIN_TEMPLATE
from runner.errors import ConfigError
from tests.conftest import composed
from tests.hf_folders import write_llama
from tests.places import MADE, a_chat, a_preferences, write_chat_tokenizer


@pytest.fixture
def chat(tmp_path: Path) -> str:
    return f"data.path={a_chat(tmp_path).path}"


def test_conversations_choose_their_objective(chat: str) -> None:
    for words in ((), ("objective=sft",), ("data.packing=false",)):
        assert composed("data=chat", chat, *words).data.objective == "sft"


def test_pairs_choose_theirs(tmp_path: Path) -> None:
    pairs = f"data.path={a_preferences(tmp_path).path}"
    for words in ((), ("objective=dpo", "objective.beta=0.5"), ("score.metric=eval/margin", "score.mode=max")):
        assert composed("data=preferences", pairs, *words).data.objective == "dpo"


@pytest.mark.parametrize("kind", ["chat", "preferences"])
def test_a_folder_of_a_model_says_the_tokenizer(kind: str, tmp_path: Path) -> None:
    folder = str(write_llama(write_chat_tokenizer(tmp_path / "base", PLAIN_TEMPLATE), vocab=400))
    path = f"data.path={MADE[kind](tmp_path).path}"
    words = (f"data={kind}", path, "model=hf", f"model.path={folder}")
    assert composed(*words).data.tokenizer == folder
    assert composed(*words, "data.tokenizer=bytes").data.load_format().vocab_size == 256
    # A folder without one is no reason to take bytes in silence.
    (tmp_path / "base/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"data.tokenizer=.*tokenizer.json"):
        composed(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data=chat", "objective=next_token"), "data=chat is there for objective=sft"),
        (("data=stdlib", "objective=sft"), "objective=sft learns from conversations; say data=chat"),
        (("data=chat", "model=mlp"), "model=mlp takes features or images, but data=chat gives tokens"),
        (
            ("data=chat", "+model.attention=cudnn", "train.precision=bf16", "model.width=128"),
            "choose xla, or say data.packing=false",
        ),
        (("data=chat", "data.tokenizer=nowhere"), "data.tokenizer=nowhere is no folder"),
        (("data=chat", "data.template=nowhere.jinja"), "data.template=nowhere.jinja: there is no file"),
        (("data=chat", "objective=dpo"), "data=chat is there for objective=sft"),
        (("data=stdlib", "objective=dpo"), "objective=dpo learns from pairs of answers; say data=preferences"),
        (("data=preferences", "objective=sft"), "data=preferences is there for objective=dpo"),
        (
            ("data=preferences", "objective=distill", "objective.teacher=RUN"),
            "data=preferences is there for objective=dpo",
        ),
        (("data=preferences", "score.metric=eval/bits_per_byte"), "eval.eval does not measure that"),
        (("data=chat", "score.metric=eval/accuracy"), "eval.eval does not measure that"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], said: str, chat: str, tmp_path: Path) -> None:
    paths = {"data=chat": chat, "data=preferences": f"data.path={a_preferences(tmp_path).path}"}
    with pytest.raises(ConfigError, match=said):
        composed(*words, *(paths[word] for word in words if word in paths))
