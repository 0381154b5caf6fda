"""Archives of arrays as others write them: the right parts, numbers and types, or one line that says why not."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import Arrays
from data.option_fields import ArrayNames
from data.sources import IGNORED_LABEL, Sources
from data.tables import describe_scaling

RNG = np.random.default_rng(0)


def pixels(size: int) -> np.ndarray:
    return RNG.integers(0, 256, (size, 6, 6), np.uint8)


def digits(size: int) -> np.ndarray:
    return (np.arange(size) % 10).astype(np.uint8)


def save(root: Path, **columns: Any) -> str:
    np.savez(root / "a.npz", **columns)
    return str(root / "a.npz")


def read(option: Arrays) -> Sources:
    option.check_readable()
    return option.sources()


def every(source: Any) -> dict[str, np.ndarray]:
    taken: dict[str, np.ndarray] = source.take(np.arange(len(source)))
    return taken


def test_an_archive_as_keras_writes_it(tmp_path: Path) -> None:
    x, x_test = pixels(60), pixels(10)
    sources = read(Arrays(path=save(tmp_path, x_train=x, y_train=digits(60), x_test=x_test, y_test=digits(10))))
    assert np.array_equal(every(sources.train)["inputs"][..., 0], x / np.float32(255))
    assert np.array_equal(every(sources.train)["label"], digits(60))
    assert np.array_equal(every(sources.eval)["inputs"][..., 0], x_test / np.float32(255))
    assert (sources.inputs, sources.num_outputs, dict(sources.held_out)) == ((6, 6, 1), 10, {})
    assert "train: x_train and y_train; eval: x_test and y_test" in sources.summary


def test_an_archive_in_three_parts(tmp_path: Path) -> None:
    parts = {"train": 30, "val": 12, "test": 20}
    columns = {f"{part}_images": pixels(size) for part, size in parts.items()}
    labels = {f"{part}_labels": digits(size)[:, None] for part, size in parts.items()}
    sources = read(Arrays(path=save(tmp_path, **columns, **labels)))
    assert (len(sources.train), len(sources.eval), len(sources.held_out["test"])) == (30, 12, 20)
    assert np.array_equal(every(sources.held_out["test"])["inputs"][..., 0], columns["test_images"] / np.float32(255))
    assert np.array_equal(every(sources.eval)["label"], digits(12))
    assert "20 test examples are kept apart" in sources.summary


def test_a_test_set_whose_labels_are_hidden_is_left_out(tmp_path: Path) -> None:
    columns = {"x_train": pixels(30), "y_train": digits(30), "x_val": pixels(9), "y_val": digits(9)}
    sources = read(Arrays(path=save(tmp_path, **columns, x_test=pixels(5), y_test=np.full(5, -1))))
    assert (len(sources.train), len(sources.eval), dict(sources.held_out)) == (30, 9, {})
    assert "the test set is left out, for its labels are all -1" in sources.summary


def test_only_the_wanted_arrays_are_read(tmp_path: Path) -> None:
    """Beside them may be anything, such as objects that only pickle could read."""
    path = save(tmp_path, pixels=pixels(20), digit=digits(20), meta=np.array([{}, None], object))
    sources = read(Arrays(path=path, columns=ArrayNames(inputs="pixels", label="digit")))
    assert (len(sources.train), len(sources.eval), sources.num_outputs) == (18, 2, 10)
    path = save(tmp_path, inputs=pixels(20), label=digits(20), meta=np.array([{}], object))
    assert len(read(Arrays(path=path)).train) == 18


def test_other_names_for_the_same_file_are_other_data(tmp_path: Path) -> None:
    path = save(tmp_path, inputs=pixels(20), label=digits(20), coarse=digits(20) // 5)
    fine, coarse = (
        read(Arrays(path=path, columns=names)) for names in (None, ArrayNames(inputs="inputs", label="coarse"))
    )
    assert (fine.num_outputs, coarse.num_outputs) == (10, 2)
    assert fine.fingerprint != coarse.fingerprint


@pytest.mark.parametrize(
    ("gives", "inputs", "expected"),
    [
        ("features", np.arange(8.0).reshape(4, 2).astype(">f4"), np.arange(8.0).reshape(4, 2).astype(np.float32)),
        ("features", np.arange(8).reshape(4, 2) > 3, (np.arange(8).reshape(4, 2) > 3).astype(np.float32)),
        ("features", np.arange(8).reshape(4, 2), np.arange(8).reshape(4, 2).astype(np.float32)),
        ("ids", np.arange(8).reshape(4, 2), np.arange(8, dtype=np.int32).reshape(4, 2)),
        ("ids", np.arange(8).reshape(4, 2).astype(">u2"), np.arange(8, dtype=np.int32).reshape(4, 2)),
        ("images", np.full((4, 2, 2), 65535, np.uint16), np.ones((4, 2, 2, 1), np.float32)),
        ("images", np.full((4, 2, 2), 65535, ">u2"), np.ones((4, 2, 2, 1), np.float32)),
        ("images", np.full((4, 2, 2), 255, np.uint8), np.ones((4, 2, 2, 1), np.float32)),
        ("images", np.full((4, 2, 2), 0.5, np.float64), np.full((4, 2, 2, 1), 0.5, np.float32)),
    ],
)
def test_inputs_become_what_a_model_takes(gives: Any, inputs: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    path = save(tmp_path, inputs=inputs, label=np.arange(4) % 2)
    sources = read(Arrays(path=path, gives=gives, eval_fraction=0.5))
    taken = np.concatenate([every(sources.train)["inputs"], every(sources.eval)["inputs"]])
    assert taken.dtype == expected.dtype
    assert taken.dtype.isnative
    assert sorted(row.tobytes() for row in taken) == sorted(row.tobytes() for row in expected)


def test_pixels_of_16_bits_are_other_data_than_they_were() -> None:
    """Whoever trained on them as they are does not go on with others, and all else is the same data as ever."""
    assert describe_scaling(np.dtype(">u2"), "images") == describe_scaling(np.dtype("<u2"), "images") != ()
    for dtype, gives in ((np.uint8, "images"), (np.uint16, "features"), (np.float32, "images")):
        assert describe_scaling(np.dtype(dtype), gives) == ()


@pytest.mark.parametrize(
    ("inputs", "gives", "told"),
    [
        (
            np.array([[0.0, np.nan], [np.inf, 1.0], [0.0, -np.inf]]),
            "features",
            "3 of 6 values of inputs are NaN or infin",
        ),
        (pixels(3).astype(np.float32) + 1, "images", "not scaled"),
        (np.full((3, 2, 2), -2.0), "images", "pixels from -2 to -2, not scaled"),
        (np.full((3, 2, 2), 300, np.int64), "images", "pixels from 300 to 300, not scaled"),
        (np.full((3, 2, 2), 0.7), "images", ""),
        (np.full((3, 2), 300.0), "features", ""),
    ],
)
def test_unusual_values_are_told(inputs: np.ndarray, gives: Any, told: str, tmp_path: Path) -> None:
    summary = read(Arrays(path=save(tmp_path, inputs=inputs, label=np.arange(3)), gives=gives)).summary
    assert told in summary if told else summary.endswith("3 classes")


def test_channels_that_come_first_are_told(tmp_path: Path) -> None:
    label = np.arange(4)
    for shape, told in (
        ((3, 8, 8), True),
        ((1, 28, 28), True),
        ((8, 8, 3), False),
        ((3, 5, 7), False),
        ((4, 4, 4), False),
    ):
        summary = read(Arrays(path=save(tmp_path, inputs=np.zeros((4, *shape)), label=label))).summary
        assert ("has its channels first? np.moveaxis(x, 1, -1) puts them last" in summary) == told, shape


@pytest.mark.parametrize(
    ("label", "num_outputs", "classes", "may_ignore"),
    [
        (np.array(["owl", "cat"] * 10), 2, ("cat", "owl"), False),
        (np.array([0, IGNORED_LABEL, 4, 1] * 5), 5, (), True),
        (np.arange(20) > 9, 2, (), False),
        (np.linspace(0, 1, 20), 1, (), False),
        (np.linspace(0, 1, 60).reshape(20, 3), 3, (), False),
    ],
)
def test_labels_of_every_kind(
    label: np.ndarray, num_outputs: int, classes: tuple[str, ...], may_ignore: bool, tmp_path: Path
) -> None:
    path = save(tmp_path, inputs=np.arange(40.0).reshape(20, 2), label=label)
    sources = read(Arrays(path=path, gives="features"))
    assert (sources.num_outputs, sources.classes, sources.may_ignore) == (num_outputs, classes, may_ignore)
    taken = every(sources.train)
    rows = (taken["inputs"][:, 0] / 2).astype(int)
    if label.dtype.kind == "f":
        assert np.array_equal(taken["label"], label[rows].astype(np.float32))
    else:
        names = np.array(classes)[taken["label"]] if classes else taken["label"]
        assert np.array_equal(names, label[rows])
        assert taken["label"].dtype == np.int32


def wrong(root: Path, **columns: Any) -> Arrays:
    return Arrays(path=save(root, **columns), gives="features")


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        (
            {"inputs": np.zeros((4, 2)) + 1j, "label": np.arange(4)},
            "inputs is complex128; write its real and its",
        ),
        ({"inputs": np.array([["a"]]), "label": np.arange(1)}, "inputs is <U1; expected numbers"),
        (
            {"inputs": np.zeros((4, 2)), "label": np.array([{}] * 4, object)},
            "label is an array of objects; write it as n",
        ),
        (
            {"inputs": np.zeros((4, 2)), "label": np.arange(3)},
            "label is int64 of shape (3,); expected whole numbers of",
        ),
        ({"inputs": np.zeros((4, 2)), "label": np.zeros((4, 2, 2))}, "label is float64 of shape (4, 2, 2)"),
        ({"inputs": np.zeros((4, 2)), "label": np.eye(4, dtype=int)}, "argmax(1) gives the classes"),
        ({"inputs": np.zeros((4, 2)), "label": np.array([0.5, np.nan, 1, 2])}, "label is NaN or infinite in 1 of 4"),
        (
            {"x_train": np.zeros((4, 2)), "y_train": np.arange(4), "x_test": np.zeros((4, 3)), "y_test": np.arange(4)},
            "an example is (2,) in training and (3,) in evaluation; expected one shape",
        ),
        (
            {
                "x_train": np.zeros((4, 2)),
                "y_train": np.arange(4),
                "x_test": np.zeros((4, 2)),
                "y_test": np.arange(4.0),
            },
            "label is float64 and int64 in different parts of the data",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(columns: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        read(wrong(tmp_path, **columns))
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        (np.zeros((4, 2)), "inputs is float64, but ids are whole numbers"),
        (np.full((4, 2), -1), "an id is -1; expected 0 or more"),
        (np.full((4, 2), 2**40), f"an id is {2**40}; expected 0 or more, and less than"),
    ],
)
def test_ids_are_those_of_an_embedding(inputs: np.ndarray, part: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=part):
        read(Arrays(path=save(tmp_path, inputs=inputs, label=np.arange(4)), gives="ids"))


def test_torn_archives_are_said_in_a_line(tmp_path: Path) -> None:
    path = Path(save(tmp_path, inputs=pixels(20), label=digits(20)))
    content = path.read_bytes()
    for number, damaged in enumerate((content[:400], bytes([*content[:400], content[400] ^ 1, *content[401:]]), b"x")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is no \.npz|cannot be read") as caught:
            read(Arrays(path=str(path)))
        assert len(str(caught.value).splitlines()) == 1, number
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("inputs.npy", "text")
        archive.writestr("label.npy", "text")
    with pytest.raises(ValueError, match="inputs cannot be read"):
        read(Arrays(path=str(path)))
