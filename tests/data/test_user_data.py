"""What a user's own function returns becomes examples of the right type, or one line says why it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from data.data_errors import InvalidUserData, UnreadableError
from data.sources import IGNORED_LABEL, Sources, Table
from data.user_data import read_user_data, watch_user_labels

Give = Callable[[Any], Sources]
ROWS = np.arange(20.0).reshape(10, 2)


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Return what becomes of a value that a user's function returns."""

    def read(value: Any) -> Sources:
        module = ModuleType("their_data")
        module.make = lambda: value  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "their_data", module)
        return read_user_data("their_data:make", {}, 0.3)

    return read


def labelled(label: Any) -> dict[str, Any]:
    return {"inputs": ROWS, "label": label}


def take_all(sources: Sources) -> dict[str, np.ndarray]:
    sides = [side.take(np.arange(len(side))) for side in (sources.train, sources.eval)]
    return {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}


@pytest.mark.parametrize(
    "inputs",
    [
        ROWS.astype(">f8"),
        ROWS.astype(">f4"),
        ROWS.astype(">i2"),
        ROWS.tolist(),
        jnp.asarray(ROWS),
        pd.DataFrame(ROWS, columns=["a", "b"]),
        np.ma.masked_array(ROWS),
        list(map(np.asarray, ROWS)),
    ],
    ids=["big-endian f8", "big-endian f4", "big-endian i2", "lists", "jax", "pandas", "unmasked", "list of arrays"],
)
def test_whatever_numpy_takes_is_examples(inputs: Any, give: Give) -> None:
    sources = give({"inputs": inputs, "label": pd.Series(np.arange(10))})
    taken = take_all(sources)
    assert (len(sources.train), len(sources.eval), sources.inputs, sources.num_outputs) == (7, 3, (2,), 10)
    assert all(column.dtype.isnative for column in taken.values())
    assert np.array_equal(taken["inputs"], ROWS[taken["label"]])


@pytest.mark.parametrize(
    ("label", "num_outputs", "may_ignore"),
    [
        (np.arange(10) % 3, 3, False),
        (np.arange(10, dtype=">i4") % 3, 3, False),
        (np.where(np.arange(10) % 2, IGNORED_LABEL, np.arange(10)), 9, True),
        (np.arange(10) > 4, 2, False),
        (np.arange(10) - 1, 9, False),
        (np.arange(10) / 4, 1, False),
        (np.ones((10, 3)), 3, False),
        (np.array(np.arange(10), complex), 1, False),
    ],
)
def test_labels_stay_as_they_are(label: np.ndarray, num_outputs: int, may_ignore: bool, give: Give) -> None:
    """An objective of the user's own is the only one who knows what they mean; ours are asked later."""
    sources = give(labelled(label))
    taken = take_all(sources)
    rows = (taken["inputs"][:, 0] / 2).astype(int)
    assert np.array_equal(taken["label"], label[rows])
    assert taken["label"].dtype == label.dtype.newbyteorder("=")
    assert (sources.num_outputs, sources.may_ignore, sources.classes) == (num_outputs, may_ignore, ())


@pytest.mark.parametrize("kind", [np.array, pd.Series, pd.Categorical, list])
def test_labels_that_are_names_are_classes(kind: Callable[[list[str]], Any], give: Give) -> None:
    names = ["owl", "cat"] * 5
    sources = give(labelled(kind(names)))
    taken = take_all(sources)
    rows = (taken["inputs"][:, 0] / 2).astype(int)
    assert (sources.classes, sources.num_outputs, taken["label"].dtype) == (("cat", "owl"), 2, np.int32)
    assert [sources.classes[number] for number in taken["label"]] == [names[row] for row in rows]
    assert sources.fingerprint == give(labelled(np.array(names))).fingerprint
    assert sources.fingerprint != give(labelled(np.array(["owl", "bee"] * 5))).fingerprint


def test_inputs_that_are_missing_are_told(give: Give) -> None:
    sources = give(labelled(np.arange(10)) | {"inputs": np.where(ROWS > 16, np.nan, ROWS)})
    assert sources.summary == "7 + 3 examples (train + eval); 3 of 20 values of inputs are NaN or infinite"
    assert give(labelled(np.arange(10))).summary == "7 + 3 examples (train + eval)"


def test_tokens_may_have_padding(give: Give) -> None:
    sources = give({"tokens": np.array([[1, 5, IGNORED_LABEL]] * 10)})
    assert (sources.inputs, sources.num_outputs, sources.may_ignore) == ((2,), 6, True)
    assert not give({"tokens": np.zeros((10, 3), np.uint8)}).may_ignore


def generate() -> Iterator[np.ndarray]:
    yield from ROWS


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (ROWS, "returned ndarray; expected a dict of arrays, or data.sources.Sources"),
        ((ROWS, np.arange(10)), 'returned tuple of 2; return {"inputs": …, "label": …}; expected a dict'),
        (pd.DataFrame(ROWS), 'returned DataFrame; return {"inputs": table[[…]].to_numpy()'),
        (generate(), "returned generator; expected a dict of arrays"),
        (None, "returned NoneType"),
        ({}, "returned nothing; expected"),
        ({"x": ROWS}, 'returned x; expected "inputs"'),
        ({"inputs": generate()}, '"inputs" is a generator; expected an array, as np.array(list(…)) makes it'),
        ({"inputs": map(float, ROWS[0])}, '"inputs" is a map; expected an array'),
        ({"inputs": [[1, 2], [3]]}, '"inputs" (list) cannot be made an array: its rows are of several lengths'),
        (
            {"inputs": np.array([{}, 1], object)},
            '"inputs" is an array of objects (dict, int); expected an array of numb',
        ),
        ({"inputs": pd.DataFrame({"a": [1, 2], "b": ["x", 2]})}, '"inputs" is an array of objects (int, str)'),
        ({"inputs": np.array([["a"], ["b"]])}, "\"inputs\" is text (such as 'a'); expected an array of numbers"),
        ({"inputs": np.zeros(3, [("a", int), ("b", float)])}, '"inputs" is a structured array (a, b)'),
        ({"inputs": np.array("2020-01-01", "datetime64[D]")}, '"inputs" is datetime64[D][]; expected an array of numb'),
        ({"inputs": np.float32(3)}, '"inputs" is float32[]; expected an array of numbers, a row per example'),
        ({"inputs": np.arange(3.0)}, "an example is a single number (shape (3,)); expected a row per example"),
        (labelled(np.arange(3)), "the arrays are not of the same examples: inputs has 10, label has 3 rows"),
        (labelled(["a", None] * 5), '"label" is an array of objects (NoneType, str)'),
        (labelled(["a", ""] * 5), "label is empty in 5 of 10"),
        (labelled(pd.Series([1, None] * 5, dtype=object)), '"label" is an array of objects'),
        (labelled(np.full(10, 2**40)), f'"label" holds {2**40}, which needs more than 32 bits'),
        (labelled(np.full(10, 2**63, np.uint64)), f'"label" holds {2**63}, which needs more than 32 bits'),
        (labelled(np.full(10, -(2**40))), f'"label" holds {-(2**40)}, which needs more than 32 bits'),
        ({"inputs": np.ma.masked_array(ROWS, ROWS > 17)}, '"inputs" has 2 masked values; fill or drop them'),
    ],
)
def test_what_is_no_data_is_said_in_a_line(value: Any, part: str, give: Give) -> None:
    with pytest.raises(InvalidUserData, match="their_data:make: ") as caught:
        give(value)
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_their_function_raises_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("their_data")
    module.make = lambda size: np.zeros(size)[size]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "their_data", module)
    with pytest.raises(IndexError, match="index 3 is out of bounds"):
        read_user_data("their_data:make", {"size": 3}, 0.3)


@dataclass(frozen=True)
class Theirs:
    """A source of a user's, which gives whatever `columns` makes of the indices."""

    columns: Callable[[np.ndarray], Any]

    def __len__(self) -> int:
        return 10

    def take(self, indices: np.ndarray) -> Any:
        return self.columns(indices)


def sources_of(source: Any, **fields: Any) -> Sources:
    table = Table(labelled(np.arange(10)))
    made = Sources(table, table, (2,), 10, "hash", "theirs")
    # Past the types that are checked in tests: a user's own code is not checked.
    for name, value in {"train": source, **fields}.items():
        object.__setattr__(made, name, value)
    return made


def test_sources_of_their_own_are_looked_at_batch_by_batch(give: Give) -> None:
    good = Theirs(lambda indices: {"inputs": ROWS[indices].astype(">f4"), "label": [int(n) for n in indices]})
    made = give(sources_of(good, inputs=[2], num_outputs=np.int64(10), held_out={"test": good}))
    batch = made.train.take(np.array([3, 1]))
    assert (batch["inputs"].tolist(), batch["label"].tolist()) == ([[6.0, 7.0], [2.0, 3.0]], [3, 1])
    assert batch["inputs"].dtype == np.dtype("=f4")
    assert (made.inputs, type(made.num_outputs), len(made.held_out["test"])) == ((2,), int, 10)
    assert made.fingerprint == "hash"
    late = Theirs(lambda indices: {"inputs": ROWS[:1] if len(indices) > 1 else ROWS[indices]})
    with pytest.raises(UnreadableError, match='their_data:make: train.take: "inputs" has 1 rows for 3 indices'):
        give(sources_of(late)).train.take(np.arange(3))


@pytest.mark.parametrize(
    ("source", "fields", "part"),
    [
        (Theirs(lambda indices: ROWS[indices]), {}, "train.take gave ndarray; expected a dict of arrays"),
        (Theirs(lambda indices: {"inputs": ROWS}), {}, '"inputs" has 10 rows for 1 indices; expected one each'),
        (Theirs(lambda indices: {"inputs": np.array([{}])}), {}, '"inputs" is an array of objects (dict)'),
        (Theirs(lambda indices: {"inputs": np.array(["a"])}), {}, "\"inputs\" is text (such as 'a')"),
        (Theirs(lambda indices: {"inputs": [[1], [2, 3]]}), {}, "its rows are of several lengths"),
        (Theirs(lambda indices: {"inputs": np.float32(0)}), {}, '"inputs" is float32[]'),
        (Table({"inputs": np.array([{}] * 10)}), {}, '"inputs" is an array of objects (dict)'),
        ([1, 2], {}, "Sources.train is list; expected an object with __len__ and take(indices)"),
        (
            Table(labelled(np.arange(10))),
            {"held_out": {"train": Table({})}},
            "Sources.held_out has 'train'; expected na",
        ),
        (Table(labelled(np.arange(10))), {"held_out": {"my set": Table({})}}, "Sources.held_out has 'my set'"),
        (Table(labelled(np.arange(10))), {"inputs": 2}, "Sources.inputs is 2; expected the shape of one example"),
        (Table(labelled(np.arange(10))), {"num_outputs": "ten"}, "Sources.num_outputs is 'ten'; expected how many"),
        (Table(labelled(np.arange(10))), {"fingerprint": None}, "fingerprint and summary: expected text"),
    ],
)
def test_sources_that_are_none_are_said_in_a_line(source: Any, fields: dict[str, Any], part: str, give: Give) -> None:
    with pytest.raises(InvalidUserData, match="their_data:make") as caught:
        give(sources_of(source, **fields))
    assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_labels_of_their_own_sources_are_watched_where_the_objective_is_ours(give: Give) -> None:
    late = Theirs(lambda indices: {"inputs": ROWS[indices], "label": np.where(indices == 7, -1, indices % 3)})
    made = give(sources_of(late, num_outputs=3, held_out={"test": late}))
    watched = watch_user_labels(made, "classify")
    assert watched.train.take(np.array([1, 5]))["label"].tolist() == [1, 2]
    for name, source in (("train", watched.train), ("test", watched.held_out["test"])):
        with pytest.raises(
            UnreadableError, match=f"their_data:make: {name}: example 7 has the label -1; expected 0 or"
        ):
            source.take(np.array([6, 7]))
    assert watch_user_labels(made, "external") is made
    # What is in memory was looked at as a whole.
    assert watched.eval is made.eval
