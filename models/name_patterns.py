"""Choose parameters and layers by patterns over their names, as `head`, `attention.qkv`, `blocks.11.*` or `ffn_*`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

Patterns = tuple[str, ...]
# So many are listed in a message.
MOST_NAMES = 12


def match_pattern(pattern: str, name: str) -> bool:
    """Return whether a pattern names a whole part of a dotted name: `qkv` and `attention.q*` are in `attention.qkv`.

    `*` stands for any characters, also for dots, `?` for one and `[ab]` for one of several.
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def find_unused(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    """Return the first pattern that names nothing; None where each of them does."""
    known = list(names)
    return next((pattern for pattern in patterns if not any(match_pattern(pattern, name) for name in known)), None)


def suggest_names(pattern: str, names: Iterable[str]) -> str:
    """Return `; did you mean …?` where a part of some name is close to a pattern, else ` (it has: …)`."""
    parts = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdecimal()))
    words = [word for word in pattern.split(".") if word.strip("*?") and word not in parts]
    for word in words:
        if near := difflib.get_close_matches(word, parts, 1, 0.6):
            return f"; did you mean {pattern.replace(word, near[0])}?"
    return f" (it has: {list_some(parts)})"


def list_some(names: Iterable[str]) -> str:
    """Return names in a line that stays readable: the first of them, and how many there are beside."""
    known = list(names)
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return f"{', '.join(known[:MOST_NAMES])}{more}"
