"""Check that an objective can be measured on the labels, or tokens, of a source, once it is known which objective.

Nobody can look through the labels of every source beforehand; `CheckedLabels` looks at each batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from data.data_errors import UnreadableError
from data.labels import (
    MOST_CLASSES,
    check_class_range,
    check_ignore_label,
    check_numbers,
    check_some_count,
    count_of,
    find_outside,
    is_one_hot,
    limit_classes,
)
from data.sources import IGNORED_LABEL, Source, SourcePart, Sources, Table

# So many examples are looked at where a source cannot show all its labels at once.
EXAMPLES_LOOKED_AT = 8


def read_known_labels(source: Source) -> dict[str, np.ndarray]:
    """Return `label` and `tokens` of a source: all of them where they are in memory, else those of a few examples."""
    if not len(source):
        return {}
    if isinstance(source, Table):
        return {name: column for name, column in source.columns.items() if name in ("label", "tokens")}
    if isinstance(source, SourcePart) and isinstance(source.source, Table):
        return {name: column[source.chosen] for name, column in read_known_labels(source.source).items()}
    inner, chosen = (source.source, source.chosen) if isinstance(source, SourcePart) else (source, slice(None))
    # Images and rows that are read when they are taken have their labels in memory.
    if isinstance(label := getattr(inner, "label", None), np.ndarray) and len(label) == len(inner):
        return {"label": label[chosen]}
    taken = source.take(np.arange(min(len(source), EXAMPLES_LOOKED_AT)))
    return {name: np.asarray(value) for name, value in taken.items() if name in ("label", "tokens")}


def find_usual_objective(source: Source) -> Literal["classify", "regress"]:
    """Return what is usual for the labels of a source: floats are to regress on, whole numbers are classes.

    Raises ValueError where floats may be either.
    """
    label = read_known_labels(source).get("label")
    if label is None or label.dtype.kind != "f":
        return "classify"
    if is_one_hot(label):
        raise ValueError(f"label is {label.dtype} of shape {label.shape}, one-hot; argmax(1) gives the classes")
    # A few examples may be whole by chance; classes are told by all of them, or taken for numbers.
    if label.ndim == 1 and len(label) > 1 and (label == np.round(label)).all():
        raise ValueError(
            f"label is {label.dtype}, but holds whole numbers ({label.min():g} to {label.max():g}); make them whole "
            "numbers if they are classes (astype(int); data.labels=classes of a table), or say objective=regress"
        )
    return "regress"


def check_labels_fit(objective: str, source: Source, num_outputs: int, ignore_label: int = IGNORED_LABEL) -> None:
    """Raise ValueError where an objective of ours cannot be measured on the labels, or tokens, of a source.

    `ignore_label` is what no loss and no metric looks at. With an objective of the user's own nothing is checked.
    """
    if objective not in ("classify", "next_token", "regress"):
        return
    known = read_known_labels(source)
    if objective == "next_token":
        if "tokens" in known:
            _check_tokens(known["tokens"], num_outputs, ignore_label)
            # A few examples may be padding by chance.
            if len(known["tokens"]) == len(source):
                _check_some_foretold(known["tokens"], ignore_label)
    elif "label" in known:
        label = known["label"]
        where = f"label is {label.dtype} of shape {label.shape}"
        if objective == "classify":
            _check_classes(label, num_outputs, ignore_label, where)
            if len(label) == len(source):
                check_some_count(label, ignore_label)
        elif label.dtype.kind != "f":
            raise ValueError(
                f"{where}, but objective=regress takes numbers; astype(float) makes them so, or data.labels=numbers"
            )
        else:
            check_ignore_label(ignore_label, label)
            check_numbers(label)


def _check_classes(label: np.ndarray, num_outputs: int, ignore_label: int, where: str) -> None:
    """Raise ValueError where labels are not the numbers of classes."""
    if is_one_hot(label):
        raise ValueError(f"{where}, one-hot; objective=classify takes the classes, as argmax(1) gives them")
    if label.dtype.kind not in "biu":
        raise ValueError(
            f"{where}, but objective=classify takes whole numbers; make them so (astype(int)), or say objective=regress"
        )
    check_ignore_label(ignore_label, label)
    if label.ndim == 2 and label.shape[1] == 1:
        raise ValueError(f"{where}; objective=classify takes one whole number an example, as label[:, 0] gives it")
    # A label for each place of an example, where nobody has said how many classes there are.
    outside = find_outside(label, num_outputs, ignore_label)
    if label.ndim > 1 and outside.any() and not find_outside(label, None, ignore_label).any():
        raise ValueError(
            f"{where} up to {int(label.max())}, taken for {num_outputs} numbers an example; for a class at each place "
            "return data.sources.Sources, which says num_outputs"
        )
    check_class_range(label, num_outputs, ignore_label)
    # Of a source that cannot show all its labels, only a few are known.
    if num_outputs > (limit_classes(len(label)) if len(label) > EXAMPLES_LOOKED_AT else MOST_CLASSES):
        raise ValueError(
            f"{where} up to {int(label.max())}, which makes {num_outputs:,} classes; number the classes from 0"
        )


def _check_tokens(tokens: np.ndarray, vocabulary: int, ignore_label: int) -> None:
    """Raise ValueError where tokens are no rows of numbers below the size of the vocabulary."""
    where = f"tokens is {tokens.dtype} of shape {tokens.shape}"
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"{where}; expected whole numbers (astype(int))")
    if tokens.ndim != 2:
        raise ValueError(f"{where}; expected a row of tokens for each example")
    if (outside := find_outside(tokens, vocabulary, _exempt_token(ignore_label))).any():
        way_out = f"write {ignore_label} for padding" if ignore_label < 0 else "raise num_outputs"
        raise ValueError(
            f"a token is {int(tokens[outside][0])}; expected 0 or more, and less than the vocabulary of {vocabulary} "
            f"({count_of(int(outside.sum()), tokens)} are not); {way_out}"
        )
    if vocabulary > MOST_CLASSES:
        raise ValueError(
            f"{where} up to {int(tokens.max())}, which makes a vocabulary of {vocabulary:,}; number the tokens from 0"
        )


def _check_some_foretold(tokens: np.ndarray, ignore_label: int) -> None:
    """Raise ValueError where there is nothing but padding behind the first token of each example."""
    targets = tokens[:, 1:]
    if targets.size and (targets == ignore_label).all():
        raise ValueError(f"every token is {ignore_label}, which is padding; nothing is there to train on")


def _exempt_token(ignored: int | None) -> int | None:
    """Return the token that may be outside the vocabulary: padding below 0. The model sees any other as it is."""
    return ignored if ignored is not None and ignored < 0 else None


def ignore_token(sources: Sources, token: int) -> Sources:
    """Return sources of tokens in which one is seen, but is never what is to be foretold; -100: none.

    Raises ValueError where there is no such token.
    """
    if token == IGNORED_LABEL:
        return sources
    if not 0 <= token < sources.num_outputs:
        raise ValueError(
            f"ignore_label={token} is none of the tokens, which go from 0 to {sources.num_outputs - 1}; choose one of "
            "them, or leave data.ignore_label out"
        )
    return replace(sources, may_ignore=True, ignore_label=token)


@dataclass(frozen=True)
class CheckedLabels:
    """A source whose labels, or tokens, nobody could look through beforehand: each batch of them is looked at.

    Attributes:
        source: the examples.
        num_outputs: labels are less than that.
        ignored: a label that counts nowhere, and may be any number; None: there is none.
        name: what an example is called in a message, such as `FOLDER: record`.
    """

    source: Source
    num_outputs: int
    ignored: int | None
    name: str

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at `indices`. Raises UnreadableError, which names one whose label is outside."""
        batch = self.source.take(indices)
        for name in ("label", "tokens"):
            if name in batch:
                self._check(name, batch[name], np.asarray(indices))
        return batch

    def _check(self, name: str, values: np.ndarray, indices: np.ndarray) -> None:
        if values.dtype.kind == "b" or not values.size:
            return
        if values.dtype.kind not in "iu":
            raise UnreadableError(
                f"{self.name} {int(indices[0])} and others: {name} is {values.dtype}; expected whole numbers"
            )
        # Almost always all is well, and the smallest and the largest say so.
        if int(values.min()) >= 0 and int(values.max()) < self.num_outputs:
            return
        exempt = _exempt_token(self.ignored) if name == "tokens" else self.ignored
        outside = find_outside(values, self.num_outputs, exempt)
        if outside.any():
            place: tuple[Any, ...] = tuple(np.argwhere(outside)[0])
            raise UnreadableError(
                f"{self.name} {int(indices[place[0]])} has the {name.removesuffix('s')} {int(values[place])}; expected "
                f"0 or more, and less than {self.num_outputs}; write it again"
            )
