"""Which folders and files are the parts of a data set that its makers split: `train`, `val` and `test`, and their kin.

A split layout is one where all folders (or files) of one level are named after parts, and one of them is to train on.
A name alone decides nothing: `train` beside `car` and `plane` is a vehicle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Literal

Split = Literal["train", "eval", "test"]

SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trn", "trainset", "trainval"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "valset", "dev", "devset", "development", "eval", "evaluation"),
        "eval",
    ),
    **dict.fromkeys(("test", "testing", "tst", "testset", "devtest"), "test"),
}
# Words beside the name of a part that say nothing about what is in it: `training_set`, `train_images`, `test.txt.gz`.
FILLERS = frozenset(
    {
        *("set", "sets", "data", "dataset", "split", "splits", "part", "parts", "shard", "shards", "of", "full"),
        *("images", "image", "imgs", "img", "text", "raw", "tokens", "array", "record", "arrayrecord", "arrow"),
        *("txt", "json", "jsonl", "ndjson", "parquet", "csv", "tsv", "bin", "npz", "npy", "gz", "bz", "zst", "xz"),
    }
)
# As published files are numbered, mostly with a hash behind.
SHARD = re.compile(r"\d+-of-\d+(-[0-9a-f]{8,})?")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


class AmbiguousSplitError(ValueError):
    """Some names are those of parts of a data set and some are not, so what is to train on must be said."""


def find_split(name: str) -> Split | None:
    """Return which part of a data set a folder or file of this name is; None where the name does not say.

    `val`, `Training_Set`, `test-00000-of-00001.parquet`, `wiki.valid.txt`, `train2017`, `train_02.jsonl`.
    """
    found = {SPLIT_NAMES[word] for word in _list_words(name) if word in SPLIT_NAMES}
    if found == {"eval", "test"}:
        # `test-dev`: some of a test set.
        return "test"
    return found.pop() if len(found) == 1 else None


def is_bare_split(name: str) -> bool:
    """Tell whether a name is that of a part and says nothing else, as `train` does and `train_station` does not."""
    return find_split(name) is not None and not _list_other_words(name)


def group_names(names: Iterable[str]) -> dict[Split, list[str]] | None:
    """Return the names of one level by the part that they are; None where this level is not split.

    Raises AmbiguousSplitError where it may be: where only some are parts, where nothing is to train on, or where the
    parts seem to be of different data.
    """
    ordered = sorted(names)
    groups: dict[Split, list[str]] = {}
    for name in ordered:
        if (split := find_split(name)) is not None:
            groups.setdefault(split, []).append(name)
    others = [name for name in ordered if find_split(name) is None]
    if len(groups) < 2:
        return None
    shown = " and ".join(group[0] for group in groups.values())
    if "train" not in groups:
        if others:
            return None
        raise AmbiguousSplitError(f"holds {shown}, but nothing to train on")
    if not _are_of_one_set(groups):
        # Ordinary names that happen to have such a word in them: `train_station` beside `test_tube` and others.
        if others:
            return None
        raise AmbiguousSplitError(f"holds {shown}, which may be parts of one data set or not")
    if others:
        raise AmbiguousSplitError(f"holds {shown}, which are parts of a data set, beside {others[0]}")
    return groups


def group_by_split(paths: Sequence[Path], root: PurePath) -> dict[Split, list[Path]] | None:
    """Return the files below `root` by the part they belong to, in their order; None where nothing says so.

    The first level that is split decides: `train/0.parquet`, `en/test/0.parquet`, `data/train-00000-of-00002.parquet`.
    Raises AmbiguousSplitError, a ValueError without the way out: append it.
    """
    parts = [path.relative_to(root).parts for path in paths]
    for level in range(max(map(len, parts), default=0)):
        # A file that lies higher up is one beside the parts.
        names = [own[level] if level < len(own) else own[-1] for own in parts]
        if group_names(set(names)) is not None:
            groups: dict[Split, list[Path]] = {}
            for name, path in zip(names, paths, strict=True):
                split = find_split(name)
                assert split is not None, name
                groups.setdefault(split, []).append(path)
            return groups
    return None


def _are_of_one_set(groups: dict[Split, list[str]]) -> bool:
    """Tell whether names of another part differ from one to train on in nothing but the part, or that one is bare."""
    train = {_list_other_words(name) for name in groups["train"]}
    rest = {_list_other_words(name) for split, names in groups.items() if split != "train" for name in names}
    return () in train or bool(train & rest)


def _list_other_words(name: str) -> tuple[str, ...]:
    return tuple(word for word in _list_words(name) if word not in SPLIT_NAMES and word not in FILLERS)


def _list_words(name: str) -> list[str]:
    """Return the words of a name in lower case, without numbers: `trainA` and `train-A` have two."""
    pieces = re.split(r"[\W\d_]+", SHARD.sub(" ", name))
    # Where letters of other alphabets are in a word, its capitals do not part it.
    words = [word for piece in pieces for word in (WORD.findall(piece) if piece.isascii() else [piece])]
    return [word.lower() for word in words]
