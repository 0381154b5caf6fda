"""What differs between runs, in as few columns as tell them apart: a pure function of documents and typed words.

Where `ckpt=best` and `ckpt=combined` were typed, that is one column and not the six keys that they stand for: as long
as the word says everything. Otherwise the keys themselves are shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.config.identity import select_result_keys

MOST_COLUMNS = 12
DEFAULT = "default"  # of a group that was not named in this run's command


@dataclass(frozen=True)
class KeyColumn:
    """One key, and its value in each run; None where the run has no such key."""

    key: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class ConfigDiff:
    """What tells runs apart; `more`: keys that differ as well, and for which there is no room."""

    columns: tuple[KeyColumn, ...]
    more: tuple[str, ...]

    def name(self, run: int) -> str:
        """What makes it another run than the others: `ckpt=best lr=0.1`; nothing where it is the only one."""
        words = [(column.key, column.values[run]) for column in self.columns if column.values[run] is not None]
        return " ".join(f"{key.rpartition('.')[2]}={format_value(value)}" for key, value in words)

    def taken(self, order: Sequence[int]) -> ConfigDiff:
        """The same for the runs in another order."""
        columns = (KeyColumn(column.key, tuple(column.values[run] for run in order)) for column in self.columns)
        return ConfigDiff(tuple(columns), self.more)

    def order(self, runs: int) -> list[int]:
        """The runs by what makes them others: the first column first, numbers as numbers, what is missing last."""

        def rank(run: int) -> list[tuple[bool, bool, float, str]]:
            values = [column.values[run] for column in self.columns]
            return [
                (value is None, parse_number(value) is None, parse_number(value) or 0.0, format_value(value))
                for value in values
            ]

        return sorted(range(runs), key=rank)


def compare_configs(documents: Sequence[Mapping[str, Any]], words: Sequence[Sequence[str]]) -> ConfigDiff:
    """What differs between runs, from their configurations and from what was typed for each; what was typed first."""
    leaves = [select_result_keys(document) for document in documents]
    keys = dict.fromkeys(key for run in leaves for key in run)
    columns = {key: tuple(run.get(key) for run in leaves) for key in keys}
    columns = {key: values for key, values in columns.items() if len({format_value(value) for value in values}) > 1}
    typed = [dict(_split(word) for word in run) for run in words]
    named = dict.fromkeys(key for run in typed for key in run)
    for group in named:
        below = {key: values for key, values in columns.items() if key.startswith(f"{group}.") and key not in named}
        told = tuple(run.get(group, DEFAULT) for run in typed)
        if below and _says(told, list(below.values())):
            columns = {key: values for key, values in columns.items() if key not in below} | {group: told}
    order = [*(key for key in named if key in columns), *(key for key in columns if key not in named)]
    shown, more = order[:MOST_COLUMNS], order[MOST_COLUMNS:]
    return ConfigDiff(tuple(KeyColumn(key, columns[key]) for key in shown), tuple(more))


def format_value(value: Any) -> str:
    """A value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parse_number(value: Any) -> float | None:
    """A number, also where it was typed."""
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _split(word: str) -> tuple[str, str]:
    key, _, value = word.lstrip("+~").partition("=")
    return key.replace("/", "."), value


def _says(words: Sequence[str], columns: Sequence[Sequence[Any]]) -> bool:
    """Whether who has the same word has the same values everywhere."""
    meanings: dict[str, str] = {}
    return all(
        meanings.setdefault(word, meaning) == meaning
        for word, *values in zip(words, *columns, strict=True)
        for meaning in ["\n".join(map(format_value, values))]
    )
