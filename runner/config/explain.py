"""From what validation found to one plain line: where, what was got, what was expected, the way out."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints


def suggest_word(word: str, words: list[str]) -> str:
    """`; did you mean …?` where a word is close to one of the known ones, else nothing."""
    near = difflib.get_close_matches(word, words, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', 64 at most",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "list_type": "a list",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
}


def explain_problems(problems: Sequence[Mapping[str, Any]], document: dict[str, Any], schema: type) -> str:
    """`where: what was got; what was expected; the way out`, for the first thing that pydantic found."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        places.setdefault(".".join(_locate(problem["loc"], document, schema)[0]), []).append(problem)
    where, found = next(iter(places.items()))
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    if len(found) > 1 and all(problem["input"] == found[0]["input"] for problem in found):  # none of several types
        return f"{where}: got {json.dumps(found[0]['input'])}; expected {' or '.join(map(_expected, found))}{more}"
    return _explain(found[0], document, schema) + more


def _expected(problem: Mapping[str, Any]) -> str:
    """What would have been right, in a few words."""
    context = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        return str(context["expected"]).replace("'", "")
    return _EXPECTED.get(problem["type"], problem["msg"]).format(**context)


def _explain(problem: Mapping[str, Any], document: dict[str, Any], schema: type) -> str:
    path, known = _locate(problem["loc"], document, schema)
    where, kind, context = ".".join(path), problem["type"], problem.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        near = suggest_word(path[-1], known)
        here = ".".join(path[:-1])
        return (
            f"{where}: unknown key{near}" if near else f"{where}: unknown key; {here or 'here'} has: {', '.join(known)}"
        )
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: a value is needed; say {where}=VALUE"
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{where}.{message}" if where else message
    if kind == "union_tag_not_found":
        return f"{where}: has no kind, which says what it is; write {where}={{kind: …}}, as the files in conf/ do"
    if kind in ("union_tag_invalid", "literal_error"):
        expected = [tag.strip("' ") for tag in str(context.get("expected_tags") or context.get("expected")).split(",")]
        expected = [word.strip("'") for part in expected for word in part.split(" or ")]
        got = context.get("tag", problem["input"])
        where = f"{where}.kind" if kind != "literal_error" else where
        return (
            f"{where}: got {json.dumps(got)}; expected one of {', '.join(expected)}{suggest_word(str(got), expected)}"
        )
    return f"{where}: got {json.dumps(problem['input'])}; expected {_expected(problem)}"


def _locate(location: tuple[int | str, ...], document: dict[str, Any], schema: type) -> tuple[list[str], list[str]]:
    """A finding's path as the user wrote it (without pydantic's union tags), and the keys that exist beside its end."""
    path: list[str] = []
    node, known, hints = document, _names(schema, document), get_type_hints(schema)
    for element in location:
        key = str(element)
        if isinstance(node, dict) and key == node.get("kind") and key not in node:
            continue  # the tag of a union, which pydantic puts between a key and what is below it
        if path and not isinstance(node, dict | list):
            break  # below a plain value pydantic only says which of several types it tried
        if key.isdecimal() and isinstance(node, list):
            path.append(key)
            continue
        path.append(key)
        annotation = hints.get(key, hints.get("*"))
        child = node.get(key) if isinstance(node, dict) else None
        if element == location[-1]:
            break
        node = child if child is not None else {}
        known, hints = _names(annotation, node), _hints(annotation, node)
    return path, known


def _hints(annotation: Any, node: Any) -> dict[str, Any]:
    """The annotations of the keys below a node; `*` stands for any key of a mapping."""
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if is_dataclass(option)]
        kind = node.get("kind") if isinstance(node, dict) else None
        chosen = [option for option in options if getattr(option, "kind", None) == kind] or options[:1]
        return _hints(chosen[0], node) if chosen else {}
    if is_dataclass(annotation):
        return get_type_hints(annotation)
    if get_origin(annotation) is not None and issubclass(get_origin(annotation), Mapping):
        return {"*": get_args(annotation)[1]}
    return {}


def _names(annotation: Any, node: Any) -> list[str]:
    """The keys that exist at a node: fields of an option, or what a mapping holds now."""
    if is_dataclass(annotation):
        return [f.name for f in fields(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [name for name, hint in _hints(annotation, node).items() if get_origin(hint) is not ClassVar]
    return list(node) if isinstance(node, dict) else []
