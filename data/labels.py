"""Labels of every kind, looked at once: the number or the name of a class for each example, or numbers to regress on.

`prepare_labels` reads the labels of a table. Where the objective is known only later, label_checks.py looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.sources import IGNORED_LABEL

# A label above that is the number of something else, such as a time or a customer: a model of so many classes would
# fill the memory. Whoever means it says `num_classes`.
MOST_CLASSES = 10_000_000
# So many are never doubted; more of them only where there are at least a tenth as many examples.
FEW_CLASSES = 10_000
# Text that is another one in each of so many rows names no classes.
LEAST_ROWS_TO_DOUBT = 20
# Numbers that differ by less than what float32 keeps of them: their rounding may be this share of their spread.
MOST_ROUNDING = 0.01

ReadAs = Literal["classes", "numbers"]


@dataclass(frozen=True)
class Labels:
    """The labels of all parts of a data set, as a model is trained on them.

    Attributes:
        sides: the labels of each part: int32 of shape (examples,), or float32 of (examples,) or (examples, numbers).
        num_outputs: the number of classes, or of numbers in a label.
        classes: the names of the classes, where the labels are names; else empty.
        may_ignore: whether some are `ignore_label`.
        ignore_label: the number that is no class, and left out.
    """

    sides: tuple[np.ndarray, ...]
    num_outputs: int
    classes: tuple[str, ...] = ()
    may_ignore: bool = False
    ignore_label: int = IGNORED_LABEL

    @property
    def description(self) -> str:
        """Return how many classes or numbers there are, in words."""
        if self.sides and self.sides[0].dtype.kind == "f":
            return f"labels of {self.num_outputs} number{'s' if self.num_outputs > 1 else ''}"
        return f"{self.num_outputs} classes"


def prepare_labels(
    sides: Sequence[np.ndarray],
    num_classes: int | None = None,
    read_as: ReadAs | None = None,
    ignore_label: int = IGNORED_LABEL,
) -> Labels:
    """Return the labels of the parts of a data set as a model is trained on them.

    Whole numbers, true and false, and names are classes; other numbers are to regress on. `read_as` says so where whole
    numbers are meant as numbers, or where floats are the numbers of classes. The number `ignore_label` is no class.
    Raises ValueError, in a line, where a label is none of these, is missing, or is outside the range.
    """
    arrays = [_drop_single_column(np.asarray(side)) for side in sides]
    kinds = {_find_kind(array) for array in arrays}
    if len(kinds) > 1:
        listed = " and ".join(sorted({str(array.dtype) for array in arrays}))
        raise ValueError(f"label is {listed} in different parts of the data; expected one type")
    kind = kinds.pop()
    if read_as == "classes" and kind == "float":
        arrays, kind = [_take_whole_numbers(array) for array in arrays], "whole"
    check_ignore_label(ignore_label, arrays[0], "numbers to regress on" if read_as == "numbers" else "")
    if kind == "text":
        if read_as == "numbers":
            raise ValueError("labels=numbers, but label is text; expected numbers")
        return _number_names(arrays, num_classes)
    if kind == "float" or read_as == "numbers":
        return _prepare_numbers(arrays, num_classes)
    return _prepare_class_numbers(arrays, num_classes, ignore_label)


def check_ignore_label(ignore_label: int, array: np.ndarray, meant_as: str = "") -> None:
    """Raise ValueError where a label to leave out was chosen, but labels are no numbers of classes."""
    if ignore_label == IGNORED_LABEL or (array.dtype.kind in "iu" and not meant_as):
        return
    kinds = {"f": "numbers to regress on", "b": "true and false"}
    what = meant_as or ("names" if is_text(array) else kinds.get(array.dtype.kind, "no whole numbers"))
    raise ValueError(
        f"ignore_label={ignore_label} is the number of a class, but label is {array.dtype}, {what}; leave "
        "data.ignore_label out, or write the classes as whole numbers (astype(int))"
    )


def _find_kind(array: np.ndarray) -> Literal["text", "float", "whole"]:
    """Return what the labels of an array are. Raises ValueError where they are nothing that a label can be."""
    if is_text(array):
        return "text"
    if array.dtype.kind in "biuf":
        return "float" if array.dtype.kind == "f" else "whole"
    raise ValueError(f"label is {array.dtype} of shape {array.shape}; expected whole numbers, numbers, or names")


def is_text(array: np.ndarray) -> bool:
    """Tell whether an array holds text, whatever numpy calls its type."""
    if array.dtype.kind in "UST":
        return True
    return array.dtype.kind == "O" and array.size > 0 and all(isinstance(value, str) for value in array.flat)


def _drop_single_column(array: np.ndarray) -> np.ndarray:
    """Return labels without a second dimension of size 1, unless they are numbers to regress on."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind != "f" else array


def _number_names(arrays: list[np.ndarray], num_classes: int | None) -> Labels:
    """Return names of classes as numbers, in the order of the names."""
    texts = [_to_text(array) for array in arrays]
    _check_dimensions(texts)
    every = np.concatenate(texts)
    if empty := int((every == "").sum()):
        raise ValueError(f"label is empty in {count_of(empty, every)}; fill or drop these rows")
    names, numbers = np.unique(every, return_inverse=True)
    if len(names) == len(every) >= LEAST_ROWS_TO_DOUBT:
        raise ValueError(
            f"label is another text in each of the {len(every):,} rows (such as {str(names[0])[:40]!r}), which names "
            "no classes; choose another data.label"
        )
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(
            f"num_classes={num_classes}, but the labels have {len(names)} names; raise data.num_classes or leave it out"
        )
    ends = np.cumsum([len(text) for text in texts])[:-1]
    split = np.split(numbers.reshape(-1).astype(np.int32), ends)
    return Labels(tuple(split), num_classes or len(names), tuple(names.tolist()))


def _to_text(array: np.ndarray) -> np.ndarray:
    """Return text of any of numpy's types as its oldest one. Raises ValueError where some of it is missing."""
    if array.dtype.kind == "S":
        try:
            return np.char.decode(array, "utf-8")
        except UnicodeDecodeError:
            raise ValueError("label is bytes that are no UTF-8 text; write names of classes as text") from None
    if array.dtype.kind == "T" and (missing := sum(not isinstance(value, str) for value in array.flat)):
        raise ValueError(f"label is empty in {count_of(missing, array)}; fill or drop these rows")
    return np.array(array.tolist(), np.str_).reshape(array.shape)


def _take_whole_numbers(array: np.ndarray) -> np.ndarray:
    """Return the numbers of classes that are written as floats. Raises ValueError where one is no whole number."""
    odd = array[~(np.isfinite(array) & (array == np.round(array)))]
    if odd.size:
        raise ValueError(f"labels=classes, but a label is {odd.flat[0]}; expected whole numbers")
    return _drop_single_column(array.astype(np.int64))


def _prepare_numbers(arrays: list[np.ndarray], num_classes: int | None) -> Labels:
    """Return numbers to regress on as float32."""
    if num_classes is not None:
        raise ValueError(
            f"num_classes={num_classes}, but label is {arrays[0].dtype}, numbers to regress on; leave "
            "data.num_classes out, or write the classes as whole numbers (astype(int))"
        )
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1 or len(next(iter(shapes))) > 1:
        listed = " and ".join(str(array.shape) for array in arrays)
        raise ValueError(f"label has shape {listed}; expected (examples,) or (examples, numbers)")
    for array in arrays:
        check_numbers(array)
    sides = tuple(array.astype(np.float32) for array in arrays)
    return Labels(sides, int(np.prod(shapes.pop())))


def check_numbers(label: np.ndarray) -> None:
    """Raise ValueError where numbers to regress on are missing, infinite, or alike but for what float32 rounds off."""
    if missing := int((~np.isfinite(label)).sum()):
        raise ValueError(f"label is NaN or infinite in {count_of(missing, label)}; fill or drop these rows")
    if not label.size or (label.dtype.kind == "f" and label.dtype.itemsize <= 4):
        return
    wide = label.reshape(len(label), -1).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        rounding, spread = np.abs(wide.astype(np.float32) - wide).max(axis=0), wide.std(axis=0)
    # A column of one value has no spread, and nothing is lost by its rounding.
    if (lost := ~np.isfinite(rounding) | ((rounding > MOST_ROUNDING * spread) & (spread > 0))).any():
        column = int(np.argmax(lost))
        raise ValueError(
            f"label is about {wide[:, column].mean():.6g} and varies by {spread[column]:.3g}, which float32 rounds by "
            f"{rounding[column]:.3g}; subtract their mean, or scale them"
        )


def _prepare_class_numbers(arrays: list[np.ndarray], num_classes: int | None, ignore_label: int) -> Labels:
    """Return the numbers of classes as int32, and how many classes there are."""
    _check_dimensions(arrays)
    tops = []
    for array in arrays:
        check_class_range(array, num_classes, ignore_label)
        check_some_count(array, ignore_label)
        # True and false are two classes, also where all are the same.
        tops.append(1 if array.dtype.kind == "b" else find_largest_class(array, ignore_label))
    most = limit_classes(sum(map(len, arrays))) if num_classes is None else 2**31
    if max(tops) >= most:
        raise ValueError(
            f"a label is {max(tops)}, which would make {max(tops) + 1:,} classes of {sum(map(len, arrays)):,} "
            "examples; number the classes from 0, or say data.num_classes=N"
        )
    sides = tuple(array.astype(np.int32) for array in arrays)
    may_ignore = any(holds_label(array, ignore_label) for array in arrays)
    return Labels(sides, num_classes or max(tops) + 1, may_ignore=may_ignore, ignore_label=ignore_label)


def find_largest_class(label: np.ndarray, ignore_label: int) -> int:
    """Return the largest number of a class, the one that is left out not counted; 0 where there is none."""
    return int(label.max(initial=0, where=label != ignore_label))


def holds_label(label: np.ndarray, value: int) -> bool:
    """Tell whether whole numbers hold one of this value."""
    return label.dtype.kind in "iu" and bool((label == value).any())


def limit_classes(num_examples: int) -> int:
    """Return from how many classes on so many examples are doubted to be labelled by them."""
    return min(MOST_CLASSES, max(FEW_CLASSES, 10 * num_examples))


def _check_dimensions(arrays: list[np.ndarray]) -> None:
    """Raise ValueError where there is not one label for each example."""
    for array in arrays:
        if array.ndim != 1:
            way_out = "argmax(1) gives the classes" if is_one_hot(array) else "expected one whole number an example"
            raise ValueError(f"label is {array.dtype} of shape {array.shape}; {way_out}")


def is_one_hot(label: np.ndarray) -> bool:
    """Tell whether labels are rows of zeros with a single one, as one-hot encoding makes them."""
    if label.ndim != 2 or label.shape[1] < 2 or not len(label) or label.dtype.kind not in "biuf":
        return False
    return bool(((label == 0) | (label == 1)).all() and (label.sum(axis=1) == 1).all())


def check_class_range(label: np.ndarray, num_classes: int | None, ignore_label: int = IGNORED_LABEL) -> None:
    """Raise ValueError where a whole number is that of no class, and not the one that is left out."""
    outside = find_outside(label, num_classes, ignore_label)
    if outside.any():
        count = count_of(int(outside.sum()), label)
        if (label[outside] < 0).any():
            raise ValueError(
                f"a label is {int(label[outside].min())}; expected 0 or more ({count} are not); number the classes "
                f"from 0, {ignore_label} where there is none; floats are numbers to regress on"
            )
        wrong = int(label[outside].max())
        raise ValueError(
            f"a label is {wrong}; expected 0 or more, and less than num_classes={num_classes} ({count} are not); is "
            f"the number of classes {wrong + 1}?"
        )


def check_some_count(label: np.ndarray, ignore_label: int) -> None:
    """Raise ValueError where every label is the one that is left out."""
    if label.size and label.dtype.kind in "iu" and (label == ignore_label).all():
        raise ValueError(f"every label is {ignore_label}, which is left out; nothing is there to train on")


def find_outside(label: np.ndarray, num_classes: int | None, ignored: int | None = IGNORED_LABEL) -> np.ndarray:
    """Return which whole numbers are those of no class and not `ignored`: Bool of the same shape."""
    if label.dtype.kind == "b":
        return label & (num_classes == 1)
    outside = label < 0 if num_classes is None else (label < 0) | (label >= num_classes)
    return outside if ignored is None else outside & (label != ignored)


def count_of(count: int, array: np.ndarray) -> str:
    """Return `3 of 90`, for a message."""
    return f"{count:,} of {array.size:,}"
