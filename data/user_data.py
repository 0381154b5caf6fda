"""A user's own data: what his function returns, as sources."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.data_errors import InvalidUserData, UnreadableError
from data.fingerprint import identify_bytes
from data.label_checks import CheckedLabels
from data.labels import find_largest_class, holds_label, is_text, prepare_labels
from data.sources import IGNORED_LABEL, NUM_BYTES, Source, Sources, Table, split_table
from data.tables import describe_layout, describe_values
from data.user_target import import_target

NUMBER_KINDS = "biufc"
# What names a split in a command, and is no part that there is anyway.
SPLIT_NAME = re.compile(r"^(?!(?:train|eval)$)[a-z][a-z0-9_]{0,31}$")
EXPECTED = "expected a dict of arrays, or data.sources.Sources"


def read_user_data(
    target: str, options: Mapping[str, Any], eval_fraction: float, ignore_label: int = IGNORED_LABEL
) -> Sources:
    """Call `target` (`module:function`) and return what it gives: Sources as they are, or arrays of examples, split.

    The label, or the token, `ignore_label` is left out of losses and metrics.

    Raises InvalidUserData where it gives neither, or what it gives cannot be trained on.
    """
    made = import_target(target)(**options)
    if isinstance(made, Sources):
        return _note_ignored(_check_sources(target, made), ignore_label)
    if not isinstance(made, Mapping):
        raise InvalidUserData(f"{target}: returned {type(made).__name__}{_suggest_dict(made)}; {EXPECTED}")
    try:
        columns = {str(name): _to_array(str(name), column) for name, column in made.items()}
        columns, classes = _number_text_labels(columns, ignore_label)
    except ValueError as error:
        raise InvalidUserData(f"{target}: {error}") from None
    if problem := _find_problem(columns):
        raise InvalidUserData(f"{target}: {problem}")
    return _split_examples(columns, eval_fraction, classes, ignore_label)


def classify_source(source: Source) -> tuple[str, list[str]]:
    """Return what a source gives, and the names of its arrays.

    It gives `tokens`, `images` (height × width × channels) or `features`.
    """
    examples = source.take(np.zeros(1, np.int64))
    if "tokens" in examples:
        return "tokens", [*examples]
    return "images" if "inputs" in examples and examples["inputs"].ndim == 4 else "features", [*examples]


# --- a dict of arrays ---


def _suggest_dict(made: Any) -> str:
    """Return how to write as a dict what was returned instead of one."""
    if isinstance(made, tuple | list) and len(made) == 2:
        return ' of 2; return {"inputs": …, "label": …}'
    if hasattr(made, "columns") and hasattr(made, "to_numpy"):
        return '; return {"inputs": table[[…]].to_numpy(), "label": table[…].to_numpy()}'
    return ""


def _to_array(name: str, value: Any) -> np.ndarray:
    """Return what a user gave as an array, in this machine's byte order. Raises ValueError where it cannot be one."""
    if isinstance(value, Iterator):
        raise ValueError(f'"{name}" is a {type(value).__name__}; expected an array, as np.array(list(…)) makes it')
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        count = np.ma.count_masked(value)
        raise ValueError(f'"{name}" has {count:,} masked values; fill or drop them')
    try:
        array = np.asarray(value)
    # Each library says in its own way that something is no array, or cannot be reached from here.
    except Exception as error:
        uneven = isinstance(value, list | tuple) and "inhomogeneous" in str(error)
        why = "its rows are of several lengths" if uneven else _first_line(error)
        raise ValueError(f'"{name}" ({type(value).__name__}) cannot be made an array: {why}') from None
    return _to_native(array)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _to_native(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _number_text_labels(
    columns: dict[str, np.ndarray], ignore_label: int
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return the columns with a label that is text as numbers of classes, and the names of these."""
    if "label" not in columns or not is_text(columns["label"]):
        return columns, ()
    labels = prepare_labels([columns["label"]], ignore_label=ignore_label)
    return {**columns, "label": labels.sides[0]}, labels.classes


def _find_problem(columns: Mapping[str, np.ndarray]) -> str | None:
    """Return what keeps these arrays from being examples; None where they are."""
    if not {"inputs", "tokens"} & columns.keys():
        return f'returned {", ".join(columns) or "nothing"}; expected "inputs" (and mostly "label"), or "tokens"'
    for name, column in columns.items():
        if problem := _find_column_problem(name, column):
            return problem
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        return f"the arrays are not of the same examples: {counts} rows"
    first = columns.get("tokens", columns.get("inputs"))
    if first is not None and first.ndim < 2:
        return f"an example is a single number (shape {first.shape}); expected a row per example, as x[:, None] gives"
    return None


def _find_column_problem(name: str, column: np.ndarray) -> str | None:
    if column.dtype.names:
        fields = ", ".join(column.dtype.names[:5])
        return f'"{name}" is a structured array ({fields}); expected an array of numbers, as structured_to_unstructured'
    if is_text(column) and column.size:
        return f'"{name}" is text (such as {str(column.flat[0])[:40]!r}); expected an array of numbers'
    if column.dtype.kind == "O":
        seen = sorted({type(value).__name__ for value in column.flat[:100]})
        return (
            f'"{name}" is an array of objects ({", ".join(seen[:3])}); expected an array of numbers, as '
            "np.stack or astype(float) makes it"
        )
    if column.ndim == 0 or not _is_number(column.dtype):
        return f'"{name}" is {column.dtype}{list(column.shape)}; expected an array of numbers, a row per example'
    # On a device whole numbers have 32 bits, and the others would be taken off without a word.
    if column.dtype.kind in "iu" and column.dtype.itemsize == 8 and column.size:
        low, high = int(column.min()), int(column.max())
        if low < -(2**31) or high >= (2**31 if column.dtype.kind == "i" else 2**32):
            wrong = low if low < -(2**31) else high
            return (
                f'"{name}" holds {wrong}, which needs more than 32 bits; number the values from 0, or make them floats'
            )
    return None


def _is_number(dtype: np.dtype[Any]) -> bool:
    # bfloat16 and its kin are numpy types of a package of their own.
    return dtype.kind in NUMBER_KINDS or dtype.type.__module__ == "ml_dtypes"


def _split_examples(
    columns: dict[str, np.ndarray],
    eval_fraction: float,
    classes: tuple[str, ...] = (),
    ignore_label: int = IGNORED_LABEL,
) -> Sources:
    """Return examples as sources; those to evaluate on are drawn by a fixed permutation, the same ones every time."""
    train, held_out = split_table(Table(columns), eval_fraction)
    digest, files = hashlib.sha256(), {}
    for name, column in columns.items():
        content = column.tobytes()
        # The same bytes in another shape or type are other data.
        digest.update(f"{name} {column.dtype.str} {column.shape} ".encode())
        digest.update(content)
        files[name] = identify_bytes(content)
    # The numbers of other names may be the same.
    digest.update("\0".join(classes).encode())
    shape, num_outputs = _find_shapes(columns, ignore_label)
    told = [describe_values(columns["inputs"], "features"), describe_layout(shape)] if "inputs" in columns else []
    return Sources(
        train,
        held_out,
        shape,
        num_outputs,
        digest.hexdigest(),
        "; ".join(filter(None, [f"{len(train)} + {len(held_out)} examples (train + eval)", *told])),
        files=files,
        classes=classes,
        may_ignore=_hold_label(columns, ignore_label),
        ignore_label=ignore_label,
    )


def _hold_label(columns: Mapping[str, np.ndarray], ignore_label: int) -> bool:
    """Tell whether a label, or a token, is the one that is left out."""
    return any(holds_label(columns[name], ignore_label) for name in ("label", "tokens") if name in columns)


def _find_shapes(columns: Mapping[str, np.ndarray], ignore_label: int) -> tuple[tuple[int, ...], int]:
    """Return the shape of one example, and the number of outputs that its label asks for."""
    if "tokens" in columns:
        tokens = columns["tokens"]
        largest = tokens.real.max(initial=0)
        vocabulary = NUM_BYTES if tokens.dtype == np.uint8 else int(largest) + 1 if np.isfinite(largest) else 0
        # A row is one token longer than what the model sees: the last one is only a target.
        return (tokens.shape[1] - 1,), vocabulary
    shape, label = columns["inputs"].shape[1:], columns.get("label")
    if label is None:
        return shape, 0
    # A regression has as many outputs as the label has numbers, a classification as many as there are classes.
    if label.dtype.kind not in "biu" or label.ndim > 1:
        return shape, int(np.prod(label.shape[1:]))
    return shape, find_largest_class(label, ignore_label) + 1


# --- sources of the user's own ---


@dataclass(frozen=True)
class CheckedExamples:
    """A source of the user's own, each batch of which is looked at: that it is arrays of numbers, a row per example."""

    source: Source
    name: str

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at `indices`. Raises UnreadableError where they are no such arrays."""
        taken: Any = self.source.take(indices)
        if not isinstance(taken, Mapping):
            raise UnreadableError(f"{self.name}.take gave {type(taken).__name__}; expected a dict of arrays")
        try:
            batch = {str(name): _to_array(str(name), value) for name, value in taken.items()}
        except ValueError as error:
            raise UnreadableError(f"{self.name}.take: {error}") from None
        for name, column in batch.items():
            if problem := _find_column_problem(name, column):
                raise UnreadableError(f"{self.name}.take: {problem}")
            if len(column) != len(indices):
                raise UnreadableError(
                    f'{self.name}.take: "{name}" has {len(column)} rows for {len(indices)} indices; expected one each'
                )
        return batch


def watch_user_labels(sources: Sources, objective: str) -> Sources:
    """Return sources that look at the labels, or tokens, of each batch of a user's own source.

    With an objective of the user's own, only he knows what they mean: nothing is looked at.
    """
    if objective not in ("classify", "next_token"):
        return sources

    def watch(source: Source) -> Source:
        if not isinstance(source, CheckedExamples):
            return source
        return CheckedLabels(source, sources.num_outputs, sources.ignored, f"{source.name}: example")

    held_out = {name: watch(source) for name, source in sources.held_out.items()}
    return replace(sources, train=watch(sources.train), eval=watch(sources.eval), held_out=held_out)


def _check_sources(target: str, made: Sources) -> Sources:
    """Return the sources of a user, each batch of which is then looked at.

    Raises InvalidUserData where they are not what they should be, or their first example is not.
    """
    if problem := _find_sources_problem(made):
        raise InvalidUserData(f"{target}: Sources.{problem}")
    named = {"train": made.train, "eval": made.eval, **made.held_out}
    checked = {name: _check_source(f"{target}: {name}", source) for name, source in named.items()}
    return replace(
        made,
        train=checked["train"],
        eval=checked["eval"],
        held_out={name: checked[name] for name in made.held_out},
        inputs=tuple(int(size) for size in made.inputs),
        num_outputs=int(made.num_outputs),
        may_ignore=bool(made.may_ignore),
        ignore_label=int(made.ignore_label),
    )


def _note_ignored(made: Sources, ignore_label: int) -> Sources:
    """Return a user's own sources that say what is left out: what the command says, or else what they say."""
    if ignore_label != IGNORED_LABEL:
        return replace(made, may_ignore=True, ignore_label=ignore_label)
    tables = [source for source in (made.train, made.eval, *made.held_out.values()) if isinstance(source, Table)]
    # Where all is in memory, it shows by itself.
    return replace(made, may_ignore=made.may_ignore or any(_hold_label(t.columns, made.ignore_label) for t in tables))


def _check_source(name: str, source: Source) -> Source:
    """Return a source that looks at each batch, or at all examples at once where they are in memory."""
    if isinstance(source, Table):
        try:
            columns = {str(key): _to_array(str(key), column) for key, column in source.columns.items()}
        except ValueError as error:
            raise InvalidUserData(f"{name}: {error}") from None
        for key, column in columns.items():
            if problem := _find_column_problem(key, column):
                raise InvalidUserData(f"{name}: {problem}")
        return Table(columns)
    checked = CheckedExamples(source, name)
    if len(checked):
        try:
            checked.take(np.zeros(1, np.int64))
        # What the user's own code raises keeps its traceback.
        except UnreadableError as error:
            raise InvalidUserData(str(error)) from None
    return checked


def _find_sources_problem(made: Sources) -> str | None:
    """Return what is wrong with the fields of Sources, beginning with its name; None where nothing is."""
    for name, source in {"train": made.train, "eval": made.eval, **dict(made.held_out)}.items():
        if not (hasattr(source, "take") and hasattr(source, "__len__")):
            return f"{name} is {type(source).__name__}; expected an object with __len__ and take(indices)"
    for name in made.held_out:
        if not SPLIT_NAME.fullmatch(str(name)):
            return f"held_out has {name!r}; expected names of small letters, digits and _, other than train and eval"
    if not isinstance(made.inputs, tuple | list) or not all(isinstance(size, int | np.integer) for size in made.inputs):
        return f"inputs is {made.inputs!r}; expected the shape of one example, such as (32, 32, 3)"
    if not isinstance(made.num_outputs, int | np.integer) or made.num_outputs < 0:
        return f"num_outputs is {made.num_outputs!r}; expected how many classes or tokens there are"
    if not isinstance(made.ignore_label, int | np.integer) or not isinstance(made.may_ignore, bool | np.bool_):
        return "ignore_label and may_ignore: expected a whole number, and True or False"
    if not isinstance(made.fingerprint, str) or not isinstance(made.summary, str):
        return "fingerprint and summary: expected text"
    return None
