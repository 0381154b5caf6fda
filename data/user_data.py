"""A user's own data: what his function returns, as sources."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np

from data.data_errors import InvalidUserData
from data.fingerprint import identify_bytes
from data.sources import NUM_BYTES, Source, Sources, Table, split_table


def read_user_data(target: str, options: Mapping[str, Any], eval_fraction: float) -> Sources:
    """What `target` returns: Sources as they are; arrays of examples, split. Raises Unfit where it is neither."""
    module, _, attribute = target.partition(":")
    made = getattr(import_module(module), attribute)(**options)
    if isinstance(made, Sources):
        return made
    if not isinstance(made, Mapping):
        raise InvalidUserData(
            f"{target}: returned {type(made).__name__}; expected a dict of arrays, or data.sources.Sources"
        )
    columns = {str(name): np.asarray(column) for name, column in made.items()}
    if problem := _problem(columns):
        raise InvalidUserData(f"{target}: {problem}")
    return _split(columns, eval_fraction)


def classify_source(source: Source) -> tuple[str, list[str]]:
    """What a source gives (tokens, images of height × width × channels, or features), and the names of its arrays."""
    examples = source.take(np.zeros(1, np.int64))
    if "tokens" in examples:
        return "tokens", [*examples]
    return "images" if "inputs" in examples and examples["inputs"].ndim == 4 else "features", [*examples]


def _problem(columns: Mapping[str, np.ndarray]) -> str | None:
    """What keeps these arrays from being examples."""
    if not {"inputs", "tokens"} & columns.keys():
        return f'returned {", ".join(columns) or "nothing"}; expected "inputs" (and mostly "label"), or "tokens"'
    for name, column in columns.items():
        if column.ndim == 0 or column.dtype.kind not in "biuf":
            return f'"{name}" is {column.dtype}{list(column.shape)}; expected an array of numbers, a row per example'
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        return f"the arrays are not of the same examples: {counts} rows"
    first = columns.get("tokens", columns.get("inputs"))
    if first is not None and first.ndim < 2:
        return f"an example is a single number (shape {first.shape}); expected a row per example, as x[:, None] gives"
    return None


def _split(columns: dict[str, np.ndarray], eval_fraction: float) -> Sources:
    """Examples drawn by a fixed permutation are for evaluation: the same ones however often it is run."""
    train, held_out = split_table(Table(columns), eval_fraction)
    digest, files = hashlib.sha256(), {}
    for name, column in columns.items():
        content = column.tobytes()
        digest.update(f"{name} {column.dtype.str} {column.shape} ".encode())
        digest.update(content)
        files[name] = identify_bytes(content)
    shape, num_outputs = _shape_of(columns)
    summary = f"{len(train)} + {len(held_out)} examples (train + eval)"
    return Sources(train, held_out, shape, num_outputs, digest.hexdigest(), summary, files=files)


def _shape_of(columns: Mapping[str, np.ndarray]) -> tuple[tuple[int, ...], int]:
    """The shape of one example, and the number of outputs that its label asks for."""
    if "tokens" in columns:
        tokens = columns["tokens"]
        vocabulary = NUM_BYTES if tokens.dtype == np.uint8 else int(tokens.max(initial=0)) + 1
        return (tokens.shape[1] - 1,), vocabulary
    shape, label = columns["inputs"].shape[1:], columns.get("label")
    if label is None:
        return shape, 0
    if label.dtype.kind == "f" or label.ndim > 1:
        return shape, int(np.prod(label.shape[1:]))
    return shape, int(label.max(initial=0)) + 1
