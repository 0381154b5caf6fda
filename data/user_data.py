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
    """Call `target` (`module:function`) and return what it gives: Sources as they are, or arrays of examples, split.

    Raises InvalidUserData where it gives neither.
    """
    module, _, attribute = target.partition(":")
    made = getattr(import_module(module), attribute)(**options)
    if isinstance(made, Sources):
        return made
    if not isinstance(made, Mapping):
        raise InvalidUserData(
            f"{target}: returned {type(made).__name__}; expected a dict of arrays, or data.sources.Sources"
        )
    columns = {str(name): np.asarray(column) for name, column in made.items()}
    if problem := _find_problem(columns):
        raise InvalidUserData(f"{target}: {problem}")
    return _split_examples(columns, eval_fraction)


def classify_source(source: Source) -> tuple[str, list[str]]:
    """Return what a source gives, and the names of its arrays.

    It gives `tokens`, `images` (height × width × channels) or `features`.
    """
    examples = source.take(np.zeros(1, np.int64))
    if "tokens" in examples:
        return "tokens", [*examples]
    return "images" if "inputs" in examples and examples["inputs"].ndim == 4 else "features", [*examples]


def _find_problem(columns: Mapping[str, np.ndarray]) -> str | None:
    """Return what keeps these arrays from being examples; None where they are."""
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


def _split_examples(columns: dict[str, np.ndarray], eval_fraction: float) -> Sources:
    """Return examples as sources; those to evaluate on are drawn by a fixed permutation, the same ones every time."""
    train, held_out = split_table(Table(columns), eval_fraction)
    digest, files = hashlib.sha256(), {}
    for name, column in columns.items():
        content = column.tobytes()
        # The same bytes in another shape or type are other data.
        digest.update(f"{name} {column.dtype.str} {column.shape} ".encode())
        digest.update(content)
        files[name] = identify_bytes(content)
    shape, num_outputs = _find_shapes(columns)
    summary = f"{len(train)} + {len(held_out)} examples (train + eval)"
    return Sources(train, held_out, shape, num_outputs, digest.hexdigest(), summary, files=files)


def _find_shapes(columns: Mapping[str, np.ndarray]) -> tuple[tuple[int, ...], int]:
    """Return the shape of one example, and the number of outputs that its label asks for."""
    if "tokens" in columns:
        tokens = columns["tokens"]
        vocabulary = NUM_BYTES if tokens.dtype == np.uint8 else int(tokens.max(initial=0)) + 1
        # A row is one token longer than what the model sees: the last one is only a target.
        return (tokens.shape[1] - 1,), vocabulary
    shape, label = columns["inputs"].shape[1:], columns.get("label")
    if label is None:
        return shape, 0
    # A regression has as many outputs as the label has numbers, a classification as many as there are classes.
    if label.dtype.kind == "f" or label.ndim > 1:
        return shape, int(np.prod(label.shape[1:]))
    return shape, int(label.max(initial=0)) + 1
