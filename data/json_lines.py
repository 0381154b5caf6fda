"""Texts in JSON: a line each (`.jsonl`, `.ndjson`), or one list of objects; one field of them is the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from data.compressed import strip_ending
from data.option_fields import explain_missing_name

ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".json")
# What the field of the text is mostly called; taken where none is named.
USUAL_FIELD = "text"


def is_json_name(name: str) -> bool:
    """Tell whether a file of this name, perhaps compressed, holds JSON."""
    return PurePath(strip_ending(name)).suffix.lower() in ENDINGS


def read_json_texts(content: bytes, field: str | None, name: str) -> list[str]:
    """Return the text of each object, in order. Raises ValueError, which names file and line, where one has none."""
    chosen, texts = field, []
    for where, row in iter_json_values(content, name):
        if not isinstance(row, dict):
            raise ValueError(
                f"path={name}: {where} is {name_json_type(row)}; expected an object with a field for the text"
            )
        if chosen is None or chosen not in row:
            chosen = choose_field(row, field, f"{name}: {where}")
        if not isinstance(row[chosen], str):
            raise ValueError(
                f"path={name}: {where}: field {chosen} is {name_json_type(row[chosen])}; expected text; drop that "
                "line, or say data.field=NAME"
            )
        texts.append(row[chosen])
    return texts


def choose_field(row: dict[str, Any], field: str | None, where: str) -> str:
    """Return the field of the text: the named one, or the usual one. Raises ValueError where there is no such field."""
    if field is None:
        if USUAL_FIELD in row:
            return USUAL_FIELD
        known = ", ".join(row) or "none"
        raise ValueError(f"field: {where} has the fields {known}; which of them is the text? say data.field=NAME")
    if field not in row:
        raise ValueError(f"field={field} is no field of {where}{explain_missing_name(field, row)}")
    return field


def iter_json_values(content: bytes, name: str) -> Iterator[tuple[str, Any]]:
    """Yield each value of JSON lines, or of one list, with where it stands. Raises ValueError where it is no JSON."""
    # A byte order mark, as programs on Windows put it before UTF-8.
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip()[:1] == b"[":
        rows = _parse(content, f"path={name}: is no JSON")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", _parse(line, f"path={name}: line {number} is no JSON")


def _parse(text: bytes, problem: str) -> Any:
    try:
        return json.loads(text)
    # RecursionError: of brackets within brackets by the thousand.
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{problem} ({str(error).splitlines()[0]}); expected an object on each line, or one list of objects"
        ) from None


def name_json_type(value: Any) -> str:
    """Return what a value of JSON is, for an error message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
