"""Facts as a person reads them: aligned columns that fit the terminal, ages, sizes."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
GAP, NARROWEST = "  ", 12
WIDTH_WITHOUT_TERMINAL = 100


def format_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = (), flexible: Collection[str] = ()
) -> list[str]:
    """Rows under a head; columns in `right` are aligned there, those in `flexible` are shortened to fit the terminal.

    A column that has nothing to say is left out.
    """
    told = [index for index in range(len(head)) if any(row[index] for row in rows)]
    cells = [[line[index] for index in told] for line in (head, *rows)]
    names = [head[index] for index in told]
    widths = _fitted(
        [max(map(len, column)) for column in zip(*cells, strict=True)],
        [index for index, name in enumerate(names) if name in flexible],
        terminal_width() - len(GAP) * (len(told) - 1),
    )
    return [
        GAP.join(
            f"{shorten(cell, room):{'>' if name in right else '<'}{room}}"
            for cell, room, name in zip(line, widths, names, strict=True)
        ).rstrip()
        for line in cells
    ]


def terminal_width() -> int:
    """How many characters a line has: the terminal's, or a page's where there is none."""
    return shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 0)).columns


def wrap_labelled(label: str, text: str) -> list[str]:
    """A label and its text, which goes on below itself where it does not fit the terminal."""
    lines = textwrap.wrap(text, max(terminal_width() - len(label), 4 * NARROWEST), break_long_words=False) or [""]
    return [label + lines[0], *(" " * len(label) + line for line in lines[1:])]


def _fitted(widths: list[int], flexible: Sequence[int], budget: int) -> list[int]:
    """Take from the widest of the flexible columns, one by one, until all fit or none can give."""
    widths = list(widths)
    while flexible and sum(widths) > budget:
        widest = max(flexible, key=lambda index: widths[index])
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def shorten(text: str, room: int) -> str:
    """At most so many characters, with `…` for what is left out."""
    return text if len(text) <= room else text[: room - 1].rstrip() + "…"


def format_age(seconds: float) -> str:
    """`3m ago`: how long since, in the largest unit that fits; a clock that jumped is `now`."""
    for length, unit, limit in ((1, "s", 60), (60, "m", 60), (3600, "h", 48), (86400, "d", 1000000)):
        if seconds < length * limit:
            count = int(seconds // length)
            return f"{count}{unit} ago" if count > 0 else "now"
    return "long ago"


def format_time(unix_seconds: float) -> str:
    """A time of the clock: `2026-11-21 03:28:26 UTC`."""
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def format_metrics(metrics: Mapping[str, float]) -> str:
    """`eval/accuracy 0.98889, eval/loss 0.056982`."""
    return ", ".join(f"{name} {value:.5g}" for name, value in sorted(metrics.items()))


def format_count(count: int, noun: str) -> str:
    """`1 checkpoint`, `2 checkpoints`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(milliseconds: float) -> str:
    """`0.4 s`, `12.3 s`, `2m05s`, `3h07m`."""
    seconds = milliseconds / 1000
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def format_percent(part: float, whole: float) -> str:
    """`71.3 %`."""
    return f"{100 * part / whole if whole else 0.0:.1f} %"


def format_scaled(number: float) -> str:
    """1234567 → `1.23 M`."""
    power = 0
    while number >= 1000 and power + 1 < len(PREFIXES):
        number, power = number / 1000, power + 1
    return f"{number:.3g} {PREFIXES[power]}"


def display_path(path: Path) -> str:
    """A path as a person would type it from here."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def size_text(num_bytes: float) -> str:
    """`1.2 GB`, `830 MB`: a size for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 999.5:  # what rounds to 1000 belongs to the next unit
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def parsed_size(size: int | str) -> int:
    """20000000000, `20GB` or `500MiB` in bytes; 0 where it cannot be read."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?B?)", str(size))
    return int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0


def utc_now() -> str:
    """The time of day, for people and records: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
