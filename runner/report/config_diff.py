"""What differs between runs, in as few columns as tell them apart: a pure function of documents and typed words.

Where `ckpt=best` and `ckpt=combined` were typed, that is one column and not the six keys that they stand for: as long
as the word says everything. Otherwise the keys themselves are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runner.config.identity import select_result_keys
from runner.text import shorten
from runner.types import Document

MOST_COLUMNS = 12
# A longer value belongs in no cell of a table.
MOST_VALUE_CHARS = 1000
# The word of a group that was not named in the command of a run.
DEFAULT = "default"


@dataclass(frozen=True)
class KeyColumn:
    """One key, and its value in each run; None where the run has no such key."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class ConfigDiff:
    """The columns that tell runs apart; `more` names keys that differ as well, and for which there is no room."""

    columns: tuple[KeyColumn, ...]
    more: tuple[str, ...]

    def name(self, run: int) -> str:
        """Return what makes a run another one than the others, `ckpt=best lr=0.1`; nothing where it is alone."""
        words = [(column.key, column.values[run]) for column in self.columns if column.values[run] is not None]
        return " ".join(f"{key.rpartition('.')[2]}={format_value(value)}" for key, value in words)

    def reorder(self, order: Sequence[int]) -> ConfigDiff:
        """Return the columns for the runs in another order; `order[i]` is the run that is to be the i-th."""
        columns = (KeyColumn(column.key, tuple(column.values[run] for run in order)) for column in self.columns)
        return ConfigDiff(tuple(columns), self.more)

    def order(self, num_runs: int) -> list[int]:
        """Return the runs sorted by their values: the first column first, numbers as numbers, what is missing last."""

        def rank(run: int) -> list[tuple[bool, bool, float, str]]:
            ranks = []
            for column in self.columns:
                value, number = column.values[run], parse_number(column.values[run])
                ranks.append((value is None, number is None, number or 0.0, format_value(value)))
            return ranks

        return sorted(range(num_runs), key=rank)


def compare_configs(documents: Sequence[Document], words: Sequence[Sequence[str]]) -> ConfigDiff:
    """Return what differs between runs; what was typed comes first.

    Args:
        documents: the configuration of each run.
        words: the words `key=value` that were typed for each run.
    """
    leaves = [select_result_keys(document) for document in documents]
    keys = dict.fromkeys(key for run in leaves for key in run)
    columns = {key: tuple(run.get(key) for run in leaves) for key in keys}
    columns = {key: values for key, values in columns.items() if len({format_value(value) for value in values}) > 1}
    typed = [dict(_split_override(word) for word in run) for run in words]
    typed_keys = dict.fromkeys(key for run in typed for key in run)
    # A word for a group (`ckpt=best`) takes the place of the keys below it, where it says all that they say.
    for group in typed_keys:
        below = {
            key: values for key, values in columns.items() if key.startswith(f"{group}.") and key not in typed_keys
        }
        group_words = tuple(run.get(group, DEFAULT) for run in typed)
        if below and _words_determine_values(group_words, list(below.values())):
            columns = {key: values for key, values in columns.items() if key not in below} | {group: group_words}
    order = [*(key for key in typed_keys if key in columns), *(key for key in columns if key not in typed_keys)]
    shown, more = order[:MOST_COLUMNS], order[MOST_COLUMNS:]
    return ConfigDiff(tuple(KeyColumn(key, columns[key]) for key in shown), tuple(more))


def format_value(value: Any) -> str:
    """Return a value as it is typed on a command line."""
    return shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), MOST_VALUE_CHARS)


def parse_number(value: Any) -> float | None:
    """Return a value as a number, also where it was typed as text; None where it is none or not finite."""
    # Python takes True for 1; in a configuration it is a word.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    # OverflowError: an integer of hundreds of digits.
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _split_override(word: str) -> tuple[str, str]:
    key, _, value = word.lstrip("+~").partition("=")
    return key.replace("/", "."), value


def _words_determine_values(words: Sequence[str], columns: Sequence[Sequence[Any]]) -> bool:
    """Return whether runs with the same word have the same value in every column."""
    # They need not: the YAML that a word stands for may have been edited between two runs.
    meanings: dict[str, list[str]] = {}
    for word, *values in zip(words, *columns, strict=True):
        meaning = [format_value(value) for value in values]
        if meanings.setdefault(word, meaning) != meaning:
            return False
    return True
