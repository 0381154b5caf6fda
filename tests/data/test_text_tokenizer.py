"""Text as tokens of a tokenizer: what ends a document, and runs that began before anything did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import Hub, Text
from data.text_tokenizer import TextTokenizer
from runner.config.identity import hash_config
from runner.rundir.layout import RunDir
from runner.train.dataset import _read_again, read_as_before, record_or_compare
from tests.conftest import composed
from tests.hf_folders import write_tokenizer

DOCUMENTS = [f"document {number} says: {'one two three ' * number}\n" for number in range(1, 40)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer, `tok`, whose token 0 ends a document."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("".join(DOCUMENTS))
    write_tokenizer(tmp_path / "tok", tmp_path / "corpus.txt")
    return tmp_path


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def expected(texts: list[str]) -> list[int]:
    tokenizer = TextTokenizer(Path("tok/tokenizer.json"))
    tokens: list[int] = []
    for text in texts:
        tokens += [*([0] if tokens else []), *tokenizer.encode(np.frombuffer(text.encode(), np.uint8))]
    return tokens


def test_a_token_stands_between_two_documents(place: Path) -> None:
    """Each object of JSON is one, and each file of text, on the side that it is on."""
    lines = write_lines(place / "lines.jsonl", DOCUMENTS)
    held_out = write_lines(place / "held.jsonl", DOCUMENTS[:3])
    made = Text(path=str(lines), eval_path=str(held_out), tokenizer="tok", seq_len=8).sources()
    assert made.train.corpus.tolist() == expected(DOCUMENTS)  # type: ignore[attr-defined]
    assert made.eval.corpus.tolist() == expected(DOCUMENTS[:3])  # type: ignore[attr-defined]
    (place / "files/train").mkdir(parents=True)
    (place / "files/test").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (place / f"files/{'test' if number > 30 else 'train'}/{number:02}.txt").write_text(text)
    made = Text(path="files", tokenizer="tok", seq_len=8, eval_fraction=1e-9).sources()
    # Cut where the bytes say, within a document: that one goes on, on the other side.
    tokens = [*made.train.corpus.tolist(), *made.eval.corpus.tolist()]  # type: ignore[attr-defined]
    assert tokens.count(0) == 30
    assert made.held_out["test"].corpus.tolist() == expected(DOCUMENTS[31:])  # type: ignore[attr-defined]


def test_rows_of_a_dataset_are_documents(place: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"body": DOCUMENTS})
    datasets.DatasetDict({"train": split, "validation": split.select(range(5))}).save_to_disk(str(place / "hub"))
    option = Hub(path="hub", gives="tokens", inputs="body", tokenizer="tok", seq_len=8)
    made = option.sources()
    assert made.train.corpus.tolist() == expected(DOCUMENTS)  # type: ignore[attr-defined]
    assert made.eval.corpus.tolist() == expected(DOCUMENTS[:5])  # type: ignore[attr-defined]
    assert [each.eos for each in option.list_earlier()] == [False, False]
    assert [each.eval_split for each in option.list_earlier()] == [None, "none"]


def test_a_tokenizer_without_one_is_told(place: Path) -> None:
    lines = write_lines(place / "lines.jsonl", DOCUMENTS)
    said = json.loads((place / "tok/tokenizer.json").read_text())
    (place / "tok/tokenizer_config.json").unlink()
    with_end = Text(path=str(lines), tokenizer="tok", seq_len=8).sources()
    # A name that everybody has for it is taken where nothing says another.
    assert "ends a document" in with_end.summary
    said["added_tokens"][0]["content"] = "</s>"
    said["model"]["vocab"]["</s>"] = said["model"]["vocab"].pop("<|end|>")
    (place / "tok/tokenizer.json").write_text(json.dumps(said))
    named = Text(path=str(lines), tokenizer="tok", seq_len=8).sources()
    assert "ends a document" not in named.summary
    assert named.train.corpus.tolist().count(0) > 20  # type: ignore[attr-defined]


def test_a_run_that_began_before_keeps_its_data(place: Path) -> None:
    lines = write_lines(place / "lines.jsonl", DOCUMENTS)
    option = Text(path=str(lines), tokenizer="tok", seq_len=8, batch_size=4)
    before, run = Text(path=str(lines), tokenizer="tok", seq_len=8, batch_size=4, eos=False), RunDir(place / "run")
    (run.checkpoints / "10").mkdir(parents=True)
    older = before.sources()

    assert 0 not in older.train.corpus  # type: ignore[attr-defined]
    record_or_compare(run, older)
    sources = read_as_before(option, run)
    assert sources is not None
    assert sources.fingerprint == older.fingerprint != option.sources().fingerprint
    assert record_or_compare(run, sources) == []
    # So does a process that makes batches.
    again = _read_again(option, older.fingerprint, {}, "")
    np.testing.assert_array_equal(again.corpus, older.train.corpus)  # type: ignore[attr-defined]
    # The run is called what it was called.
    words = ("data=text", "data.path=lines.jsonl", "+data.tokenizer=tok")
    document = composed(*words).document
    bare = {**document, "data": {key: value for key, value in document["data"].items() if key != "eos"}}
    assert hash_config(document) == hash_config(bare)
    assert hash_config(composed(*words, "+data.eos=false").document) != hash_config(bare)
