"""What an objective cannot be measured on is refused before training; a batch that nobody could look at, when taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from data.data_errors import UnreadableError
from data.images import EncodedImages
from data.label_checks import CheckedLabels, check_labels_fit, find_usual_objective, read_known_labels
from data.sources import IGNORED_LABEL, Source, SourcePart, Table


@dataclass(frozen=True)
class Unknown:
    """A source that shows its labels only when they are taken."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {name: column[indices] for name, column in self.columns.items()}


def labelled(label: np.ndarray) -> Table:
    return Table({"inputs": np.zeros((len(label), 2), np.float32), "label": label})


@pytest.mark.parametrize(
    ("label", "objective"),
    [
        (np.arange(5), "classify"),
        (np.arange(5) > 2, "classify"),
        (np.arange(5) + 0.5, "regress"),
        (np.zeros((5, 2)) + 0.5, "regress"),
        (np.array([[0.0, 0.0], [1.0, 1.0]]), "regress"),
    ],
)
def test_labels_say_what_is_usual(label: np.ndarray, objective: str) -> None:
    assert find_usual_objective(labelled(label)) == objective
    assert find_usual_objective(Unknown({"label": label})) == objective
    assert find_usual_objective(Table({"inputs": np.zeros((2, 2))})) == "classify"


def test_floats_that_may_be_classes_are_asked_about() -> None:
    with pytest.raises(
        ValueError, match=r"holds whole numbers \(0 to 4\).*data\.labels=classes of a table\), or say objective"
    ):
        find_usual_objective(labelled(np.arange(5.0)))
    with pytest.raises(ValueError, match=r"one-hot; argmax\(1\) gives the classes"):
        find_usual_objective(labelled(np.eye(3)))


def test_all_labels_in_memory_are_looked_at() -> None:
    label = np.arange(40)
    images = EncodedImages([""] * 40, label, lambda number: b"", 8, 3)
    chosen = np.array([3, 1, 2])
    part = SourcePart(labelled(label), chosen)
    assert np.array_equal(read_known_labels(labelled(label))["label"], label)
    assert np.array_equal(read_known_labels(part)["label"], chosen)
    assert np.array_equal(read_known_labels(images)["label"], label)
    assert np.array_equal(read_known_labels(SourcePart(images, chosen))["label"], chosen)
    assert np.array_equal(read_known_labels(Unknown({"label": label}))["label"], label[:8])
    assert read_known_labels(labelled(label[:0])) == {}


@pytest.mark.parametrize(
    ("objective", "column"),
    [
        ("classify", np.arange(4)),
        ("classify", np.arange(4) > 1),
        ("classify", np.array([0, IGNORED_LABEL])),
        ("classify", np.array([[0, 3], [3, IGNORED_LABEL]])),
        ("regress", np.arange(4) + 0.5),
        ("regress", np.arange(4.0)),
        ("regress", np.zeros((4, 3), np.float32)),
        ("external", np.arange(4) - 3),
        ("external", np.eye(4)),
        ("elbo", np.arange(4) - 3),
    ],
)
def test_what_fits_passes(objective: str, column: np.ndarray) -> None:
    check_labels_fit(objective, labelled(column), 4)


@pytest.mark.parametrize(
    ("objective", "column", "part"),
    [
        (
            "classify",
            np.arange(4) - 1,
            "a label is -1; expected 0 or more (1 of 4 are not)",
        ),
        ("classify", np.arange(6), "a label is 5; expected 0 or more, and less than num_classes=4 (2 of 6 are not)"),
        ("classify", np.full(3, IGNORED_LABEL), "every label is -100"),
        ("classify", np.eye(4, dtype=int), "one-hot; objective=classify takes the classes, as argmax(1) gives them"),
        ("classify", np.eye(4), "one-hot; objective=classify takes the classes, as argmax(1) gives them"),
        ("classify", np.arange(4.0), "make them so (astype(int)), or say objective=regress"),
        ("classify", np.zeros((4, 1), int), "of shape (4, 1); objective=classify takes one whole number an example"),
        ("classify", np.full((4, 3), 7), "up to 7, taken for 4 numbers an example; for a class at each place return"),
        ("classify", np.array([1 + 1j]), "objective=classify takes whole numbers"),
        ("regress", np.arange(4), "objective=regress takes numbers; astype(float) makes them so"),
        ("regress", np.arange(4) > 1, "label is bool of shape (4,), but objective=regress takes numbers"),
        ("regress", np.array([0.5, np.nan]), "label is NaN or infinite in 1 of 2"),
        ("regress", np.array([["a"]]), "but objective=regress takes numbers"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(objective: str, column: np.ndarray, part: str) -> None:
    with pytest.raises(ValueError, match="label") as caught:
        check_labels_fit(objective, labelled(column), 4)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    check_labels_fit("external", labelled(column), 4)


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        (
            np.array([[0, -1, 3]]),
            "a token is -1; expected 0 or more, and less than the vocabulary of 4 (1 of 3 are not)",
        ),
        (np.array([[0, 9, 3]]), "a token is 9; expected 0 or more"),
        (np.array([[0.0, 1.0]]), "tokens is float64 of shape (1, 2); expected whole numbers"),
        (np.array([[[0], [1]]]), "expected a row of tokens for each example"),
        (np.full((2, 3), IGNORED_LABEL), "every token is -100, which is padding"),
    ],
)
def test_tokens_are_those_of_the_vocabulary(tokens: np.ndarray, part: str) -> None:
    with pytest.raises(ValueError, match="token") as caught:
        check_labels_fit("next_token", Table({"tokens": tokens}), 4)
    assert part in str(caught.value)
    check_labels_fit("next_token", Table({"tokens": np.array([[0, IGNORED_LABEL, 3]])}), 4)


def batches_of(source: Source, *, ignored: int | None = None) -> CheckedLabels:
    return CheckedLabels(source, 3, ignored, "somewhere: record")


def test_a_label_that_nobody_could_see_is_told_when_it_comes() -> None:
    source = Unknown({"label": np.array([0, 1, 2, 5, -1, IGNORED_LABEL])})
    checked = batches_of(source)
    assert len(checked) == 6
    assert checked.take(np.array([2, 0]))["label"].tolist() == [2, 0]
    for index, value in ((3, 5), (4, -1), (5, IGNORED_LABEL)):
        with pytest.raises(
            UnreadableError, match=f"somewhere: record {index} has the label {value}; expected 0 or more"
        ):
            checked.take(np.array([0, index]))
    allowed = batches_of(source, ignored=IGNORED_LABEL)
    assert allowed.take(np.array([5, 1]))["label"].tolist() == [IGNORED_LABEL, 1]
    with pytest.raises(UnreadableError, match="record 4 has the label -1"):
        allowed.take(np.array([5, 4]))
    with pytest.raises(UnreadableError, match="record 1 has the token 7"):
        batches_of(Unknown({"tokens": np.array([[0, 1], [2, 7]])})).take(np.array([0, 1]))
    with pytest.raises(UnreadableError, match="label is float64; expected whole numbers"):
        batches_of(Unknown({"label": np.array([0.5])})).take(np.array([0]))
