"""CSV as people have it becomes the right numbers and classes, or one line says which column and why."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from data import Csv
from data.option_fields import ColumnNames
from data.sources import Sources
from runner.errors import ConfigError
from runner.train.dataset import read_sources

SIZE = 30
NAMES = [["owl", "cat", "dog"][n % 3] for n in range(SIZE)]
FRAME = pd.DataFrame(
    {
        "a": np.arange(SIZE),
        "b": np.arange(SIZE) / 2,
        "city": ["Rome", "Oslo"] * (SIZE // 2),
        "on": np.arange(SIZE) > 9,
        "name": NAMES,
        "y": np.arange(SIZE) % 4,
        "price": np.arange(SIZE) * 1.5 + 0.25,
    }
)


def write(root: Path, table: pd.DataFrame = FRAME, name: str = "t.csv", **how: Any) -> Csv:
    table.to_csv(root / name, **{"index": False, **how})
    return Csv(path=str(root / name), label="y")


def text(root: Path, content: str, encoding: str = "utf-8") -> Csv:
    (root / "t.csv").write_bytes(content.encode(encoding))
    return Csv(path=str(root / "t.csv"), label="y")


def read(option: Csv) -> Sources:
    option.check_readable()
    return read_sources(option)


def rows(sources: Sources) -> dict[int, tuple[list[float], Any]]:
    """Return the inputs and the label of every example, of both sides, by the first of the inputs."""
    sides = [side.take(np.arange(len(side))) for side in (sources.train, sources.eval)]
    return {
        int(inputs[0]): (inputs.tolist(), label.tolist())
        for side in sides
        for inputs, label in zip(side["inputs"], side["label"], strict=True)
    }


EXPECTED = {n: ([float(n), n / 2], n % 4) for n in range(SIZE)}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sep": ";"},
        {"sep": "\t"},
        {"sep": "|"},
        {"quoting": 1},
        {"encoding": "utf-8-sig"},
        {"lineterminator": "\r\n"},
        {"name": "t.csv.gz", "compression": "gzip"},
        {"name": "t.csv.bz2", "compression": "bz2"},
        {"index": True},
    ],
    ids=str,
)
def test_whatever_stands_between_columns(how: dict[str, Any], tmp_path: Path) -> None:
    option = write(tmp_path, FRAME[["a", "b", "y"]], **how)
    sources = read(option)
    assert rows(sources) == EXPECTED
    assert (sources.inputs, sources.num_outputs) == ((2,), 4)
    assert ("left out: the index" in sources.summary) == ("index" in how)
    assert rows(read(replace(option, inputs=("a", "b")))) == EXPECTED


def test_columns_of_numbers_are_inputs_and_the_others_are_told(tmp_path: Path) -> None:
    sources = read(write(tmp_path))
    assert sources.inputs == (4,)
    assert rows(sources)[11] == ([11.0, 5.5, 1.0, 16.75], 3)
    assert "left out: city (text), name (text)" in sources.summary
    some = read(replace(write(tmp_path), inputs=("a", "price")))
    assert rows(some)[4] == ([4.0, 6.25], 0)
    assert "left out" not in some.summary
    assert rows(read(replace(write(tmp_path), inputs="a", columns=ColumnNames(inputs=("a", "b"))))) == EXPECTED


@pytest.mark.parametrize(
    ("label", "num_outputs", "classes", "value_of_11"),
    [
        ("name", 3, ("cat", "dog", "owl"), 1),
        ("on", 2, (), 1),
        ("a", 30, (), 11),
        ("price", 1, (), 16.75),
    ],
)
def test_labels_of_every_kind(
    label: str, num_outputs: int, classes: tuple[str, ...], value_of_11: float, tmp_path: Path
) -> None:
    sources = read(replace(write(tmp_path, FRAME.assign(key=FRAME.a)), inputs=("key", "b"), label=label))
    assert (sources.num_outputs, sources.classes) == (num_outputs, classes)
    assert rows(sources)[11][1] == value_of_11
    wanted = np.float32 if label == "price" else np.int32
    assert sources.train.take(np.array([0]))["label"].dtype == wanted


def test_whole_numbers_may_be_numbers_or_classes(tmp_path: Path) -> None:
    numbers = read(replace(write(tmp_path), inputs=("a", "b"), labels="numbers"))
    assert (numbers.num_outputs, rows(numbers)[7][1]) == (1, 3.0)
    assert numbers.train.take(np.array([0]))["label"].dtype == np.float32
    as_floats = write(tmp_path, FRAME.assign(y=FRAME.y.astype(float)))
    classes = read(replace(as_floats, labels="classes"))
    assert (classes.num_outputs, rows(classes)[7][1]) == (4, 3)


def test_types_are_those_of_the_whole_file(tmp_path: Path) -> None:
    """A column of whole numbers may have its first fraction, or text, far down."""
    head = "a,y\n" + "1,0\n" * 300_000
    assert read(text(tmp_path, f"{head}1.5,1\n")).num_outputs == 2
    with pytest.raises(ConfigError, match=r"column a is numbers but for 1 row \(such as 'n/k'\)"):
        read(text(tmp_path, f"{head}n/k,1\n"))


def test_lines_may_be_longer_than_what_is_looked_at(tmp_path: Path) -> None:
    names = [f"feature_number_{n}" for n in range(5000)]
    wide = pd.DataFrame(np.arange(4 * 5000).reshape(4, 5000), columns=names).assign(y=[0, 1, 0, 1])
    sources = read(replace(write(tmp_path, wide), eval_fraction=0.5))
    assert sources.inputs == (5000,)
    assert sorted(rows(sources)) == [0, 5000, 10000, 15000]
    long = read(replace(write(tmp_path, FRAME[["a", "y"]].assign(text="a;b|" * 30_000)), inputs="a"))
    assert sorted(rows(long)) == list(range(SIZE))


def test_ids_stay_whole_numbers(tmp_path: Path) -> None:
    taken = read(replace(write(tmp_path), inputs=("a", "y"), label="name", gives="ids")).train.take(np.arange(9))
    assert taken["inputs"].dtype == np.int32
    assert np.array_equal(taken["inputs"][:, 0] % 4, taken["inputs"][:, 1])


def test_blanks_and_quotes_are_no_part_of_names(tmp_path: Path) -> None:
    sources = read(text(tmp_path, "a, b, y\n" + "1, 2, yes\n3, 4.5, no\n" * 10))
    assert (sources.classes, rows(sources)) == (("no", "yes"), {1: ([1.0, 2.0], 1), 3: ([3.0, 4.5], 0)})
    quoted = read(text(tmp_path, 'a,"b, in\ncm",y\n' + '1,2,"x ""1"""\n3,4.5,z\n' * 10))
    assert (quoted.classes, rows(quoted)) == (('x "1"', "z"), {1: ([1.0, 2.0], 0), 3: ([3.0, 4.5], 1)})


def test_folders_in_parts_and_in_one(tmp_path: Path) -> None:
    for name, size in (("train", 30), ("val", 12), ("test", 9)):
        write(tmp_path, FRAME[:size], f"{name}.csv")
    sources = read(Csv(path=str(tmp_path), label="y"))
    assert (len(sources.train), len(sources.eval), len(sources.held_out["test"])) == (30, 12, 9)
    assert sources.eval.take(np.arange(3))["inputs"][:, 0].tolist() == [0.0, 1.0, 2.0]
    write(tmp_path, FRAME.drop(columns="y"), "test.csv")
    hidden = read(Csv(path=str(tmp_path), label="y"))
    assert dict(hidden.held_out) == {}
    assert "the test set is left out, for it has no column y" in hidden.summary
    write(tmp_path, FRAME[["a"]], "sample_submission.csv")
    with pytest.raises(ValueError, match=r"beside sample_submission\.csv; name the file to train on"):
        read(Csv(path=str(tmp_path), label="y"))
    (tmp_path / "more").mkdir()
    for n in range(3):
        write(tmp_path / "more", FRAME.assign(a=FRAME.a + n / 2), f"{n}.csv")
    assert len(read(Csv(path=str(tmp_path / "more"), label="y")).train) == 81
    write(tmp_path / "more", FRAME.drop(columns="b"), "3.csv")
    with pytest.raises(ConfigError, match="differ in column 'b'; expected the same columns"):
        read(Csv(path=str(tmp_path / "more"), label="y"))


WRONG: list[tuple[Callable[[Path], Csv], str]] = [
    (lambda root: replace(write(root), label="nam"), "label=nam is no column of"),
    (lambda root: replace(write(root), label="nam"), "; did you mean name?"),
    (lambda root: replace(write(root), inputs=("a", "pric")), "did you mean price?"),
    (lambda root: replace(write(root), inputs=("a", "y")), "inputs=y is the label as well"),
    (lambda root: replace(write(root), inputs=("a", "city")), "column city is text (such as 'Rome'); leave it out of"),
    (lambda root: write(root, FRAME.assign(b=FRAME.b.where(FRAME.b > 2))), "column b has 5 empty rows; fill or drop"),
    (lambda root: write(root, FRAME.assign(y=FRAME.y.where(FRAME.y > 0))), "column y has 8 empty rows; fill or drop"),
    (lambda root: replace(write(root, FRAME.assign(name=["", *NAMES[1:]])), label="name"), "label is empty in 1 of 30"),
    (lambda root: write(root, FRAME.assign(b=["?", *FRAME.b[1:]])), "column b is numbers but for 1 row (such as '?')"),
    (lambda root: write(root, sep=";", decimal=","), "column b has numbers with a decimal comma ('0,0')"),
    (
        lambda root: write(root, FRAME[["a", "b", "y"]], header=False),
        "begins with numbers (0,0.0,0); write a first line",
    ),
    (lambda root: write(root, FRAME[["city", "y"]]), "there is no column of numbers beside y; left: city (text)"),
    (lambda root: write(root, FRAME[:0]), "holds no row to train on"),
    (lambda root: write(root, FRAME.assign(y=FRAME.y - 1)), "a label is -1; expected 0 or more"),
    (lambda root: replace(write(root), gives="ids", inputs="b"), "inputs is float64, but ids are whole numbers"),
    (lambda root: replace(write(root), num_classes=2), "a label is 3; expected 0 or more, and less than num_classes=2"),
    (
        lambda root: text(root, "a,b,y\n1,2,0\n1,2\n"),
        "cannot be read as CSV (CSV parse error: Expected 3 columns, got 2",
    ),
    (lambda root: text(root, "a,a,y\n1,2,0\n"), "has several columns a; give them different names"),
    (lambda root: text(root, ""), "is empty; expected a line of names, and a row for each example"),
    (lambda root: text(root, "a,y\n1,2\n", "utf-16"), "is text in UTF-16"),
    (lambda root: text(root, "größe,y\n1,2\n", "latin1"), "is no UTF-8 text; write it so"),
    (
        lambda root: replace(text(root, "a,name\n1,größe\n2,x\n", "latin1"), label="name"),
        "column name is no UTF-8 text; write the file as UTF-8",
    ),
    (lambda root: text(root, "PAR1,y\n1,2\n"), "is a Parquet file (data=parquet)"),
    (lambda root: replace(text(root, "a,y\n1,0\n"), delimiter=";"), "label=y is no column of"),
    (lambda root: Csv(path=str(root)), "holds no file that ends in .csv or .tsv, compressed or not"),
    (lambda root: Csv(path=str(root / "none.csv")), "none.csv does not exist"),
]


@pytest.mark.parametrize(("make", "part"), WRONG, ids=[part[:30] for _, part in WRONG])
def test_what_is_wrong_is_said_in_a_line(make: Callable[[Path], Csv], part: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ConfigError)) as caught:
        read(make(tmp_path))
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_torn_files_are_said_in_a_line(ending: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    packed = pack(FRAME.to_csv(index=False).encode())
    (tmp_path / f"t.csv.{ending}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="copy it again") as caught:
        read(Csv(path=str(tmp_path / f"t.csv.{ending}"), label="y"))
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_delimiter_is() -> None:
    assert [Csv(path="t", delimiter=given).separator for given in (None, ";", "tab", "\\t", "\t")] == [
        None,
        ";",
        "\t",
        "\t",
        "\t",
    ]
    for given in ("", ",,"):
        with pytest.raises(ValueError, match="delimiter: got .*; expected one character, or tab"):
            Csv(path="t", delimiter=given)
