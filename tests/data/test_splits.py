"""Names of parts of a data set: known where all of a level are, never guessed where they may be something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.splits import AmbiguousSplitError, find_split, group_by_split, group_names, is_bare_split


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("training_set", "train"),
        ("TRAIN", "train"),
        ("train2017", "train"),
        ("trainA", "train"),
        ("seg_train", "train"),
        ("train_02.jsonl", "train"),
        ("train-00000-of-00002-a09b74b3ef9c3b56.parquet", "train"),
        ("val", "eval"),
        ("valid", "eval"),
        ("validation", "eval"),
        ("dev", "eval"),
        ("eval", "eval"),
        ("val.bin", "eval"),
        ("wiki.valid.txt", "eval"),
        ("Test", "test"),
        ("testing", "test"),
        ("test-00000-of-00001.parquet", "test"),
        ("test-dev", "test"),
        ("wiki.test.txt.gz", "test"),
        ("cat", None),
        ("trainer", None),
        ("détrain", None),
        ("retrained.txt", None),
        ("latest", None),
        ("contest", None),
        ("device", None),
        ("train_test.txt", None),
        ("", None),
    ],
)
def test_a_name_says_which_part_it_is(name: str, split: str | None) -> None:
    assert find_split(name) == split


def test_a_bare_name_says_nothing_else() -> None:
    assert [name for name in ("train", "Training_Set", "train_station", "car") if is_bare_split(name)] == [
        "train",
        "Training_Set",
    ]


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["train", "val"], {"train": ["train"], "eval": ["val"]}),
        (["Testing", "Training"], {"test": ["Testing"], "train": ["Training"]}),
        (["train2017", "val2017", "test2017"], {"train": ["train2017"], "eval": ["val2017"], "test": ["test2017"]}),
        (["seg_train", "seg_test", "seg_val"], {"train": ["seg_train"], "test": ["seg_test"], "eval": ["seg_val"]}),
        (
            ["train-clean", "train-other", "dev-clean"],
            {"train": ["train-clean", "train-other"], "eval": ["dev-clean"]},
        ),
        # Ordinary classes, one of which is a vehicle or is called as a part is.
        (["car", "plane", "train"], None),
        (["a", "b", "test"], None),
        (["train_station", "test_tube", "dog"], None),
        (["train"], None),
        (["dev", "test", "prod"], None),
        ([], None),
    ],
)
def test_a_level_is_split_where_all_of_it_is(names: list[str], groups: dict[str, list[str]] | None) -> None:
    assert group_names(names) == groups


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["train", "val", "extra"], "holds train and val, which are parts of a data set, beside extra"),
        (["val", "test"], "holds test and val, but nothing to train on"),
        (["train_station", "test_tube"], "which may be parts of one data set or not"),
    ],
)
def test_what_may_be_split_is_not_guessed(names: list[str], why: str) -> None:
    with pytest.raises(AmbiguousSplitError, match=why):
        group_names(names)


@pytest.mark.parametrize(
    ("files", "counts"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"], (2, 0, 1)),
        (["en/train/0.parquet", "de/train/0.parquet", "en/validation/0.parquet", "en/test/0.parquet"], (2, 1, 1)),
        (["train/the_test.txt", "train/dev.txt", "val/a.txt"], (2, 1, 0)),
        (["test_data/train.txt", "test_data/val.txt"], (1, 1, 0)),
        (["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"], (1, 1, 1)),
        (["train_en.txt", "train_de.txt", "test_en.txt"], (2, 0, 1)),
    ],
)
def test_files_belong_to_the_first_level_that_is_split(files: list[str], counts: tuple[int, int, int]) -> None:
    groups = group_by_split([Path("/d", file) for file in files], Path("/d"))
    assert groups is not None
    assert tuple(len(groups.get(split, [])) for split in ("train", "eval", "test")) == counts


@pytest.mark.parametrize(
    "files", [["a.txt", "b.txt"], ["train_0.txt", "train_1.txt"], ["test.txt"], ["a.txt", "test.txt"]]
)
def test_files_of_no_parts_are_not_grouped(files: list[str]) -> None:
    assert group_by_split([Path("/d", file) for file in files], Path("/d")) is None


@pytest.mark.parametrize(
    "files", [["wiki.train.txt", "wiki.test.txt", "README.txt"], ["train/a.txt", "test/b.txt", "c.txt"]]
)
def test_files_beside_parts_are_told(files: list[str]) -> None:
    with pytest.raises(AmbiguousSplitError, match="beside"):
        group_by_split([Path("/d", file) for file in files], Path("/d"))
