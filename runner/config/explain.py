"""Turn what validation found into one plain line: where, what was got, what was expected, the way out."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

# What would have been right, by pydantic's type of error; in braces are values of the error's `ctx`.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a number that ends",
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
# Keys of other programs' configurations, and what says the same here.
_FOREIGN_KEYS = {
    "optimized_metric": "say score.metric=eval/accuracy score.mode=max",
    "task_name": "say name=NAME",
    "experiment_name": "say name=NAME",
    "ckpt_path": "the same command goes on by itself; init_from=RUN begins with the weights of another run",
    "resume_from_checkpoint": "the same command goes on by itself; dir=RUN goes on with a run that you name",
    "output_dir": "say root=FOLDER",
    "trainer": "its keys are train.*, mesh.*, optim.* and ckpt.* here",
    "callbacks": "what they do is said by ckpt.*, retention.*, stop.* and log.* here",
    "logger": "say log=wandb, or log.*",
    "tags": "leave it out",
    "datamodule": "say data=KIND data.*",
    "optimizer": "say optim=KIND optim.*",
    "scheduler": "say schedule=KIND schedule.*",
    "lr": "say optim.lr",
    "batch_size": "say data.batch_size",
    "epochs": "say train.epochs",
    "max_epochs": "say train.epochs",
    "max_steps": "say train.steps",
    "patience": "say stop.metric=eval/loss stop.patience=N",
    "early_stopping": "say stop.metric=eval/loss stop.patience=N",
}
# What stands in the place of a part and is chosen by another one: of what a program of the user's own does by itself.
_NOT_CHOSEN = ("program",)
_UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")
_MISSING_KEY = ("missing", "missing_argument", "missing_keyword_only_argument")
# What holds parts by names of the user's own.
_OF_PARTS = ("eval", "ckpt.save", "retention", "stop.rules", "log.sinks")
# A piece of the user's own code, as `my_file:name`.
_TARGET = re.compile(r"[\w./~-]+:[\w.]+")
_WRONG_CHOICE = ("union_tag_invalid", "literal_error")


def suggest_word(word: str, words: list[str]) -> str:
    """Return `; did you mean …?` where one of the known words is close to `word`, else nothing."""
    near = difflib.get_close_matches(word, words, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def explain_problems(problems: Sequence[Mapping[str, Any]], document: dict[str, Any], schema: type) -> str:
    """Return `where: what was got; what was expected; the way out` for the first of pydantic's errors.

    `problems` are `ValidationError.errors()`, `document` is what was validated and `schema` the dataclass it was
    validated against.
    """
    places: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        path, _ = _locate(problem["loc"], document, schema)
        places.setdefault(".".join(path), []).append(problem)
    where, found = next(iter(places.items()))
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    # Several errors about one value: it is none of several types, and pydantic tells of each that it tried.
    if len(found) > 1 and all(problem["input"] == found[0]["input"] for problem in found):
        expected = " or ".join(_describe_expected(problem) for problem in found)
        return f"{where}: got {json.dumps(found[0]['input'])}; expected {expected}{more}"
    return _explain_problem(found[0], document, schema) + more


def _describe_expected(problem: Mapping[str, Any]) -> str:
    """Return in a few words what would have been right."""
    context = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        return str(context["expected"]).replace("'", "")
    return _EXPECTED.get(problem["type"], problem["msg"]).format(**context)


def _explain_problem(problem: Mapping[str, Any], document: dict[str, Any], schema: type) -> str:
    path, known = _locate(problem["loc"], document, schema)
    where, kind = ".".join(path), problem["type"]
    # As pydantic marks that a key is wrong, and not its value. Of those that are free, an evaluation alone has a form.
    if path[-1:] == ["[key]"]:
        name = json.dumps(problem["input"])
        return f"{path[0]}: got the name {name}; expected small letters, digits and '_', a letter first, 32 at most"
    if kind in _UNKNOWN_KEY:
        if (len(path) == 1 or path[0] == "train") and path[-1] in _FOREIGN_KEYS:
            return f"{where}: unknown key; {_FOREIGN_KEYS[path[-1]]}"
        if near := suggest_word(path[-1], known):
            return f"{where}: unknown key{near}"
        return f"{where}: unknown key; {'.'.join(path[:-1]) or 'here'} has: {', '.join(known)}"
    if kind in _MISSING_KEY:
        return f"{where}: a value is needed; say {where}=VALUE"
    if kind == "value_error":
        # Raised by the option itself, whose message begins with the field it is about.
        message = problem["msg"].removeprefix("Value error, ")
        return f"{where}.{message}" if where else message
    if kind == "union_tag_not_found":
        return f"{where}: has no kind, which says what it is; write {where}={{kind: …}}, as the files in conf/ do"
    if kind in _WRONG_CHOICE:
        return _explain_choice(problem, where)
    got = json.dumps(problem["input"])
    if where.rpartition(".")[0] in _OF_PARTS and _TARGET.fullmatch(str(problem["input"])):
        return f"{where}: got {got}; write '{where}={{kind: external, target: {problem['input']}}}'"
    return f"{where}: got {got}; expected {_describe_expected(problem)}"


def _explain_choice(problem: Mapping[str, Any], where: str) -> str:
    """Explain a value that is none of those there are: the `kind` of a part, or of a field with a few choices."""
    context = problem.get("ctx", {})
    # pydantic has them as text only: `'a', 'b'` for kinds, `'a', 'b' or 'c'` for a field.
    listed = str(context.get("expected_tags") or context.get("expected")).replace(" or ", ", ")
    named = (choice.strip("' ") for choice in listed.split(","))
    choices = [choice for choice in named if choice not in _NOT_CHOSEN]
    got = context.get("tag", problem["input"])
    where = where if problem["type"] == "literal_error" else f"{where}.kind"
    return f"{where}: got {json.dumps(got)}; expected one of {', '.join(choices)}{suggest_word(str(got), choices)}"


def _locate(location: tuple[int | str, ...], document: dict[str, Any], schema: type) -> tuple[list[str], list[str]]:
    """Return the path of an error as the user wrote it, and the keys that exist beside the last one."""
    path: list[str] = []
    node, known, hints = document, _list_keys(schema, document), get_type_hints(schema)
    for element in location:
        key = str(element)
        # The tag of a union, which pydantic puts between a key and what is below it; nobody has written it there.
        if isinstance(node, dict) and key == node.get("kind") and key not in node:
            continue
        # Below a plain value pydantic only says which of several types it tried.
        if path and not isinstance(node, dict | list):
            break
        path.append(key)
        if key.isdecimal() and isinstance(node, list):
            continue
        annotation = hints.get(key, hints.get("*"))
        child = node.get(key) if isinstance(node, dict) else None
        if element == location[-1]:
            break
        node = child if child is not None else {}
        known, hints = _list_keys(annotation, node), _find_hints(annotation, node)
    return path, known


def _find_hints(annotation: Any, node: Any) -> dict[str, Any]:
    """Return the annotations of the keys below a node; `*` stands for any key of a mapping."""
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if is_dataclass(option)]
        kind = node.get("kind") if isinstance(node, dict) else None
        chosen = [option for option in options if getattr(option, "kind", None) == kind] or options[:1]
        return _find_hints(chosen[0], node) if chosen else {}
    if is_dataclass(annotation):
        return get_type_hints(annotation)
    if get_origin(annotation) is not None and issubclass(get_origin(annotation), Mapping):
        return {"*": get_args(annotation)[1]}
    return {}


def _list_keys(annotation: Any, node: Any) -> list[str]:
    """Return the keys that exist at a node: the fields of an option, or what a mapping holds now."""
    if is_dataclass(annotation):
        return [field.name for field in fields(annotation)]
    if get_origin(annotation) in (Union, types.UnionType):
        hints = _find_hints(annotation, node)
        return [name for name, hint in hints.items() if get_origin(hint) is not ClassVar]
    return list(node) if isinstance(node, dict) else []
