"""Records are too many to look through: their labels are looked at as they come, and become what they are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import Arrayrecord
from data.data_errors import UnreadableError
from data.sources import IGNORED_LABEL, SourcePart

SIZE = 12


def records(root: Path, labels: list[Any], inputs: Any = None, **fields: Any) -> Arrayrecord:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(root / "r.array_record"), "group_size:1")
    for number, label in enumerate(labels):
        out = io.BytesIO()
        np.savez(out, inputs=np.full(3, number) if inputs is None else inputs, label=label)
        writer.write(out.getvalue())
    writer.close()
    return Arrayrecord(path=str(root / "r.array_record"), **{"gives": "features", "eval_fraction": 0.25, **fields})


@pytest.mark.parametrize(
    ("labels", "num_classes", "num_outputs", "may_ignore"),
    [
        ([np.int64(n % 3) for n in range(SIZE)], 3, 3, False),
        ([np.array([n % 3]) for n in range(SIZE)], 4, 4, False),
        ([np.bool_(n % 2) for n in range(SIZE)], 2, 2, False),
        ([np.uint64(n % 3) for n in range(SIZE)], 3, 3, False),
        ([np.int8(IGNORED_LABEL if n % 2 else n % 3) for n in range(SIZE)], 3, 3, True),
        ([np.float64(n + 0.5) for n in range(SIZE)], None, 1, False),
        ([np.array([n + 0.5, n]) for n in range(SIZE)], None, 2, False),
    ],
)
def test_labels_of_every_kind(
    labels: list[Any], num_classes: int | None, num_outputs: int, may_ignore: bool, tmp_path: Path
) -> None:
    sources = records(tmp_path, labels, num_classes=num_classes).sources()
    assert (len(sources.train), sources.num_outputs, sources.may_ignore) == (9, num_outputs, may_ignore)
    taken = sources.train.take(np.arange(9))
    expected = np.array([np.squeeze(labels[int(row[0])]) for row in taken["inputs"]])
    assert np.array_equal(taken["label"], expected)
    assert taken["label"].dtype == (np.float32 if num_classes is None else np.int32)


@pytest.mark.parametrize(
    ("late", "told"),
    [
        (np.int64(3), "record 5 has the label 3; expected 0 or more, and less than 3"),
        (np.int64(-1), "record 5 has the label -1"),
        (np.int64(IGNORED_LABEL), "record 5 has the label -100"),
        (np.int64(2**40), "record 5 has the label 2147483647"),
        (np.uint64(2**63), "record 5 has the label 2147483647"),
        (np.uint32(2**32 - 100), "record 5 has the label 2147483647"),
        (np.float64(1.0), "label is float32; expected whole numbers"),
        (np.array("cat"), r"label is <U\d+ of shape \(\); expected a whole number"),
    ],
)
def test_a_record_that_was_not_looked_at_is_told_when_it_comes(
    late: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.records.CHECKED_RECORDS", 2)
    dtype = np.asarray(late).dtype if np.asarray(late).dtype.kind in "iu" else np.int64
    labels = [np.asarray(n % 3, dtype) if n != 5 else late for n in range(SIZE)]
    sources = records(tmp_path, labels, num_classes=3).sources()
    assert isinstance(sources.train, SourcePart)
    with pytest.raises(UnreadableError, match=told) as caught:
        sources.train.source.take(np.arange(1, SIZE - 1))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("labels", "fields", "part"),
    [
        ([np.int64(0)] * SIZE, {}, "say how many classes there are, data.num_classes=N"),
        ([np.int64(7)] * SIZE, {"num_classes": 3}, "a label is 7; expected 0 or more, and less than num_classes=3"),
        ([np.float64(0.5)] * SIZE, {"num_classes": 3}, "num_classes=3, but label is float32, numbers to regress on"),
        ([np.float64(np.nan)] * SIZE, {}, "label is NaN or infinite in 12 of 12"),
        ([np.eye(3, dtype=int)[0]] * SIZE, {"num_classes": 3}, "label is int64 of shape (3,); expected a whole number"),
        ([np.array("cat")] * SIZE, {"num_classes": 3}, "expected a whole number, or numbers"),
        ([np.int64(0)] * SIZE, {"num_classes": 3, "inputs": np.zeros(3), "gives": "ids"}, "but ids are whole numbers"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    labels: list[Any], fields: dict[str, Any], part: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        records(tmp_path, labels, **fields).sources()
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_ids_stay_whole_numbers(tmp_path: Path) -> None:
    sources = records(tmp_path, [np.int64(0)] * SIZE, num_classes=2, gives="ids").sources()
    assert sources.train.take(np.arange(3))["inputs"].dtype == np.int32
