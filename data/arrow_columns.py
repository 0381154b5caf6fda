"""Columns of Arrow tables as arrays: numbers, lists of numbers, names of classes, encoded images."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np

EXPECTED = "expected numbers, lists of numbers, or encoded images"


def require_pyarrow(kind: str) -> None:
    """Raise ValueError, which says how to get it, where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f'kind={kind} needs a package: pip install -e ".[parquet]"')


def read_inputs(table: Any, names: list[str]) -> np.ndarray:
    """Return a column of lists, or several columns of numbers beside each other, as an array with a row per example.

    Raises ValueError where one is something else, or has rows without a value.
    """
    arrays = [_to_array(table.column(name).combine_chunks(), name) for name in names]
    if len(arrays) == 1 and arrays[0].ndim > 1:
        return arrays[0]
    if nested := [name for name, array in zip(names, arrays, strict=True) if array.ndim > 1]:
        raise ValueError(f"column {nested[0]} holds lists, which do not go beside other columns; name it alone")
    return np.column_stack(arrays)


def read_label(table: Any, name: str) -> np.ndarray:
    """Return a column of labels: numbers, true and false, or text. Raises ValueError where it is something else."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    if isinstance(column.type, pa.DictionaryType):
        column = column.dictionary_decode()
    if is_text(column.type):
        _check_filled(column, name)
        return np.asarray(column.to_pylist(), np.str_)
    return _to_array(column, name, "expected numbers or names of classes")


def read_text(table: Any, name: str) -> list[str]:
    """Return the rows of a column of text. Raises ValueError where it is none, or has rows without a value."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    if isinstance(column.type, pa.DictionaryType):
        column = column.dictionary_decode()
    if not is_text(column.type):
        raise ValueError(f"column {name} is {column.type}, which is no text; say data.gives=features, or images")
    _check_filled(column, name)
    rows: list[str] = column.to_pylist()
    return rows


def is_text(kind: Any) -> bool:
    """Tell whether an Arrow type is text."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_number(kind: Any) -> bool:
    """Tell whether an Arrow type is a number, or true and false."""
    import pyarrow as pa

    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind))


def find_encoded_images(column: Any, name: str) -> list[bytes] | None:
    """Return the encoded images of a column, bare or with their path beside them; None where it is another kind.

    Raises ValueError where rows have none.
    """
    import pyarrow as pa

    # Hugging Face writes an image as {bytes, path}.
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return None
    _check_filled(column, name)
    encoded: list[bytes] = column.to_pylist()
    return encoded


def find_class_names(schema: Any, label: str) -> tuple[str, ...]:
    """Return the names of classes that Hugging Face writes beside a column of their numbers; empty where it has not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    # Anybody may have written anything there.
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _check_filled(column: Any, name: str) -> None:
    if column.null_count:
        raise ValueError(f"column {name} has {column.null_count} empty rows; fill or drop them")


def _to_array(column: Any, name: str, expected: str = EXPECTED) -> np.ndarray:
    """Return a column of numbers, or of lists (of lists) of numbers that are all of one length, as an array."""
    import pyarrow as pa

    if isinstance(column.type, pa.DictionaryType):
        column = column.dictionary_decode()
    _check_filled(column, name)
    # Each level of lists is taken off and becomes a dimension.
    lengths, kind = [], column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        values = column.flatten()
        if pa.types.is_fixed_size_list(kind):
            sizes = {len(values) // max(len(column), 1)}
        else:
            sizes = set(column.value_lengths().to_pylist())
        if len(sizes) != 1:
            raise ValueError(f"column {name} has lists of {min(sizes)} to {max(sizes)} values; expected one length")
        lengths.append(sizes.pop())
        column, kind = values, values.type
        # What is empty inside of lists would become NaN, or zeros.
        _check_filled(column, name)
    if is_text(kind):
        raise ValueError(f"column {name} is text ({kind}); {expected}; Parquet with data.gives=tokens reads text")
    if not is_number(kind):
        raise ValueError(f"column {name} is {kind}; {expected}")
    if pa.types.is_decimal(kind):
        column = column.cast(pa.float64())
    array: np.ndarray = column.to_numpy(zero_copy_only=False)
    return array.reshape(-1, *lengths)
