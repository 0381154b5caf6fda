"""Parquet as pandas and Hugging Face write it: the right parts, classes and numbers, or one line that says why not."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import Parquet
from data.option_fields import ColumnNames
from data.sources import IGNORED_LABEL, Sources

NAMES = ["owl", "cat", "dog"]


def encode_image(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(out, "png")
    return out.getvalue()


def images_folder(root: Path, files: dict[str, int]) -> Path:
    """A folder as Hugging Face writes it: an image and a class a row, the names of the classes beside them."""
    features = {"label": {"_type": "ClassLabel", "names": sorted(NAMES)}, "image": {"_type": "Image"}}
    for start, (name, size) in enumerate(files.items()):
        rows = [{"bytes": encode_image(start * 20 + n % 20), "path": None} for n in range(size)]
        table = pa.table({"image": rows, "label": np.arange(size) % 3})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / name)
    return root


def read(option: Parquet) -> Sources:
    option.check_readable()
    return option.sources()


def shades(source: Any) -> set[int]:
    """The shade of each image, whose tens say which file it is from."""
    return {round(float(row[0, 0, 0]) * 255) for row in source.take(np.arange(len(source)))["inputs"]}


def test_a_folder_of_images_in_parts(tmp_path: Path) -> None:
    files = {
        "data/train-00000-of-00002.parquet": 9,
        "data/train-00001-of-00002.parquet": 6,
        "data/test-0-of-1.parquet": 7,
    }
    sources = read(Parquet(path=str(images_folder(tmp_path, files)), inputs="image", size=8, eval_fraction=0.2))
    assert (len(sources.train), len(sources.eval), len(sources.held_out["test"])) == (12, 3, 7)
    # The files are in the order of their names below, so the test set is the third.
    assert shades(sources.held_out["test"]) == set(range(40, 47))
    assert shades(sources.train) | shades(sources.eval) == set(range(9)) | set(range(20, 26))
    assert (sources.num_outputs, sources.classes) == (3, ("cat", "dog", "owl"))
    assert "files by name: train 2, test 1" in sources.summary
    unsplit = read(Parquet(path=str(tmp_path / "data/train-00000-of-00002.parquet"), inputs="image", size=8))
    assert (len(unsplit.train), len(unsplit.eval), dict(unsplit.held_out)) == (8, 1, {})


def test_a_validation_set_is_what_is_evaluated_on(tmp_path: Path) -> None:
    files = {"en/train/0.parquet": 9, "en/validation/0.parquet": 5, "en/test/0.parquet": 7}
    sources = read(Parquet(path=str(images_folder(tmp_path, files)), inputs="image", size=8))
    assert (len(sources.train), len(sources.eval), len(sources.held_out["test"])) == (9, 5, 7)
    assert [shades(source) for source in (sources.train, sources.eval, sources.held_out["test"])] == [
        set(range(9)),
        set(range(20, 25)),
        set(range(40, 47)),
    ]


def test_files_that_are_no_parts_are_one_set_as_ever(tmp_path: Path) -> None:
    sources = read(Parquet(path=str(images_folder(tmp_path, {"a.parquet": 9, "b.parquet": 6})), inputs="image", size=8))
    assert (len(sources.train), len(sources.eval), dict(sources.held_out)) == (13, 2, {})
    assert "files by name" not in sources.summary
    images_folder(tmp_path, {"train.parquet": 3, "test.parquet": 3})
    with pytest.raises(ValueError, match=r"are parts of a data set, beside a\.parquet; name the file to train on"):
        read(Parquet(path=str(tmp_path), inputs="image"))


def test_a_torn_image_may_be_passed_over(tmp_path: Path) -> None:
    rows = [{"bytes": encode_image(n)[: 40 if n in (0, 5) else None], "path": None} for n in range(9)]
    pq.write_table(pa.table({"image": rows, "label": np.arange(9) % 3}), tmp_path / "t.parquet")
    option = Parquet(path=str(tmp_path / "t.parquet"), inputs="image", size=8, eval_fraction=0.2)
    with pytest.raises(ValueError, match=r"t\.parquet, row 0: .*data\.on_bad=skip"):
        read(option)
    sources = read(replace(option, on_bad="skip"))
    assert (len(sources.train), len(sources.eval)) == (7, 2)
    assert shades(sources.train) | shades(sources.eval) == {1, 2, 3, 4, 6, 7, 8}


def frame(**columns: Any) -> pd.DataFrame:
    size = 30
    species = [NAMES[n % 3] for n in range(size)]
    return pd.DataFrame({"a": np.arange(size), "b": np.arange(size) / 2, "species": species, **columns})


def parquet(root: Path, table: pd.DataFrame, **fields: Any) -> Parquet:
    table.to_parquet(root / "t.parquet")
    return replace(Parquet(path=str(root / "t.parquet"), inputs=("a", "b"), label="y", gives="features"), **fields)


@pytest.mark.parametrize(
    ("label", "num_outputs", "classes", "may_ignore"),
    [
        ([NAMES[n % 3] for n in range(30)], 3, ("cat", "dog", "owl"), False),
        (pd.Categorical([NAMES[n % 3] for n in range(30)], categories=NAMES), 3, ("cat", "dog", "owl"), False),
        (pd.Categorical([n % 4 for n in range(30)]), 4, (), False),
        (np.arange(30) > 9, 2, (), False),
        (pd.array([n % 3 for n in range(30)], dtype="Int64"), 3, (), False),
        ([IGNORED_LABEL if n % 5 == 0 else n % 3 for n in range(30)], 3, (), True),
        (np.linspace(0, 1, 30), 1, (), False),
        ([[n / 7, n / 3] for n in range(30)], 2, (), False),
    ],
    ids=["text", "category", "category of numbers", "bool", "Int64", "ignored", "float", "two floats"],
)
def test_labels_as_pandas_writes_them(
    label: Any, num_outputs: int, classes: tuple[str, ...], may_ignore: bool, tmp_path: Path
) -> None:
    sources = read(parquet(tmp_path, frame(y=label)))
    assert (sources.num_outputs, sources.classes, sources.may_ignore) == (num_outputs, classes, may_ignore)
    taken = sources.train.take(np.arange(27))
    rows = taken["inputs"][:, 0].astype(int)
    expected = np.asarray(list(label))[rows]
    if expected.dtype.kind == "f":
        assert taken["label"].dtype == np.float32
        assert np.array_equal(taken["label"], expected.astype(np.float32))
    else:
        assert taken["label"].dtype == np.int32
        assert (np.array(classes)[taken["label"]] if classes else taken["label"]).tolist() == expected.tolist()


def test_columns_may_be_said_at_once(tmp_path: Path) -> None:
    option = parquet(tmp_path, frame(y=np.arange(30) % 4), inputs="a", label="b")
    both = replace(option, columns=ColumnNames(inputs=("b", "a"), label="y"))
    assert both.names == (("b", "a"), "y")
    assert (read(both).inputs, read(both).num_outputs) == ((2,), 4)
    assert replace(option, columns=ColumnNames(label="y")).names == ("a", "y")


def test_inputs_may_be_ids_and_truths(tmp_path: Path) -> None:
    ids = read(
        parquet(tmp_path, frame(x=[[n, n + 1, 0] for n in range(30)], y=np.arange(30) % 2), inputs="x", gives="ids")
    )
    taken = ids.train.take(np.arange(5))["inputs"]
    assert (ids.inputs, taken.dtype) == ((3,), np.int32)
    assert np.array_equal(taken[:, 1], taken[:, 0] + 1)
    truths = read(parquet(tmp_path, frame(x=np.arange(30) > 3, y=np.arange(30) % 2), inputs=("x", "a")))
    taken = truths.train.take(np.arange(27))["inputs"]
    assert taken.dtype == np.float32
    assert np.array_equal(taken[:, 0], taken[:, 1] > 3)


@pytest.mark.parametrize(
    ("columns", "fields", "part"),
    [
        ({"y": np.arange(30)}, {"inputs": ("a", "species")}, "column species is text ("),
        ({"y": np.arange(30)}, {"inputs": ("a", "bb")}, "inputs=bb is no column of"),
        ({"why": np.arange(30)}, {}, "label=y is no column of"),
        ({"y": np.arange(30)}, {"inputs": "y"}, "inputs=y is the label as well; leave it out of data.inputs"),
        ({"y": np.arange(30)}, {"inputs": ("a", "y")}, "inputs=y is the label as well; leave it out of data.inputs"),
        ({"y": np.arange(30)}, {"inputs": ("a", "b", "a")}, "inputs=a is named twice; name each column once"),
        ({"y": [None, *range(29)]}, {}, "column y has 1 empty rows; fill or drop them"),
        ({"y": [None, *NAMES * 9, "owl", "owl"]}, {}, "column y has 1 empty rows; fill or drop them"),
        ({"y": pd.date_range("2020-01-01", periods=30)}, {}, "expected numbers or names of classes"),
        ({"y": np.arange(30) - 1}, {}, "a label is -1; expected 0 or more"),
        (
            {"y": np.arange(30), "x": [[1], [2, 3], *[[1]] * 28]},
            {"inputs": "x"},
            "lists of 1 to 2 values; expected one le",
        ),
        ({"y": np.arange(30), "x": [[1]] * 30}, {"inputs": ("a", "x")}, "column x holds lists, which do not go beside"),
        ({"y": np.arange(30), "x": [[1.0, None]] * 30}, {"inputs": "x"}, "column x has 30 empty rows"),
        (
            {"y": np.arange(30), "x": [None, *[b"x"] * 29]},
            {"inputs": "x", "gives": "images"},
            "column x has 1 empty rows",
        ),
        ({"y": np.arange(30) / 7}, {"num_classes": 3}, "num_classes=3, but label is float64"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    columns: dict[str, Any], fields: dict[str, Any], part: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        read(parquet(tmp_path, frame(**columns), **fields))
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_test_set_without_labels_is_left_out(tmp_path: Path) -> None:
    frame(y=np.arange(30) % 3).to_parquet(tmp_path / "train.parquet")
    frame().to_parquet(tmp_path / "test.parquet")
    sources = read(Parquet(path=str(tmp_path), inputs=("a", "b"), label="y", gives="features"))
    assert (len(sources.train), len(sources.eval), dict(sources.held_out)) == (27, 3, {})
    assert "the test set is left out, for it has no column y" in sources.summary


def test_text_is_read_byte_by_byte(tmp_path: Path) -> None:
    lines = [f"line {n}" for n in range(40)]
    pd.DataFrame({"text": lines, "n": range(40)}).to_parquet(tmp_path / "train-0.parquet")
    whole = read(Parquet(path=str(tmp_path), inputs="text", gives="tokens", seq_len=8, eval_fraction=0.25))
    assert (whole.inputs, whole.num_outputs) == ((8,), 256)
    assert whole.decode is not None
    assert whole.decode(whole.train.take(np.array([0]))["tokens"][0]) == "line 0\nli"
    # Of 310 bytes, 232 are to train on; each window shares a byte with the next.
    assert (len(whole.train), len(whole.eval)) == (28, 9)
    for name, text in (("validation", "other"), ("test", "last one")):
        pd.DataFrame({"text": [text] * 9, "n": range(9)}).to_parquet(tmp_path / f"{name}-0.parquet")
    parts = read(Parquet(path=str(tmp_path), inputs="text", gives="tokens", seq_len=4))
    assert parts.decode is not None
    sources = (parts.train, parts.eval, parts.held_out["test"])
    assert [parts.decode(source.take(np.array([0]))["tokens"][0]) for source in sources] == ["line ", "other", "last "]
    assert "files by name: train 1, eval 1, test 1" in parts.summary
    with pytest.raises(ValueError, match="column n is int64, which is no text"):
        read(Parquet(path=str(tmp_path), inputs="n", gives="tokens"))
    with pytest.raises(ValueError, match="inputs: text is one column"):
        Parquet(path=str(tmp_path), inputs=("text", "n"), gives="tokens")
    with pytest.raises(ValueError, match="seq_len is of text, but gives=features"):
        Parquet(path=str(tmp_path), inputs="n", gives="features", seq_len=8)
