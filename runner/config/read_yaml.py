"""Read YAML that somebody else may have written: data only, and never more of it than a configuration can have.

YAML says much in little: an alias stands for all that its anchor has, and one of aliases of aliases for any number of
values; brackets in brackets fill a parser's stack, a number of ten thousand digits takes its time. So what a text would
become is counted while it is parsed, event by event, before any value is made.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from runner.text import shorten

# The largest configuration of ours has some 200 values in 8 levels, 5 kB.
MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 10_000
# Python itself refuses 4,300 digits, with an error that names a setting of its own; no option takes more than 19.
MAX_NUMBER_LENGTH = 400

# libyaml where it is there: it reads ten times as fast. Both make data only.
PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What a text may say that a value is. Sets, dates and bytes are nothing that an option takes.
PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))


class PlainLoader(PARSER):
    """YAML as Hydra reads it: a date is text, and no key is there twice."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in PARSER.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Return a mapping. Raises ConstructorError where a key is in it twice."""
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found duplicate key {key.value}", key.start_mark
                    )
                keys.add(key.value)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """Return what a text in YAML holds, as plain values. Raises ValueError, in one line, where it is none."""
    check_yaml(text)
    try:
        return yaml.load(text, Loader=PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(_describe_yaml_error(error)) from None
    # `!!int five` and `!!bool 7`, as PyYAML's constructors complain of them.
    except (ValueError, KeyError) as error:
        raise ValueError(f"a value is not what its tag says ({shorten(str(error), 80)})") from None


def read_bounded_text(path: Path) -> str:
    """Return the text of a file. Raises OSError, or ValueError where it is too long or is not written in UTF-8."""
    # A pipe or a device would be waited for, or never end.
    if path.exists() and not path.is_file():
        raise ValueError("is no file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES:,} bytes")
    return decode_text(content)


def decode_text(content: bytes) -> str:
    """Return bytes as text. Raises ValueError, in one line, where they are no UTF-8."""
    try:
        # Some editors begin a file with a byte order mark.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not written in UTF-8 (byte {error.start})") from None


def check_yaml(text: str) -> None:
    """Raise ValueError, in one line, where a text is no YAML, or would become more than a configuration can be."""
    # How many values each anchor stands for; aliases count as what they stand for.
    sizes: dict[str, int] = {}
    # Of every open list or mapping: its anchor, and how many values came before it.
    opened: list[tuple[str | None, int]] = []
    count = 0
    try:
        for event in yaml.parse(text, Loader=PARSER):
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, count))
                if len(opened) > MAX_DEPTH:
                    raise ValueError(f"{_place(event)}is nested deeper than {MAX_DEPTH} levels")
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                if anchor:
                    sizes[anchor] = count - before
            elif isinstance(event, yaml.ScalarEvent):
                _check_scalar(event)
                if event.anchor:
                    sizes[event.anchor] = 1
            if isinstance(event, yaml.AliasEvent):
                # One within its own anchor would be a value that contains itself.
                if event.anchor in (anchor for anchor, _ in opened):
                    raise ValueError(f"{_place(event)}*{event.anchor} stands for itself")
                count += sizes.get(event.anchor, 1)
            elif isinstance(event, yaml.NodeEvent):
                count += 1
                if event.tag not in (None, "!", *PLAIN_TAGS):
                    raise ValueError(f"{_place(event)}{shorten(event.tag, 80)} is no tag of plain data")
            if count > MAX_VALUES:
                raise ValueError(f"{_place(event)}becomes more than {MAX_VALUES:,} values")
    except yaml.YAMLError as error:
        raise ValueError(_describe_yaml_error(error)) from None


def _check_scalar(event: yaml.ScalarEvent) -> None:
    """Raise ValueError where a number has more digits than any option takes."""
    # Without quotes around it, as a number has none; hexadecimal ones too.
    is_plain = len(event.value) > MAX_NUMBER_LENGTH and event.implicit[0]
    if is_plain and re.fullmatch(r"[-+.]?[0-9][0-9a-fA-F_.:xo+-]*", event.value):
        raise ValueError(f"{_place(event)}has a number of {len(event.value):,} digits")


def _place(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}: "


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    """Return what is wrong with a text, and in which line."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    # Newer libyaml looks ahead, and gives up at a depth of its own.
    if "nesting depth" in str(problem):
        return f"{where}is nested deeper than {MAX_DEPTH} levels"
    return f"{where}{shorten(str(problem), 120)}; it cannot be read as YAML"
