"""Facts as a person reads them: tables and paragraphs that fit the terminal, durations, sizes, times, paths."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
GAP, NARROWEST = "  ", 12
WIDTH_WITHOUT_TERMINAL = 100
# What Hydra reads as a text without quotes, but for the words that it takes for a number, a truth value or nothing.
_PLAIN_WORD = re.compile(r"(\.{0,2}/)?[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS_WITH_MEANING = ("null", "true", "false", "nan", "inf")
# Times that are further ahead than this are not the difference of two clocks.
CLOCK_SLACK_SECONDS = 60.0
LONGEST_SECONDS = 100 * 365.25 * 86400
# A folder that is a copy of something elsewhere → the name of that, which is the one that people know.
_SHOWN_NAMES: dict[Path, str] = {}


def format_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    flexible: Collection[str] = (),
    ends: Collection[str] = (),
) -> list[str]:
    """Return the lines of a text table: the head, then a line for each row.

    A column without a value in any row is left out.

    Args:
        head: the name of each column.
        rows: the cells of each row, as many as there are names.
        right: the columns that are aligned to the right.
        flexible: the columns whose cells may be cut short, so that a line fits the terminal.
        ends: those of them of which the end tells more than the beginning.
    """
    columns = [index for index in range(len(head)) if any(row[index] for row in rows)]
    names = [head[index] for index in columns]
    lines = [[line[index] for index in columns] for line in (head, *rows)]
    widths = _fit_widths(
        [max(map(len, cells)) for cells in zip(*lines, strict=True)],
        [index for index, name in enumerate(names) if name in flexible],
        terminal_width() - len(GAP) * (len(columns) - 1),
    )
    table = []
    for line in lines:
        cells = []
        for cell, width, name in zip(line, widths, names, strict=True):
            fitted = keep_end(cell, width) if name in ends else shorten(cell, width)
            cells.append(fitted.rjust(width) if name in right else fitted.ljust(width))
        table.append(GAP.join(cells).rstrip())
    return table


def _fit_widths(widths: list[int], flexible: Sequence[int], budget: int) -> list[int]:
    """Take characters from the widest of the flexible columns, one by one, until all fit or none can give more."""
    widths = list(widths)
    while flexible and sum(widths) > budget:
        widest = max(flexible, key=lambda index: widths[index])
        # Narrower cells would tell nothing: the line is rather too long for the terminal.
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def terminal_width() -> int:
    """Return how many characters a line of the terminal has, or `WIDTH_WITHOUT_TERMINAL` where there is none."""
    return shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 0)).columns


def wrap_labelled(label: str, text: str) -> list[str]:
    """Break a text into lines that fit the terminal: the first follows the label, the others stand below the first."""
    lines = textwrap.wrap(text, max(terminal_width() - len(label), 4 * NARROWEST), break_long_words=False) or [""]
    return [label + lines[0], *(" " * len(label) + line for line in lines[1:])]


def shorten(text: str, length: int) -> str:
    """Cut a text to at most `length` characters; the last is `…` where something was cut off."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def keep_end(text: str, length: int) -> str:
    """Cut a text to at most `length` characters; the first is `…` where something was cut off."""
    return text if len(text) <= length else "…" + text[1 - length :].lstrip()


def format_age(seconds: float) -> str:
    """Return how long ago something was in one unit, `3m ago`; `now` below a second, or after a clock jumped back."""
    # A clock that is set right again leaves times that are yet to come; those of two machines differ by less.
    if seconds < -CLOCK_SLACK_SECONDS:
        return "in the future"
    # Two days are still told in hours: `30h ago` says more than `1d ago`.
    for length, unit, limit in ((1, "s", 60), (60, "m", 60), (3600, "h", 48), (86400, "d", 1000000)):
        if seconds < length * limit:
            count = int(seconds // length)
            return f"{count}{unit} ago" if count > 0 else "now"
    return "long ago"


def format_duration(seconds: float) -> str:
    """Return a length of time in three digits or so: `0.4 s`, `12.3 s`, `2m05s`, `3h07m`.

    Less than nothing is `0.0 s`, what is no number `?`, and more than a hundred years `forever`.
    """
    # From here on the text would round to `60.0 s`.
    if seconds < 59.95:
        return f"{max(seconds, 0.0):.1f} s"
    if seconds > LONGEST_SECONDS:
        return "forever"
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def format_time(unix_seconds: float) -> str:
    """Return a time of the clock: `2026-11-21 03:28:26 UTC`; `no time` for a number that stands for none."""
    # A year that the calendar does not have, or no number at all.
    try:
        return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "no time"


def utc_now() -> str:
    """Return the time of day as ISO 8601 in UTC, to the second: `2026-11-21T03:28:26+00:00`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Return metrics in the order of their names: `eval/accuracy 0.98889, eval/loss 0.056982`."""
    return ", ".join(f"{name} {value:.5g}" for name, value in sorted(metrics.items()))


def format_count(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural where there is not one: `1 checkpoint`, `2 checkpoints`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_percent(part: float, whole: float) -> str:
    """Return a part of a whole in percent, `71.3 %`; nothing of nothing is `0.0 %`."""
    return f"{100 * part / whole if whole else 0.0:.1f} %"


def format_scaled(number: float) -> str:
    """Return a number with the prefix of a unit that is to follow: `1.23 M` for 1234567, `42 ` for 42."""
    power = 0
    while number >= 1000 and power + 1 < len(PREFIXES):
        number, power = number / 1000, power + 1
    return f"{number:.3g} {PREFIXES[power]}"


def show_folder_as(folder: Path, name: str) -> None:
    """Take note that a folder is a copy of something elsewhere: from now on `display_path` says that name."""
    _SHOWN_NAMES[Path(os.path.realpath(folder))] = name


def display_path(path: Path) -> str:
    """Return a path as a person types it: relative where it is below the working directory, else absolute.

    What lies in a folder that is a copy has the name of what it is a copy of (`show_folder_as`).
    """
    # Not `Path.resolve`, which raises where links go around in a circle.
    path = Path(os.path.realpath(path))
    for folder in (path, *path.parents) if _SHOWN_NAMES else ():
        if (name := _SHOWN_NAMES.get(folder)) is not None:
            return "/".join([name, *path.relative_to(folder).parts])
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def format_override(key: str, value: object) -> str:
    """Return `key=value` as one word that Hydra reads back as this value. A value that is no text is written as it is.

    Only `???` alone cannot be said: it stands for a value that is missing, however it is quoted. See
    https://hydra.cc/docs/advanced/override_grammar/basic/#quoted-values
    """
    text = str(value)
    if not isinstance(value, str) or (_PLAIN_WORD.fullmatch(text) and text.lower() not in _WORDS_WITH_MEANING):
        return f"{key}={text}"
    # `${…}` is a reference to another key; a backslash before it makes it a text, as does one more before each.
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    # Within quotes a backslash stands for itself, but for those before a quote and at the end.
    text = re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"{key}='{text}'"


def quote_override(key: str, value: object) -> str:
    """Return `key=value` as it is typed into a shell: quoted for Hydra where it needs that, and then for the shell."""
    return quote_words([format_override(key, value)])


def format_size(num_bytes: float) -> str:
    """Return a size for people, with three digits in powers of 1000: `1.2 GB`, `830 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        # Below 999.5, because what rounds to 1000 belongs to the next unit.
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def parse_size(size: int | str) -> int:
    """Return the bytes that `20000000000`, `20GB`, `1.5 TB` or `500MiB` stand for; 0 where it cannot be read."""
    # Imported here: a supervisor and a watching script read no size, and start sooner without pydantic.
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return TypeAdapter(ByteSize).validate_python(size)
    except ValidationError:
        return 0


def mask_unprintable(text: str) -> str:
    """Return a text with a dot for each character that is not printable: what comes from a disk commands no terminal.

    So a line stays one line.
    """
    return "".join(char if char.isprintable() else "·" for char in text)


def mask_lines(text: str) -> str:
    """Return a text of several lines with a dot for each character that is not printable.

    Bytes that are no text stay as Python has them: whoever prints or writes them has an escape for them.
    """
    keeps = (char if char.isprintable() or char == "\n" or "\udc80" <= char <= "\udcff" else "·" for char in text)
    return "".join(keeps)


def escape_markdown(text: str) -> str:
    """Return a text as Markdown that shows it, in one line, also in a cell of a table: no link, no HTML, no code."""
    # Only what would be taken for markup within a line: a page is also read as it is.
    return re.sub(r"[\\`*\[\]<>|]", r"\\\g<0>", mask_unprintable(text))


def format_code_span(text: str) -> str:
    """Return a text as a span of code in Markdown, in one line, whatever backticks are in it."""
    shown = mask_unprintable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    # A backtick at an end would belong to the fence; of an empty text the two halves of the fence would be one.
    space = " " if not shown or "`" in (shown[0], shown[-1]) else ""
    return f"{fence}{space}{shown}{space}{fence}"


def quote_words(words: Sequence[str]) -> str:
    """Return words as they are typed into a shell, in one line: one that cannot be printed as `$'…'`, with escapes."""
    return " ".join(shlex.quote(word) if word.isprintable() else _quote_unprintable(word) for word in words)


def _quote_unprintable(word: str) -> str:
    return "$'" + "".join(map(_escape_char, word)) + "'"


def _escape_char(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    if char.isprintable():
        return char
    # A byte that is no text, as Python keeps it in a word of the command line.
    number = ord(char) - 0xDC00 if "\udc80" <= char <= "\udcff" else ord(char)
    return f"\\x{number:02x}" if number < 0x100 and (number < 0x80 or number != ord(char)) else f"\\U{number:08x}"
