"""Text and tokens as other people have them: compressed, as JSON, in parts, with names and headers of their own."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import Text, Tokens
from data.compressed import strip_ending, unpack
from data.sources import Sources
from data.token_files import read_token_header
from runner.__main__ import main
from tests.places import texts

LINES = [f"the line {n} of a text, and {n * n} more\n" for n in range(60)]
WORDS = "".join(LINES).encode()
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def corpora(sources: Sources) -> list[bytes]:
    sides: list[Any] = [sources.train, sources.eval, *sources.held_out.values()]
    return [side.corpus.tobytes() for side in sides]


def rows(count: int = 60, field: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, field: line}) + "\n" for n, line in enumerate(LINES[:count])).encode()


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_what_is_compressed_is_read_as_what_is_in_it(ending: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(WORDS)
    plain = Text(path=str(tmp_path / "a.txt"), seq_len=8).sources()
    packed = tmp_path / f"packed/a.txt{ending}"
    packed.parent.mkdir()
    packed.write_bytes(COMPRESSORS[ending](WORDS[:500]) + COMPRESSORS[ending](WORDS[500:]))
    for path in (packed, packed.parent):
        option = Text(path=str(path), seq_len=8)
        option.check_readable()
        sources = option.sources()
        assert b"".join(corpora(sources)) == WORDS
        # It is the content that is compared when a run goes on: another compression is the same data.
        assert (sources.fingerprint, sources.files) == (plain.fingerprint, plain.files)
    packed.write_bytes(COMPRESSORS[ending](WORDS)[:-20])
    with pytest.raises(ValueError, match="is compressed and cannot be unpacked .*; copy it again"):
        Text(path=str(packed)).sources()


def test_zstd_is_unpacked_or_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\x28\xb5\x2f\xfd" + b"rest"
    for module in ("zstandard", "compression"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match="a.txt.zst: is compressed with zstd, which needs a package: pip install zst"):
        unpack(content, "a.txt.zst")


def test_an_ending_is_taken_off() -> None:
    names = ("a.txt.gz", "a.txt", "A.JSONL.XZ", ".gz", "a.tar.zst")
    assert [strip_ending(name) for name in names] == ["a.txt", "a.txt", "A.JSONL", "", "a.tar"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", rows()),
        ("a.ndjson", b"\xef\xbb\xbf" + rows().replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl.gz", gzip.compress(rows())),
        ("a.json", json.dumps([{"text": line} for line in LINES], indent=1).encode()),
        ("a.json", json.dumps([{"text": line} for line in LINES]).encode()),
    ],
)
def test_a_field_of_json_is_the_text(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    option = Text(path=str(tmp_path / name), seq_len=8)
    option.check_readable()
    assert b"".join(corpora(option.sources())) == b"".join(line.encode() + b"\n" for line in LINES)


@pytest.mark.parametrize(
    ("content", "field", "why"),
    [
        (rows(field="content"), None, "field: .* has the fields id, content; which of them is the text?"),
        (rows(field="content"), "contnt", "field=contnt is no field of .*; did you mean content?"),
        (rows(3) + b'{"id": 3}\n', "text", "field=text is no field of .*a.jsonl: line 4"),
        (rows(3) + b'{"text": 7}\n', None, "line 4: field text is a number; expected text"),
        (rows(3) + b'\n{"text": null}\n', None, "line 5: field text is null; expected text"),
        (rows(3) + b"{oh no\n", None, "line 4 is no JSON .*; expected an object on each line"),
        (b'"only"\n"texts"\n', None, "line 1 is text; expected an object"),
        (WORDS, "text", "line 1 is no JSON"),
    ],
)
def test_json_without_the_field_is_told_by_its_line(
    content: bytes, field: str | None, why: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=why) as caught:
        Text(path=str(tmp_path), pattern="*.jsonl", field=field).sources()
    assert len(str(caught.value).splitlines()) == 1


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", WORDS)
    return out.getvalue()


def tarred() -> bytes:
    import tarfile

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(WORDS)
        archive.addfile(entry, io.BytesIO(WORDS))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (zipped(), "a zip archive"),
        (tarred(), "a tar archive; unpack it"),
        (b"PAR1" + bytes(50), "a Parquet file"),
        (np.random.default_rng(0).integers(0, 50257, 4000).astype("<u2").tobytes(), "binary"),
        (np.arange(300, dtype=np.int32).tobytes(), "binary"),
        ("text of Windows".encode("utf-16"), "text in UTF-16"),
        (b"\x89PNG\r\n" + bytes(20), "an image"),
        (pickle.dumps({"vocab_size": 65, "stoi": {str(n): n for n in range(65)}}), "binary"),
    ],
)
def test_what_is_no_text_is_never_trained_on(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    option = Text(path=str(tmp_path), seq_len=8)
    for look in (option.check_readable, option.sources):
        with pytest.raises(ValueError, match=f"a.txt is no text: it is {what}") as caught:
            look()
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["smörgås, 日本語, \x1b[1m".encode(), "altes Ä".encode("latin-1"), b"a\tb\r\n\f"])
def test_any_text_is_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content * 30)
    assert b"".join(corpora(Text(path=str(tmp_path), seq_len=8).sources())) == content * 30


PARTS = {"train": WORDS[:1500], "valid": WORDS[1500:1800], "test": WORDS[1800:]}


@pytest.mark.parametrize("form", ["wiki.{}.txt", "{}.txt.gz", "{}/a.txt", "wikitext/{}/b.txt", "data-{}.txt"])
def test_the_parts_of_a_data_set_are_kept_apart(form: str, tmp_path: Path) -> None:
    for part, content in PARTS.items():
        file = tmp_path / form.format(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    sources = Text(path=str(tmp_path), seq_len=8).sources()
    assert corpora(sources) == [PARTS["train"], PARTS["valid"], PARTS["test"]]
    assert list(sources.held_out) == ["test"]
    assert "never trained on" in sources.summary


def test_without_a_part_to_evaluate_on_some_of_the_rest_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(PARTS["train"])
    (tmp_path / "test.txt").write_bytes(PARTS["test"])
    train, held_out, test = corpora(Text(path=str(tmp_path), seq_len=8, eval_fraction=0.1).sources())
    assert train + held_out == PARTS["train"]
    assert (len(train), test) == (1350, PARTS["test"])


def test_ordinary_names_are_read_as_before(tmp_path: Path) -> None:
    """A name alone says nothing: the same bytes on the same sides, and the same fingerprint, as ever."""
    for name in ("train_to_nowhere", "notes", "test", "b"):
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * 40)
    sources = Text(path=str(tmp_path), seq_len=4, eval_fraction=0.5).sources()
    assert sources.fingerprint == "a5c22051309e91fe8d1126b19e76273e24c438d1469adbc84ec0488cff79367d"
    assert not sources.held_out


def test_files_beside_the_parts_are_a_question(tmp_path: Path) -> None:
    for name in ("wiki.train.txt", "wiki.test.txt", "README.txt"):
        (tmp_path / name).write_bytes(WORDS)
    option = Text(path=str(tmp_path))
    for look in (option.check_readable, option.sources):
        with pytest.raises(ValueError, match="beside README.txt; choose with data.pattern, or name data.path and data"):
            look()
    assert "train" in Text(path=str(tmp_path), pattern="wiki.*.txt").sources().summary


def test_what_to_evaluate_on_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_bytes(PARTS["train"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/one.txt").write_bytes(PARTS["valid"])
    option = Text(path=str(tmp_path / "one.txt"), eval_path=str(tmp_path / "other"), seq_len=8)
    option.check_readable()
    sources = option.sources()
    assert corpora(sources) == [PARTS["train"], PARTS["valid"]]
    assert sources.files.keys() == {"one.txt", "eval_path/one.txt"}
    with pytest.raises(ValueError, match="eval_path=nowhere does not exist"):
        Text(path=str(tmp_path / "one.txt"), eval_path="nowhere").check_readable()
    for part, content in PARTS.items():
        (tmp_path / f"other/{part}.txt").write_bytes(content)
    (tmp_path / "other/one.txt").unlink()
    with pytest.raises(ValueError, match="has parts of its own; leave data.eval_path out"):
        Text(path=str(tmp_path / "other"), eval_path=str(tmp_path / "one.txt")).sources()


def test_what_there_is_instead_is_told(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(rows())
    (tmp_path / "README.md").write_text("about it")
    with pytest.raises(ValueError, match=r"it holds 3 .jsonl, 1 .md: say data.pattern='\*\*/\*.jsonl'"):
        Text(path=str(tmp_path)).check_readable()
    (tmp_path / "a.txt").write_bytes(WORDS)
    assert Text(path=str(tmp_path), seq_len=8).sources().summary.endswith("; not read: 3 .jsonl, 1 .md")
    # What macOS packs beside a file is none of the texts.
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/._a.txt").write_bytes(b"\0\5\x16\7" + bytes(60))
    (tmp_path / "._a.txt").write_bytes(b"\0\5\x16\7" + bytes(60))
    assert b"".join(corpora(Text(path=str(tmp_path), seq_len=8).sources())) == WORDS


@pytest.mark.parametrize(
    ("name", "way_out"),
    [("a.parquet", "data=parquet"), ("train.bin", "data=tokens"), ("a.jpg", "data=images"), ("a.md", "data.pattern=")],
)
def test_what_reads_other_files_is_said(name: str, way_out: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"it holds 1 .*: say {way_out}"):
        Text(path=str(tmp_path)).check_readable()


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(WORDS)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(WORDS))
    with pytest.raises(ValueError, match="is there twice, once compressed and once not"):
        Text(path=str(tmp_path), pattern="a*").sources()


def tokenize(*words: object) -> int:
    return main(["tokenize", *map(str, words)])


def test_tokenize_reads_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for part in PARTS:
        (source / f"{part}.jsonl.gz").write_bytes(
            gzip.compress(rows({"train": 40, "valid": 15, "test": 9}[part], "body"))
        )
    words = (source, "--to", tmp_path / "out", "--pattern", "*.gz", "--workers", 2)
    assert tokenize(*words) == 2
    assert "has the fields id, body; which of them is the text? say --field NAME" in capsys.readouterr().err
    assert tokenize(*words, "--field", "body") == 0
    header = read_token_header(tmp_path / "out")
    assert (header.train.documents, header.eval.documents) == (40, 15)
    tokens = np.fromfile(tmp_path / "out/train.bin", "<u2")
    # Each object is a document, ended by a token of its own.
    assert bytes(tokens[tokens < 256].astype(np.uint8)) == "".join(LINES[:40]).encode()
    assert (tokens == 256).sum() == 40
    assert "left out: 1 to test on (test.jsonl" in capsys.readouterr().out
    assert tokenize(texts(tmp_path / "t"), "--to", tmp_path / "o", "--pattern", "*.md") == 2
    assert "it holds 12 .txt: say --pattern '**/*.txt'" in capsys.readouterr().err


def nanogpt(folder: Path, **parts: np.ndarray) -> Path:
    folder.mkdir()
    for name, tokens in parts.items():
        tokens.astype("<u2").tofile(folder / f"{name}.bin")
    return folder


def llm_c(file: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    file.write_bytes(header.tobytes() + tokens.astype("<u4" if magic == 20240801 else "<u2").tobytes())


TOKENS = np.random.default_rng(1).integers(0, 65, 2000)


def test_files_of_nanogpt_are_two_byte_numbers(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "char", train=TOKENS[:1800], val=TOKENS[1800:])
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "RAN").encode() + b"'\ntR.")
    option = Tokens(path=str(folder), seq_len=9)
    option.check_readable()
    sources = option.sources()
    assert (sources.num_outputs, len(sources.train), len(sources.eval)) == (65, 199, 22)
    assert sources.train.take(np.array([1]))["tokens"].tolist() == [TOKENS[9:19].tolist()]
    assert sources.eval.take(np.array([0]))["tokens"].tolist() == [TOKENS[1800:1810].tolist()]
    assert sources.summary == (
        "1,800 + 200 tokens (train + eval) as uint16, without tokens.json; vocabulary of 65, by the largest token; "
        "meta.pkl is not read, for that would run code"
    )
    assert not (tmp_path / "RAN").exists()
    assert Tokens(path=str(folder), vocab_size=100).sources().num_outputs == 100
    with pytest.raises(ValueError, match="holds the token 6[0-4], but its vocabulary has 50"):
        Tokens(path=str(folder), vocab_size=50, seq_len=9).sources()
    with pytest.raises(ValueError, match="encoding=bytes, but .* has no tokens.json"):
        Tokens(path=str(folder), encoding="bytes").check_readable()
    with pytest.raises(ValueError, match="is a file; expected the folder that it is in"):
        Tokens(path=str(folder / "train.bin")).check_readable()


def test_without_val_bin_the_end_is_to_evaluate_on(tmp_path: Path) -> None:
    folder = nanogpt(tmp_path / "char", train=TOKENS, test=TOKENS[:100])
    sources = Tokens(path=str(folder), seq_len=9).sources()
    assert (len(sources.train), len(sources.eval), len(sources.held_out["test"])) == (210, 12, 11)
    last = sources.eval.take(np.array([11]))["tokens"]
    assert last.tolist() == [TOKENS[221 * 9 : 222 * 9 + 1].tolist()]
    assert "the last 5% of it to evaluate on" in sources.summary


def test_headers_are_never_read_as_tokens(tmp_path: Path) -> None:
    for number in range(3):
        llm_c(tmp_path / f"fineweb_train_00000{number}.bin", TOKENS[number * 500 : number * 500 + 500])
    llm_c(tmp_path / "fineweb_val_000000.bin", TOKENS[1500:])
    sources = Tokens(path=str(tmp_path), seq_len=9, vocab_size=50257).sources()
    # 55 windows in each file; none goes from one into the next.
    assert (len(sources.train), len(sources.eval), sources.num_outputs) == (165, 55, 50257)
    rows = sources.train.take(np.array([164, 0, 55, 54]))["tokens"]
    assert [row.tolist() for row in rows] == [
        TOKENS[start : start + 10].tolist() for start in (1000 + 54 * 9, 0, 500, 54 * 9)
    ]
    assert pickle.loads(pickle.dumps(sources.train)).take(np.array([55]))["tokens"].tolist() == [rows[2].tolist()]


def test_four_byte_tokens_behind_a_header(tmp_path: Path) -> None:
    llm_c(tmp_path / "train.bin", TOKENS + 100_000, 20240801, 7)
    llm_c(tmp_path / "val.bin", TOKENS[:50] + 100_000, 20240801, 7)
    sources = Tokens(path=str(tmp_path), seq_len=9).sources()
    row = sources.train.take(np.array([2]))["tokens"]
    assert (row.dtype, row[0, 0], sources.num_outputs) == (np.int32, TOKENS[18] + 100_000, 100_065)


def test_tokens_of_two_types_are_refused(tmp_path: Path) -> None:
    llm_c(tmp_path / "train.bin", TOKENS, 20240801, 7)
    llm_c(tmp_path / "val.bin", TOKENS)
    with pytest.raises(ValueError, match="val.bin holds uint16, train.bin uint32; expected one type"):
        Tokens(path=str(tmp_path)).sources()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda file: llm_c(file, TOKENS, version=3), "has a header of version 3, which is not known"),
        (lambda file: llm_c(file, TOKENS, count=9), "has 5,024 bytes; its header says 1,042"),
        (lambda file: TOKENS.astype("<u4").tofile(file), "seems to hold numbers of four bytes; expected two"),
        (lambda file: TOKENS.astype("<i8").tofile(file), "seems to hold numbers of four bytes; expected two"),
        (lambda file: file.write_bytes(b"abc"), "has 3 bytes, which are no numbers of two bytes each"),
        (lambda file: file.write_bytes(zipped() + b"x" * (len(zipped()) % 2)), "holds no tokens: it is a zip archive"),
    ],
)
def test_other_files_called_bin_are_refused(make: Callable[[Path], object], why: str, tmp_path: Path) -> None:
    make(tmp_path / "train.bin")
    TOKENS[:50].astype("<u2").tofile(tmp_path / "val.bin")
    for look in (Tokens(path=str(tmp_path)).check_readable, Tokens(path=str(tmp_path)).sources):
        with pytest.raises(ValueError, match=why):
            look()


def test_a_folder_of_neither_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / "val.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="holds no token files .*; python -m runner tokenize PATH --to DIR"):
        Tokens(path=str(tmp_path)).check_readable()
