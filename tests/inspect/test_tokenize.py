"""Text becomes tokens: the same bytes whatever the number of processes, all of them or nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import Tokens
from data.encodings import EncodingChoice
from data.token_files import read_token_header
from runner.__main__ import main
from tests.places import texts


def verb(*words: object) -> int:
    return main(["tokenize", *map(str, words)])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    source = texts(tmp_path / "texts", 40)
    for workers in (1, 2):
        assert verb(source, "--to", tmp_path / f"by{workers}", "--workers", workers, "--eval-fraction", 0.2) == 0
    assert digests(tmp_path / "by1") == digests(tmp_path / "by2")
    assert not list(tmp_path.glob(".by*"))


def test_every_document_is_there_once_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = texts(tmp_path / "texts")
    verb(source, "--to", tmp_path / "out", "--eval-fraction", 0.3, "--workers", 1)
    assert "from 12 documents (" in capsys.readouterr().out
    header = read_token_header(tmp_path / "out")
    found: list[bytes] = []
    for side in ("train", "eval"):
        tokens = np.fromfile(tmp_path / f"out/{side}.bin", header.dtype)
        ends = np.flatnonzero(tokens == header.eos)
        assert ends[-1] == len(tokens) - 1
        parts = np.split(tokens, ends + 1)[:-1]
        assert len(parts) == getattr(header, side).documents > 0
        found += [part[:-1].astype(np.uint8).tobytes() for part in parts]
        assert getattr(header, side).text_bytes == sum(len(part) - 1 for part in parts)
    assert sorted(found) == sorted(file.read_bytes() for file in source.iterdir())


def test_new_documents_move_no_old_ones(tmp_path: Path) -> None:
    def held_out(count: int) -> set[str]:
        source = texts(tmp_path / f"{count}", count)
        verb(source, "--to", tmp_path / f"out{count}", "--eval-fraction", 0.3, "--workers", 1)
        sources = Tokens(path=str(tmp_path / f"out{count}"), seq_len=1).sources()
        text = sources.decode(np.fromfile(tmp_path / f"out{count}/eval.bin", "<u2"))  # type: ignore[misc]
        return {file.name for file in source.iterdir() if file.read_text() in text}

    few, many = held_out(20), held_out(40)
    assert few == {name for name in many if int(name[:2]) < 20}
    assert len(many) > len(few) > 0


def test_one_document_is_cut(tmp_path: Path) -> None:
    texts(tmp_path / "texts", 1)
    verb(tmp_path / "texts/00.txt", "--to", tmp_path / "out", "--eval-fraction", 0.25, "--no-eos", "--workers", 2)
    header = read_token_header(tmp_path / "out")
    whole = b"".join((tmp_path / f"out/{side}.bin").read_bytes() for side in ("train", "eval"))
    assert whole == (tmp_path / "texts/00.txt").read_bytes()
    assert header.dtype == np.uint8
    assert header.eval.tokens == header.eval.text_bytes == len(whole) - int(len(whole) * 0.75)


def test_a_trained_tokenizer_makes_fewer_tokens_and_comes_along(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    source, file = texts(tmp_path / "texts"), tmp_path / "bpe.json"
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(path) for path in source.iterdir()], trainer)
    made.save(str(file))
    for workers in (1, 2):
        assert (
            verb(source, "--to", tmp_path / f"by{workers}", "--encoding", f"tokenizers:{file}", "--workers", workers)
            == 0
        )
    assert digests(tmp_path / "by1") == digests(tmp_path / "by2")
    file.unlink()
    sources = Tokens(path=str(tmp_path / "by1"), seq_len=8).sources()
    assert sources.num_outputs == made.get_vocab_size() > 257
    text = sources.decode(sources.train.take(np.array([0]))["tokens"][0])  # type: ignore[misc]
    assert text in (source / "00.txt").read_text()
    header = read_token_header(tmp_path / "by1")
    assert header.encoding.startswith("tokenizers:")
    assert header.train.tokens < header.train.text_bytes / 1.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: does not exist"),
        (["texts", "--pattern", "*.md"], "texts: holds no file that matches --pattern '*.md'"),
        (["texts", "--encoding", "morse"], "--encoding morse: expected bytes, tokenizers:FILE.json or tiktoken:NAME"),
        (["texts", "--encoding", "tokenizers:x.json"], "--encoding tokenizers:x.json: no such file"),
        (["texts", "--encoding", "tokenizers:texts/00.txt"], "--encoding tokenizers:texts/00.txt: is no tokenizer"),
        (["texts", "--eval-fraction", "1"], "tokenize: --eval-fraction is between 0 and 1, and --workers 1 or more"),
        (["texts", "--to", "texts"], "texts: is there already, and not empty; name a new directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "texts", 2)
    assert verb("--to", "out", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert len(said.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"texts"}


def test_tiktoken_says_when_it_has_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")

    def unreachable(name: str) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(
        ValueError, match="must be fetched from the internet once, and that failed .*TIKTOKEN_CACHE_DIR"
    ):
        EncodingChoice("tiktoken:gpt2").load()
    with pytest.raises(ValueError, match="there are .*gpt2"):
        EncodingChoice("tiktoken:gpt9").load()


def test_json_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verb(texts(tmp_path / "texts"), "--to", tmp_path / "out", "--workers", 1, "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["vocab_size"] == 257
    assert document["train"]["tokens"] == document["train"]["text_bytes"] + document["train"]["documents"]
