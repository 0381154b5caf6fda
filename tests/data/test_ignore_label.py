"""`data.ignore_label`: a label of that value is no class, a token of it is seen; or one line says why it cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest

from data import Arrays, Csv, Data, ExternalData, Hub, Parquet, Tokens
from data.data_errors import UnreadableError
from data.label_checks import CheckedLabels, check_labels_fit
from data.labels import prepare_labels
from data.sources import IGNORED_LABEL, Source, Sources, Table
from data.user_data import watch_user_labels
from runner.rundir.layout import RunDir
from runner.train.dataset import record_or_compare, sources_as_recorded
from tests.data.test_records import records
from tests.data.test_text_formats import nanogpt

SIZE = 20
ROWS = np.arange(SIZE * 3, dtype=np.float32).reshape(SIZE, 3)
Make = Callable[[np.ndarray, Path, int], Any]


def masked(value: int) -> np.ndarray:
    """Return labels of three classes, every fourth of which is of another value."""
    return np.where(np.arange(SIZE) % 4 == 3, value, np.arange(SIZE) % 3)


def arrays(label: np.ndarray, root: Path, value: int = IGNORED_LABEL, **more: Any) -> Arrays:
    np.savez(root / "a.npz", inputs=ROWS, label=label)
    return Arrays(path=str(root / "a.npz"), gives="features", ignore_label=value, **more)


def csv(label: np.ndarray, root: Path, value: int = IGNORED_LABEL) -> Csv:
    pd.DataFrame({"a": ROWS[:, 0], "b": ROWS[:, 1], "label": label}).to_csv(root / "a.csv", index=False)
    return Csv(path=str(root / "a.csv"), ignore_label=value)


def parquet(label: np.ndarray, root: Path, value: int = IGNORED_LABEL) -> Parquet:
    pd.DataFrame({"inputs": list(ROWS), "label": label}).to_parquet(root / "a.parquet")
    return Parquet(path=str(root / "a.parquet"), gives="features", ignore_label=value)


def hub(label: np.ndarray, root: Path, value: int = IGNORED_LABEL) -> Hub:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"image": ROWS.tolist(), "label": label.tolist()})
    datasets.DatasetDict(train=made).save_to_disk(str(root / "hub"))
    return Hub(path=str(root / "hub"), gives="features", ignore_label=value)


def external(made: Any, value: int = IGNORED_LABEL) -> ExternalData:
    module = ModuleType("their_masks")
    module.make = lambda: made  # type: ignore[attr-defined]
    sys.modules["their_masks"] = module
    return ExternalData(target="their_masks:make", ignore_label=value)


def returned(label: np.ndarray, root: Path, value: int = IGNORED_LABEL) -> ExternalData:
    return external({"inputs": ROWS, "label": label}, value)


KINDS: list[Make] = [arrays, csv, parquet, hub, returned]


@pytest.fixture(autouse=True)
def _forget_their_module() -> Any:
    yield
    sys.modules.pop("their_masks", None)


def take_all(source: Source) -> dict[str, np.ndarray]:
    return source.take(np.arange(len(source)))


@pytest.mark.parametrize("value", [255, -1, 3])
@pytest.mark.parametrize("make", KINDS)
def test_a_label_that_is_left_out_is_no_class(make: Make, value: int, tmp_path: Path) -> None:
    sources = make(masked(value), tmp_path, value).sources()
    assert (sources.num_outputs, sources.ignored) == (3, value)
    label = np.concatenate([take_all(side)["label"] for side in (sources.train, sources.eval)])
    # What is in the data stays as it is, and so does its fingerprint.
    assert sorted(label.tolist()) == sorted(masked(value).tolist())
    for side in (sources.train, sources.eval):
        check_labels_fit("classify", side, sources.num_outputs, sources.ignore_label)
    if value == 255:
        plain = make(masked(value), tmp_path, IGNORED_LABEL).sources()
        assert (plain.num_outputs, plain.ignored, plain.fingerprint) == (256, None, sources.fingerprint)


@pytest.mark.parametrize("make", KINDS)
def test_minus_100_is_one_of_the_others_where_another_is_left_out(make: Make, tmp_path: Path) -> None:
    assert make(masked(-100), tmp_path, -100).sources().ignored == -100

    def check() -> None:
        sources = make(masked(-100), tmp_path, 255).sources()
        check_labels_fit("classify", sources.train, sources.num_outputs, sources.ignore_label)

    with pytest.raises(ValueError, match="a label is -100; expected 0 or more .* 255 where there is none") as caught:
        check()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("value", "num_outputs"), [(2, 5), (0, 5), (4, 4), (7, 5)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint32])
def test_a_class_that_there_is_may_be_left_out(value: int, num_outputs: int, dtype: Any, tmp_path: Path) -> None:
    """Where none of that value is there, the program is that of data without any."""
    for made in (arrays, returned):
        sources = made((np.arange(SIZE) % 5).astype(dtype), tmp_path, value).sources()
        assert (sources.num_outputs, sources.ignored) == (num_outputs, None if value == 7 else value)


@pytest.mark.parametrize(
    ("label", "options", "told"),
    [
        (np.arange(5) / 2, {}, "but label is float64, numbers to regress on; leave data.ignore_label out"),
        (np.arange(5), {"read_as": "numbers"}, "but label is int64, numbers to regress on"),
        (np.array(["a", "b"]), {}, "ignore_label=255 is the number of a class, but label is <U1, names"),
        (np.arange(5) > 2, {}, "but label is bool, true and false"),
        (np.full(5, 255), {}, "every label is 255, which is left out; nothing is there to train on"),
        (np.array([0, 4, 255]), {"num_classes": 3}, "a label is 4; expected 0 or more, and less than num_classes=3"),
        (np.array([0, 254, 255]), {"num_classes": 3}, "a label is 254; expected"),
    ],
)
def test_what_cannot_be_left_out_is_told(label: np.ndarray, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="label") as caught:
        prepare_labels([label], ignore_label=255, **options)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_whole_numbers_that_are_written_as_floats() -> None:
    made = prepare_labels([np.array([0.0, 1.0, -1.0])], None, "classes", -1)
    assert (made.sides[0].tolist(), made.num_outputs, made.may_ignore) == ([0, 1, -1], 2, True)
    assert prepare_labels([np.array([0, 2, 255], np.uint8)], 3, None, 255).num_outputs == 3


@pytest.mark.parametrize(("label", "objective"), [(np.arange(SIZE) / 2, "regress"), (np.arange(SIZE) > 4, "classify")])
def test_labels_of_a_user_that_cannot_be_left_out(label: np.ndarray, objective: str, tmp_path: Path) -> None:
    sources = returned(label, tmp_path, 0).sources()
    with pytest.raises(ValueError, match="ignore_label=0 is the number of a class, but label is (float64|bool)"):
        check_labels_fit(objective, sources.train, sources.num_outputs, sources.ignore_label)
    # Only he knows what an objective of his own makes of them.
    check_labels_fit("external", sources.train, sources.num_outputs, sources.ignore_label)


def test_a_test_set_without_labels_is_left_out(tmp_path: Path) -> None:
    parts = {"x_train": ROWS, "y_train": masked(255), "x_val": ROWS, "y_val": masked(255), "x_test": ROWS}
    np.savez(tmp_path / "a.npz", **parts, y_test=np.full(SIZE, 255, np.uint8))
    sources = Arrays(path=str(tmp_path / "a.npz"), gives="features", ignore_label=255).sources()
    assert (dict(sources.held_out), sources.num_outputs) == ({}, 3)
    assert "the test set is left out, for its labels are all 255" in sources.summary


def test_a_test_set_of_the_hub_may_be_masked_alone(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": np.arange(SIZE) % 3, "validation": np.arange(SIZE) % 3, "test": masked(-1)}
    made = {
        name: datasets.Dataset.from_dict({"image": ROWS.tolist(), "label": label.tolist()})
        for name, label in parts.items()
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "hub"))
    sources = Hub(path=str(tmp_path / "hub"), gives="features", ignore_label=-1).sources()
    assert (sources.ignored, list(sources.held_out), sources.num_outputs) == (-1, ["test"], 3)
    # As it is without the option, where such a test set has labels that are none.
    assert dict(Hub(path=str(tmp_path / "hub"), gives="features").sources().held_out) == {}


def test_records_that_were_not_looked_at_may_be_left_out_too(tmp_path: Path) -> None:
    option = records(tmp_path, [np.uint8(255 if n == 7 else n % 3) for n in range(12)], num_classes=3, ignore_label=255)
    sources = option.sources()
    assert (sources.num_outputs, sources.ignored) == (3, 255)
    label = np.concatenate([take_all(side)["label"] for side in (sources.train, sources.eval)])
    assert sorted(label.tolist()) == sorted([*(n % 3 for n in range(12) if n != 7), 255])
    nothing_yet = records(tmp_path, [np.int64(n % 3) for n in range(12)], num_classes=3, ignore_label=255)
    assert nothing_yet.sources().ignored == 255


# --- sources of a user's own ---


class Lazy:
    """A source that does not show its labels."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self.table = Table(columns)

    def __len__(self) -> int:
        return len(self.table)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.table.take(indices)


@pytest.mark.parametrize("kind", [Table, Lazy])
def test_masks_of_a_user(kind: Any) -> None:
    """A class at each place, 255 where there is none: the value is in the command, or in the sources themselves."""
    mask = np.where(np.arange(SIZE * 4).reshape(SIZE, 2, 2) % 5 == 4, 255, np.arange(4).reshape(2, 2) % 3)
    side = kind({"inputs": ROWS, "label": mask.astype(np.uint8)})
    made = Sources(side, side, (3,), 3, "f", "s")
    said = Sources(side, side, (3,), 3, "f", "s", may_ignore=True, ignore_label=255)
    for sources in (external(made, 255).sources(), external(said).sources()):
        assert (sources.ignored, sources.num_outputs) == (255, 3)
        check_labels_fit("classify", sources.train, 3, sources.ignore_label)
        watched = watch_user_labels(sources, "classify")
        assert np.array_equal(take_all(watched.train)["label"], mask)
    unsaid = external(made).sources()
    assert unsaid.ignored is None
    with pytest.raises(ValueError, match="up to 255"):
        check_labels_fit("classify", unsaid.train, 3, unsaid.ignore_label)


def test_tables_of_a_user_show_by_themselves_what_is_left_out() -> None:
    side, test = Table({"inputs": ROWS, "label": masked(0)}), Table({"inputs": ROWS, "label": masked(-100)})
    assert external(Sources(side, side, (3,), 3, "f", "s")).sources().ignored is None
    assert external(Sources(side, side, (3,), 3, "f", "s", held_out={"test": test})).sources().ignored == -100
    wrong = Sources(side, side, (3,), 3, "f", "s")
    # As where nothing checks the types of what is called.
    object.__setattr__(wrong, "ignore_label", "x")
    with pytest.raises(TypeError, match="ignore_label and may_ignore: expected a whole number"):
        external(wrong).sources()


def test_the_first_examples_may_all_be_left_out() -> None:
    """They are all that is looked at beforehand of a source that shows nothing."""
    late = np.where(np.arange(SIZE) < 10, -1, 1)
    check_labels_fit("classify", Lazy({"label": late}), 2, -1)
    check_labels_fit("next_token", Lazy({"tokens": np.stack([late, late], 1)}), 2, -1)
    for name, objective in (("label", "classify"), ("tokens", "next_token")):
        column = np.full((SIZE, 2) if name == "tokens" else SIZE, -1)
        with pytest.raises(ValueError, match=f"every {name.removesuffix('s')} is -1"):
            check_labels_fit(objective, Table({name: column}), 2, -1)


# --- tokens ---


@pytest.mark.parametrize(("value", "vocabulary"), [(0, 6), (9, 10), (-1, 6), (-100, 6)])
def test_padding_of_a_user_is_a_token_unless_it_is_below_0(value: int, vocabulary: int) -> None:
    rows = np.where(np.arange(60).reshape(20, 3) % 5 == 4, value, np.arange(60).reshape(20, 3) % 5 + 2)
    sources = external({"tokens": rows}, value).sources()
    assert (sources.num_outputs, sources.ignored, sources.inputs) == (vocabulary, value, (2,))
    check_labels_fit("next_token", sources.train, vocabulary, value)
    assert sorted(take_all(sources.train)["tokens"].ravel()) != sorted(rows.ravel())
    every = np.concatenate([take_all(side)["tokens"] for side in (sources.train, sources.eval)])
    assert sorted(every.tolist()) == sorted(rows.tolist())


def test_a_token_above_the_vocabulary_is_told_though_it_is_left_out() -> None:
    """The model sees it: there must be an embedding of it."""
    tokens = Lazy({"tokens": np.array([[0, 9, 3]])})
    with pytest.raises(ValueError, match=r"a token is 9; .* vocabulary of 4 .*; raise num_outputs"):
        check_labels_fit("next_token", tokens, 4, 9)
    with pytest.raises(UnreadableError, match="example 0 has the token 9"):
        CheckedLabels(tokens, 4, 9, "example").take(np.array([0]))
    assert CheckedLabels(Lazy({"tokens": np.array([[0, -1, 3]])}), 4, -1, "example").take(np.array([0]))
    assert CheckedLabels(Lazy({"label": np.array([9])}), 4, 9, "example").take(np.array([0]))


def test_a_token_of_files_is_left_out(tmp_path: Path) -> None:
    tokens = np.array([[5, 6, 50256, 0]] * 40).ravel()
    folder = str(nanogpt(tmp_path / "t", train=tokens, val=tokens))
    plain = Tokens(path=folder, seq_len=4).sources()
    assert (plain.ignored, plain.num_outputs) == (None, 50257)
    for value in (0, 50256):
        sources = Tokens(path=folder, seq_len=4, ignore_label=value).sources()
        assert (sources.ignored, sources.num_outputs, sources.fingerprint) == (value, 50257, plain.fingerprint)
        assert sources.train.take(np.array([0]))["tokens"].tolist() == [[5, 6, 50256, 0, 5]]
    for value in (50257, -1, 70000):
        with pytest.raises(ValueError, match=f"^ignore_label={value} is none of the tokens, which go from 0 to 50256;"):
            Tokens(path=folder, seq_len=4, ignore_label=value).sources()


def test_a_byte_of_text_is_left_out(tmp_path: Path) -> None:
    pd.DataFrame({"inputs": ["a line\0\0\0"] * 40}).to_parquet(tmp_path / "a.parquet")
    option = Parquet(path=str(tmp_path / "a.parquet"), gives="tokens", seq_len=8, ignore_label=0)
    assert (option.sources().ignored, option.sources().num_outputs) == (0, 256)


# --- what a run keeps of it ---


@pytest.mark.parametrize("value", [255, -1, 0])
def test_a_model_is_built_without_the_data_for_the_same_objective(value: int, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    sources = arrays(masked(value), tmp_path, value).sources()
    record_or_compare(run, sources)
    recorded = sources_as_recorded(run)
    assert recorded is not None
    assert (recorded.ignored, recorded.num_outputs) == (value, 3)
    # The example that stands for the data is one that is measured.
    check_labels_fit("classify", recorded.train, 3, recorded.ignore_label)


def test_data_without_any_is_recorded_as_ever(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    record_or_compare(run, arrays(masked(2), tmp_path, 255).sources())
    assert "ignored" not in json.loads(run.data.read_text())
    recorded = sources_as_recorded(run)
    assert recorded is not None
    assert recorded.ignored is None


def test_the_usual_value_is_the_same_for_all() -> None:
    having = [option for option in get_args(Data) if "ignore_label" in option.__dataclass_fields__]
    assert {option.__name__ for option in having} == {
        "Tokens",
        "Arrays",
        "Parquet",
        "Csv",
        "Arrayrecord",
        "Hub",
        "ExternalData",
    }
    assert {option.__dataclass_fields__["ignore_label"].default for option in having} == {IGNORED_LABEL}
