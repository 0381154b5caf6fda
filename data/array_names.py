"""Which arrays of an archive are inputs and labels, to train on, to evaluate on and to test: by names people use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.option_fields import ArrayNames, explain_missing_name
from data.splits import Split, find_split

INPUT_WORDS = frozenset({"x", "inputs", "input", "images", "image", "imgs", "img", "data", "features", "feature"})
LABEL_WORDS = frozenset({"y", "label", "labels", "target", "targets", "classes", "class"})
# `Xtrain` and `trainX`, whose letter and part are one word.
RUN_TOGETHER = re.compile(r"^(?P<letter>[xyXY])(?=(train|trn|test|tst|val|dev|eval))|(?<=[a-z])(?=[A-Z])")
# A message names so many arrays.
MOST_NAMES = 20
KNOWN = "x_train and y_train, or train_images and train_labels"


@dataclass(frozen=True)
class ChosenArrays:
    """The names of inputs and label of each part, and what is said about it: nothing where they are called as ours."""

    parts: Mapping[Split, tuple[str, str]]
    said: str = ""

    @property
    def names(self) -> list[str]:
        """Return the names of all arrays that are read."""
        return [name for pair in self.parts.values() for name in pair]


def choose_arrays(names: Sequence[str], given: ArrayNames | None) -> ChosenArrays:
    """Return the arrays to read: those that are given, those that are called as ours, or those of a known scheme.

    Raises ValueError, which says what there is, where none of that is so.
    """
    if given is not None:
        return _choose_given(names, given)
    if "inputs" in names and "label" in names:
        return _choose_own(names)
    found = _choose_known(names)
    if "train" not in found:
        raise ValueError(
            f"has no inputs and label, nor names that are known ({KNOWN}); it has: {_list_names(names)}; say which "
            "with data.columns={inputs: NAME, label: NAME}"
        )
    return _use_test_where_alone(found)


def _choose_given(names: Sequence[str], given: ArrayNames) -> ChosenArrays:
    parts: dict[Split, tuple[str, str]] = {"train": (given.inputs, given.label)}
    if given.eval_inputs is not None and given.eval_label is not None:
        parts["eval"] = (given.eval_inputs, given.eval_label)
    if given.test_inputs is not None and given.test_label is not None:
        parts["test"] = (given.test_inputs, given.test_label)
    chosen = ChosenArrays(parts)
    if missing := [name for name in chosen.names if name not in names]:
        raise ValueError(f"has no array {missing[0]}{explain_missing_name(missing[0], names)}")
    return chosen


def _choose_own(names: Sequence[str]) -> ChosenArrays:
    parts: dict[Split, tuple[str, str]] = {"train": ("inputs", "label")}
    if "eval_inputs" in names:
        if "eval_label" not in names:
            raise ValueError(f"has no array eval_label; it has: {_list_names(names)}")
        parts["eval"] = ("eval_inputs", "eval_label")
    if "test_inputs" in names and "test_label" in names:
        parts["test"] = ("test_inputs", "test_label")
    return ChosenArrays(parts)


def _choose_known(names: Sequence[str]) -> dict[Split, tuple[str, str]]:
    """Return the arrays of each part that has both inputs and labels. Raises ValueError where two claim one place."""
    places: dict[tuple[Split, str], str] = {}
    for name in sorted(names):
        if (role := _find_role(name)) is None:
            continue
        # An archive that is not split is to train on.
        place = (find_split(_part_words(name)) or "train", role)
        if place in places:
            raise ValueError(
                f"has {places[place]} and {name}, which may both be {place[1]} of {place[0]}; say which with "
                "data.columns={inputs: NAME, label: NAME}"
            )
        places[place] = name
    splits: tuple[Split, ...] = ("train", "eval", "test")
    return {
        split: (places[split, "inputs"], places[split, "label"])
        for split in splits
        if (split, "inputs") in places and (split, "label") in places
    }


def _find_role(name: str) -> str | None:
    """Return whether an array of this name is `inputs` or `label`; None where the name does not say."""
    words = [word for word in re.split(r"[\W_]+", _part_words(name).lower()) if word]
    rest = [word for word in words if find_split(word) is None]
    # More words than one say more than we know: `train_images_mean`.
    if len(rest) != 1 or len(words) > 2:
        return None
    return "inputs" if rest[0] in INPUT_WORDS else "label" if rest[0] in LABEL_WORDS else None


def _part_words(name: str) -> str:
    """Return a name with its words apart: `X_train` of `Xtrain`."""
    return RUN_TOGETHER.sub(lambda found: f"{found['letter'] or ''}_", name)


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return ", ".join(sorted(names)[:MOST_NAMES]) + more if names else "none"


def _use_test_where_alone(found: dict[Split, tuple[str, str]]) -> ChosenArrays:
    """Return the parts with the one that is called `test` to evaluate on, where there is no other; and say so."""
    parts = dict(found)
    if "test" in parts and "eval" not in parts:
        # As Keras has it: the one part beside the training data is looked at while training.
        parts["eval"] = parts.pop("test")
    splits: tuple[Split, ...] = ("train", "eval", "test")
    parts = {split: parts[split] for split in splits if split in parts}
    return ChosenArrays(parts, "; ".join(f"{split}: {' and '.join(pair)}" for split, pair in parts.items()))
