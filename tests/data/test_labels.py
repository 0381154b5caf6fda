"""Labels of every kind become classes or numbers, or one line says what is wrong with them; nothing is rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data.labels import MOST_CLASSES, prepare_labels
from data.sources import IGNORED_LABEL

MASKED = [0, IGNORED_LABEL, 2, IGNORED_LABEL]


@pytest.mark.parametrize(
    ("labels", "expected", "num_classes"),
    [
        (np.array([0, 2, 1]), [0, 2, 1], 3),
        (np.array([0, 2, 1], np.uint8), [0, 2, 1], 3),
        (np.array([0, 2, 1], ">i8"), [0, 2, 1], 3),
        (np.array([0, 2, 1], np.uint64), [0, 2, 1], 3),
        (np.array([[0], [2], [1]]), [0, 2, 1], 3),
        (np.array([True, False, True]), [1, 0, 1], 2),
        (np.array([True, True, True]), [1, 1, 1], 2),
        (np.array([[False], [True], [True]]), [0, 1, 1], 2),
        (np.array(MASKED), MASKED, 3),
        (np.zeros(0, int), [], 1),
    ],
)
def test_whole_numbers_are_classes(labels: np.ndarray, expected: list[int], num_classes: int) -> None:
    made = prepare_labels([labels])
    assert made.sides[0].tolist() == expected
    assert made.sides[0].dtype == np.int32
    assert (made.num_outputs, made.may_ignore, made.classes) == (num_classes, IGNORED_LABEL in expected, ())


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["owl", "cat", "dog", "cat"]),
        np.array([["owl"], ["cat"], ["dog"], ["cat"]]),
        np.array([b"owl", b"cat", b"dog", b"cat"]),
        np.array(["owl", "cat", "dog", "cat"], object),
        np.array(["owl", "cat", "dog", "cat"], np.dtypes.StringDType()),
    ],
    ids=["str", "column", "bytes", "objects", "StringDType"],
)
def test_names_are_classes_in_their_order(labels: np.ndarray) -> None:
    made = prepare_labels([labels])
    assert (made.sides[0].tolist(), made.classes, made.num_outputs) == ([2, 0, 1, 0], ("cat", "dog", "owl"), 3)
    assert made.sides[0].dtype == np.int32
    assert prepare_labels([labels], 5).num_outputs == 5


def test_parts_share_their_classes() -> None:
    train, held_out = np.array(["b", "c"]), np.array(["a", "c", "b"])
    made = prepare_labels([train, held_out])
    assert [side.tolist() for side in made.sides] == [[1, 2], [0, 2, 1]]
    assert prepare_labels([np.array([0, 1]), np.array([7])]).num_outputs == 8
    with pytest.raises(ValueError, match="label is <U1 and int64 in different parts of the data"):
        prepare_labels([train, np.array([0, 1])])
    with pytest.raises(ValueError, match="float64 and int64"):
        prepare_labels([np.array([0, 1]), np.array([0.5])])


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (np.array([0.1, 2.5, -1.25]), 1),
        (np.array([[0.1], [2.5], [-1.25]], np.float32), 1),
        (np.array([[0.1, 7.0], [2.5, 3.0], [-1.25, 1.0]], np.float16), 2),
        (np.array([0.1, 2.5, -1.25], ">f8"), 1),
    ],
)
def test_floats_are_numbers_to_regress_on(labels: np.ndarray, numbers: int) -> None:
    made = prepare_labels([labels])
    assert made.sides[0].dtype == np.dtype("float32")
    assert made.sides[0].dtype.isnative
    assert np.array_equal(made.sides[0], labels.astype(np.float32))
    assert (made.num_outputs, made.may_ignore) == (numbers, False)


def test_what_is_meant_can_be_said() -> None:
    years = np.array([1990, 2005, 2020])
    made = prepare_labels([years], read_as="numbers")
    assert (made.sides[0].dtype, made.sides[0].tolist(), made.num_outputs) == (np.float32, [1990.0, 2005.0, 2020.0], 1)
    made = prepare_labels([np.array([0.0, 2.0, IGNORED_LABEL])], read_as="classes")
    assert (made.sides[0].dtype, made.sides[0].tolist(), made.num_outputs) == (np.int32, [0, 2, IGNORED_LABEL], 3)
    assert made.may_ignore
    with pytest.raises(ValueError, match=r"labels=classes, but a label is 0\.5"):
        prepare_labels([np.array([0.0, 0.5])], read_as="classes")
    with pytest.raises(ValueError, match="labels=numbers, but label is text"):
        prepare_labels([np.array(["a", "b"])], read_as="numbers")


@pytest.mark.parametrize(
    ("labels", "num_classes", "part"),
    [
        (np.arange(9) - 1, None, "a label is -1; expected 0 or more (1 of 9 are not); number"),
        (np.array([0, -5, -5, -1]), 3, "a label is -5; expected 0 or more (3 of 4 are not)"),
        (np.arange(9), 3, "a label is 8; expected 0 or more, and less than num_classes=3 (6 of 9 are not)"),
        (np.full(4, IGNORED_LABEL), None, "every label is -100, which is left out"),
        (np.eye(3, dtype=int), None, "label is int64 of shape (3, 3); argmax(1) gives the classes"),
        (np.arange(6).reshape(3, 2), None, "label is int64 of shape (3, 2); expected one whole number an example"),
        (np.array(5), None, "label is int64 of shape (); expected one whole number an example"),
        (np.array([0, 2**40]), None, f"a label is {2**40}, which would make"),
        (np.array([0, 2**40]), 2**41, f"a label is {2**40}, which would make"),
        (np.array([0, 2**63], np.uint64), None, f"a label is {2**63}, which would make"),
        (np.array([MOST_CLASSES]), None, "or say data.num_classes=N"),
        (np.array([0, 12_345]), None, "a label is 12345, which would make 12,346 classes of 2 examples; number the"),
        (np.array([0.5, np.nan, np.nan]), None, "label is NaN or infinite in 2 of 3; fill or drop these rows"),
        (np.array([0.5, np.inf]), None, "label is NaN or infinite in 1 of 2"),
        (np.array([0.5, 1.5]), 2, "num_classes=2, but label is float64, numbers to regress on"),
        (np.zeros((3, 2, 2)), None, "label has shape (3, 2, 2); expected (examples,) or (examples, numbers)"),
        (1.7e9 + np.arange(9) / 2, None, "which float32 rounds by"),
        (np.array([1e300, 1.0]), None, "which float32 rounds by inf"),
        (np.array(["a", "", "b", ""]), None, "label is empty in 2 of 4; fill or drop these rows"),
        (np.array([f"id{n}" for n in range(30)]), None, "label is another text in each of the 30 rows (such as 'id0')"),
        (np.array(["a", "b", "c"]), 2, "num_classes=2, but the labels have 3 names"),
        (np.array([b"\xff"]), None, "label is bytes that are no UTF-8 text"),
        (np.array([1 + 1j]), None, "label is complex128 of shape (1,); expected whole numbers, numbers, or names"),
        (np.array(["2020-01-01"], "datetime64[D]"), None, "label is datetime64[D]"),
        (np.array([{}, 1], object), None, "label is object of shape (2,)"),
        (np.array(["a", None], object), None, "label is object of shape (2,)"),
        (np.zeros(3, [("a", int)]), None, "label is [('a', '<i8')] of shape (3,)"),
    ],
)
def test_what_is_no_label_is_said_in_a_line(labels: Any, num_classes: int | None, part: str) -> None:
    with pytest.raises(ValueError, match="label") as caught:
        prepare_labels([labels], num_classes)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
