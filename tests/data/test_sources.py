"""Every source gives what it says, is the same data only while it is, and says in one line what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import Arrayrecord, Arrays, Hub, Images, Parquet, Synthetic, Text, Tokens
from data.data_errors import UnreadableError
from data.fingerprint import fold_into_folders, identify_file
from data.token_files import read_token_header
from runner.errors import ConfigError, RefusedError
from runner.inspect.load_model import load_model
from runner.launch.main import main
from runner.rundir.layout import RunDir
from runner.train.dataset import (
    describe_changes,
    read_data_record,
    read_sources,
    record_or_compare,
    sources_as_recorded,
)
from tests.conftest import Door
from tests.places import MADE, SIZE, VARIED, an_arrays, command, examples, texts


@pytest.mark.parametrize("kind", MADE)
def test_a_source_gives_what_it_says(kind: str, tmp_path: Path) -> None:
    option = MADE[kind](tmp_path)
    if hasattr(option, "check_readable"):
        option.check_readable()
    sources = option.sources()
    batch = sources.train.take(np.array([0, 3, 1]))
    if option.gives == "tokens":
        (seq,) = sources.inputs
        assert seq == option.seq_len
        # Of a pair of answers, both.
        assert batch["tokens"].shape == (3, *((2,) if kind == "preferences" else ()), seq + 1)
        assert batch["tokens"].max() < sources.num_outputs
        assert sources.decode is not None
        assert "and" in sources.decode(batch["tokens"].reshape(-1, seq + 1)[0]) or kind == "stdlib"
    else:
        assert batch["inputs"].shape == (3, *sources.inputs)
        assert batch["inputs"].dtype == np.float32
        assert batch["label"].dtype == np.int32
        assert len(sources.inputs) == {"images": 3, "features": 1}[option.gives]
        seen = sources.train.take(np.arange(len(sources.train)))["label"]
        assert set(seen.tolist()) == set(range(sources.num_outputs))
    assert len(sources.eval) > 0
    again = option.sources()
    assert (again.fingerprint, again.files) == (sources.fingerprint, sources.files)
    assert all(len(content.split()) == 2 and int(content.split()[0]) >= 0 for content in sources.files.values())


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind not in ("digits", "stdlib", "text")])
def test_a_model_trains_on_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the YAML to a finished run, in this process: the door itself is tested elsewhere."""
    monkeypatch.chdir(tmp_path)
    option = MADE[kind](tmp_path)
    small = ("model.width=16", "log.tensorboard=false", "train.steps=2", "train.eval_steps=1", "train.eval_batches=1")
    language = ("model.num_layers=1", "model.num_heads=1", "model.hidden=16") if option.gives == "tokens" else ()
    assert main([*command(option), *small, *language]) == 0
    (status,) = tmp_path.glob("outputs/*/*/status.json")
    assert json.loads(status.read_text())["state"] == "finished"
    written = read_data_record(RunDir(status.parent))
    assert written is not None
    assert written["inputs"] == list(option.sources().inputs)
    if kind == "tokens":
        lines = map(json.loads, (status.parent / "logs/metrics.jsonl").read_text().splitlines())
        measured = [line for line in lines if line["split"] == "eval"][-1]
        header = read_token_header(Path(option.path))
        per_byte = measured["bits_per_token"] * header.eval.tokens / header.eval.text_bytes
        assert abs(measured["bits_per_byte"] - per_byte) < 1e-6


def everything(sources: Any) -> list[tuple[bytes, int]]:
    """Every example of both sides, in no order."""
    taken = [side.take(np.arange(len(side))) for side in (sources.train, sources.eval)]
    return sorted(
        (row.tobytes(), int(label)) for side in taken for row, label in zip(side["inputs"], side["label"], strict=True)
    )


@pytest.mark.parametrize("kind", ["arrays", "images", "arrayrecord"])
def test_no_example_is_lost_or_on_both_sides(kind: str, tmp_path: Path) -> None:
    inputs, label = examples()
    expected = sorted(
        ((row.astype(np.float32) / np.float32(255)).tobytes(), int(which))
        for row, which in zip(inputs, label, strict=True)
    )
    assert everything(MADE[kind](tmp_path).sources()) == expected


def test_arrays_may_bring_their_own_evaluation(tmp_path: Path) -> None:
    inputs, label = examples(12)
    sources = an_arrays(tmp_path, eval_inputs=inputs, eval_label=label).sources()
    assert (len(sources.train), len(sources.eval)) == (SIZE, 12)
    np.savez(tmp_path / "grey.npz", inputs=inputs[..., 0], label=label)
    assert Arrays(path=str(tmp_path / "grey.npz")).sources().inputs == (8, 8, 1)


def test_parquet_takes_columns_of_numbers_and_encoded_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    option = MADE["images"](tmp_path)
    files = sorted(Path(option.path).rglob("*.png"))
    encoded = [{"bytes": file.read_bytes(), "path": None} for file in files]
    table = {"image": encoded, "a": range(SIZE), "b": np.arange(SIZE) / 2, "y": np.arange(SIZE) % 3}
    pq.write_table(pa.table(table), tmp_path / "all.parquet")
    columns = Parquet(path=str(tmp_path), inputs=("b", "a"), label="y", gives="features").sources()
    rows = columns.train.take(np.arange(5))["inputs"]
    assert (rows[:, 0] * 2 == rows[:, 1]).all()
    images = Parquet(path=str(tmp_path / "all.parquet"), inputs="image", label="y", size=8).sources()
    kept = {pixels for pixels, _ in everything(images)}
    assert kept == {pixels for pixels, _ in everything(option.sources())}


def test_the_hub_gives_images_and_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = sorted(Path(MADE["images"](tmp_path).path).rglob("*.png"))
    made = datasets.Dataset.from_dict(
        {
            "image": [str(file) for file in files],
            "label": [0, 1] * (SIZE // 2),
            "text": [f"line {n}" for n in range(SIZE)],
        }
    ).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": made, "test": made.select(range(20))}).save_to_disk(str(tmp_path / "hub"))
    images = Hub(path=str(tmp_path / "hub"), size=8, eval_split="test").sources()
    assert (len(images.train), len(images.eval), images.num_outputs) == (SIZE, 20, 2)
    assert images.train.take(np.arange(4))["inputs"].shape == (4, 8, 8, 3)
    text = Hub(path=str(tmp_path / "hub"), gives="tokens", inputs="text", seq_len=8).sources()
    assert text.decode is not None
    assert text.decode(text.train.take(np.array([0]))["tokens"][0]) == "line 0\nli"
    with pytest.raises(ValueError, match="has no split dev; it has: train, test"):
        Hub(path=str(tmp_path / "hub"), split="dev").sources()


def changed(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def wrong_vocabulary(root: Path) -> Tokens:
    option: Tokens = MADE["tokens"](root)
    path = root / "tokens/train.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[:] = 300
    tokens.tofile(path)
    return option


def torn(root: Path) -> Tokens:
    option: Tokens = MADE["tokens"](root)
    (root / "tokens/train.bin").write_bytes(b"abc")
    return option


def with_an_unreadable_image(root: Path) -> Images:
    option: Images = MADE["images"](root)
    (root / "images/cat/x.png").write_text("no image")
    return option


def with_an_empty_class(root: Path) -> Images:
    option: Images = MADE["images"](root)
    (root / "images/emu").mkdir()
    return option


def file(name: str, content: str = "nothing") -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_text(content)
        return str(root / name)

    return make


def folder(root: Path) -> str:
    (root / "empty").mkdir()
    return str(root / "empty")


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda root: Text(path="nowhere"), "path=nowhere does not exist"),
    (lambda root: Text(path=folder(root)), "holds no file that matches pattern=**/*.txt"),
    (lambda root: Tokens(path=folder(root)), "holds no token files (no valid tokens.json)"),
    (lambda root: replace(MADE["tokens"](root), encoding="tiktoken:gpt2"), "holds tokens of bytes; tokenize again"),
    (torn, "train.bin has 3 bytes; expected "),
    (wrong_vocabulary, "holds the token 300, but its vocabulary has 257"),
    (lambda root: Arrays(path=file("a.npz")(root)), "is no .npz; write it with"),
    (lambda root: an_arrays(root, label=np.zeros(5, int)), "label is int64 of shape (5,); expected whole numbers of"),
    (lambda root: an_arrays(root, label=np.zeros(SIZE, complex)), "label is complex128 of shape"),
    (lambda root: an_arrays(root, inputs=np.zeros((SIZE, 4))), "which is no images; say data.gives=features"),
    (lambda root: an_arrays(root, inputs=np.array(["a"] * SIZE)), "inputs has shape (90,), which is no images"),
    (lambda root: an_arrays(root, label=np.arange(SIZE) - 1), "a label is -1; expected 0 or more"),
    (
        lambda root: replace(an_arrays(root), num_classes=2),
        "a label is 2; expected 0 or more, and less than num_classes=2",
    ),
    (lambda root: Images(path=folder(root)), "holds no folder; expected one with images for each class"),
    (lambda root: Images(path=file("a.png")(root)), "is a file; expected a folder"),
    (with_an_unreadable_image, "cat/x.png: is no image that can be read (unknown format)"),
    (with_an_empty_class, "images/emu holds no .png, .jpg, .jpeg"),
    (lambda root: Parquet(path=folder(root)), "holds no .parquet file"),
    (lambda root: Parquet(path=file("a.parquet")(root)), "is no Parquet file"),
    (lambda root: replace(MADE["parquet"](root), inputs="z"), "inputs=z is no column of"),
    (lambda root: replace(MADE["parquet"](root), gives="images"), "which is no images; say data.gives=features"),
    (lambda root: Arrayrecord(path=folder(root)), "holds no .array_record file"),
    (lambda root: Arrayrecord(path=file("a.array_record")(root), num_classes=3), "is no ArrayRecord file"),
    (lambda root: replace(MADE["arrayrecord"](root), num_classes=None), "data.num_classes=N"),
    (lambda root: replace(MADE["arrayrecord"](root), num_classes=2), "a label is 2; expected"),
    (lambda root: Hub(path=folder(root)), "is a folder that save_to_disk did not write"),
    (lambda root: replace(MADE["hub"](root), inputs="pixels"), "inputs=pixels is no column of train"),
]


def _looked_at_and_read(option: Any) -> None:
    option.check_readable()
    read_sources(option)


@pytest.mark.parametrize(("make", "part"), WRONG, ids=[part[:30] for _, part in WRONG])
def test_what_is_wrong_is_said_in_a_line(make: Callable[[Path], Any], part: str, tmp_path: Path) -> None:
    option = make(tmp_path)
    with pytest.raises((ValueError, ConfigError)) as caught:
        _looked_at_and_read(option)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300 + 2 * len(str(tmp_path))


def test_what_varies_images_varies_nothing_else() -> None:
    with pytest.raises(ValueError, match="augment varies images, but these are features"):
        Synthetic(gives="features", augment=VARIED)


def test_an_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    sources = MADE["images"](tmp_path).sources()
    broken = sources.train.names[3]
    Path(broken).write_bytes(Path(broken).read_bytes()[:60])
    with pytest.raises(UnreadableError, match=f"{broken}: is no image that can be read"):
        sources.train.take(np.arange(5))
    Path(broken).unlink()
    with pytest.raises(UnreadableError, match="No such file or directory; bring it back"):
        sources.train.take(np.arange(5))


CHANGES: dict[str, Callable[[Path], None]] = {
    "text": lambda root: changed(root / "texts/03.txt"),
    "chat": lambda root: changed(root / "chat.jsonl", 50),
    "preferences": lambda root: changed(root / "pairs.jsonl", 30),
    "tokens": lambda root: changed(root / "tokens/eval.bin"),
    "arrays": lambda root: (np.savez(root / "arrays.npz", inputs=examples()[0], label=examples()[1][::-1]), None)[1],
    "images": lambda root: (root / "images/cat/0.png").rename(root / "images/dog/0.png") and None,
    "parquet": lambda root: changed(root / "table.parquet", 40),
    "csv": lambda root: changed(root / "table.csv", 20),
    "arrayrecord": lambda root: changed(root / "data.array_record", 200),
    "hub": lambda root: changed(next((root / "hub").glob("*.arrow")), -600),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_data_is_refused_and_named(kind: str, tmp_path: Path) -> None:
    option, run = MADE[kind](tmp_path), RunDir(tmp_path / "run")
    run.path.mkdir()
    record_or_compare(run, option.sources())
    (run.checkpoints / "10").mkdir(parents=True)
    record_or_compare(run, option.sources())
    CHANGES[kind](tmp_path)
    try:
        now = option.sources()
    except ValueError:
        return  # changed so that it cannot even be read
    with pytest.raises(RefusedError, match="the data is not what this run was trained on: ") as caught:
        record_or_compare(run, now)
    name = {"text": "03.txt", "tokens": "eval.bin", "images": "dog/0.png", "arrays": "arrays.npz"}.get(kind, "")
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_differences_are_named_but_not_by_the_thousand() -> None:
    before = {"a": "10 x", "b": "4100 x", "c": "7 x", **{f"old{n:04}": "1 x" for n in range(2000)}}
    now = {"a": "10 y", "b": "4200 x", "c": "7 x", "d": "1 x"}
    assert describe_changes(before, now) == (
        "2 changed: a (still 10 bytes, other content), b (4.1 kB → 4.2 kB); new: d; "
        "2,000 gone: old0000, old0001, old0002 and 1,997 more"
    )


def test_a_run_that_has_trained_on_nothing_may_begin_with_other_data(tmp_path: Path) -> None:
    run, option = RunDir(tmp_path / "run"), MADE["text"](tmp_path)
    run.path.mkdir()
    record_or_compare(run, option.sources())
    before = read_data_record(run)
    changed(tmp_path / "texts/00.txt")
    record_or_compare(run, option.sources())
    after = read_data_record(run)
    assert before is not None
    assert after is not None
    assert before["fingerprint"] != after["fingerprint"]
    assert json.loads(run.data.read_text())["files"].keys() == {f"{n:02}.txt" for n in range(12)}


def test_a_record_may_hold_anything(tmp_path: Path) -> None:
    """data.json of somebody else, or after a power loss: what is not of its type is as if it were not there."""
    run, option = RunDir(tmp_path / "run"), MADE["text"](tmp_path)
    (run.checkpoints / "10").mkdir(parents=True)
    record_or_compare(run, option.sources())
    good = json.loads(run.data.read_text())
    for content in (b"", b"[]", b"\xff", b"[" * 20_000, b'{"fingerprint": 7}', b"null", b'{"a": ' + b"9" * 5000 + b"}"):
        run.data.write_bytes(content)
        assert read_data_record(run) is None
        assert sources_as_recorded(run) is None
        # Whatever was there: what the data is now is written down, and each checkpoint says what it was trained on.
        record_or_compare(run, option.sources())
        assert json.loads(run.data.read_text()) == good
    run.data.write_text(json.dumps({**good, "fingerprint": "another", "files": {"00.txt": "x y", "\x1b[2J": "1 x"}}))
    with pytest.raises(RefusedError, match="changed: 00.txt .other content.; 11 new: ") as caught:
        record_or_compare(run, option.sources())
    assert "gone: ·[2J" in str(caught.value)
    assert str(caught.value).isprintable()
    run.data.write_text(json.dumps({**good, "fingerprint": "another", "files": 7}))
    with pytest.raises(RefusedError, match="the data is not what this run was trained on"):
        record_or_compare(run, option.sources())


@pytest.mark.parametrize(
    "odd",
    [
        {"example": {"x": ["float32", 1 << 40]}},
        {"example": {"x": ["object", 3]}},
        {"example": {"x": ["no such type", 3]}},
        {"example": {"x": ["float32", *[1] * 100]}},
        {"example": {"x": ["float32", -1]}},
        {"example": {"x": []}},
        {"example": 7},
        {"inputs": ["a"]},
        {"inputs": 3},
        {"num_outputs": 10**400},
        {"num_outputs": None},
    ],
    ids=str,
)
def test_an_example_that_is_none_is_not_made(odd: dict[str, Any], tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    good = {"fingerprint": "f", "example": {"x": ["float32", 3]}, "inputs": [3], "num_outputs": 2}
    run.data.write_text(json.dumps(good))
    assert sources_as_recorded(run) is not None
    run.data.write_text(json.dumps({**good, **odd}))
    assert sources_as_recorded(run) is None


def test_a_record_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    (tmp_path / "elsewhere.json").write_text('{"fingerprint": "f"}')
    run.data.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(RefusedError, match="is a link"):
        read_data_record(run)
    run.data.unlink()
    os.mkfifo(run.data)
    with pytest.raises(RefusedError, match="is no plain file"):
        read_data_record(run)


def test_a_hundred_thousand_files_are_a_few_lines() -> None:
    files = {f"{n % 10}/{n}.png": f"{n} hash" for n in range(100_000)}
    lines = fold_into_folders(files)
    assert lines.keys() == {f"{n}/" for n in range(10)}
    assert sum(int(content.split()[0]) for content in lines.values()) == sum(range(100_000))
    assert fold_into_folders({**files, "3/3.png": "3 other"})["3/"] != lines["3/"]


def test_a_large_file_is_looked_at_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.fingerprint.WHOLE_BYTES", 1000)
    monkeypatch.setattr("data.fingerprint.SAMPLES", 4)
    monkeypatch.setattr("data.fingerprint.SAMPLE_BYTES", 100)
    path = tmp_path / "large"
    path.write_bytes(bytes(2000))
    seen = {identify_file(path)}
    for place in (0, 99, 650, 1300, 1999):
        path.write_bytes(bytes(place) + b"x" + bytes(1999 - place))
        seen.add(identify_file(path))
    assert len(seen) == 6


@pytest.mark.forked(quick=True)
def test_through_the_door(door: Door) -> None:
    """Exit 2 before anything is written, exit 3 naming the file; the data need not be there to look at a run."""
    option = MADE["text"](door.cwd)
    tiny = ("model.num_layers=1", "model.width=16", "model.num_heads=1", "log.tensorboard=false", "train.steps=4")
    words = ("data=text", f"data.path={option.path}", "data.seq_len=16", "data.batch_size=4", *tiny)
    assert door.run(*words).returncode == 0
    changed(Path(option.path) / "07.txt")
    before = door.tree()
    refused = door.run(*words, f"dir={door.the_run}", "train.steps=8")
    assert refused.returncode == 3
    assert "07.txt (still" in refused.stderr
    assert len(refused.stderr.splitlines()) <= 2
    shutil.rmtree(option.path)
    model, config = load_model(str(door.the_run))
    assert config.data.path == option.path
    assert model is not None
    wrong = door.run("data=tokens", f"data.path={texts(door.cwd / 'x')}", *tiny)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    kept = {path for path in before if not path.startswith("texts")}
    assert {path for path in door.tree() if not path.startswith("x")} == kept
