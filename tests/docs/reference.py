"""The page docs/reference.md, made from the option dataclasses, the files of conf/ and the parsers of the verbs.

    python -m tests.docs.reference            print the page
    python -m tests.docs.reference --write    write it to docs/reference.md

What a field means is taken from the section "Attributes:" in the docstring of its dataclass or of a base of it. Where
these say nothing, it means what the first other option of its union says that has a field of this name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen
from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from runner.__main__ import VERBS, VerbParser
from runner.config.identity import classify_key, select_result_keys
from runner.config.schema import Config
from runner.launch.local_sweep import LocalOptions
from runner.launch.slurm_job import SlurmOptions
from runner.launch.study import SearchOptions
from tests.conftest import REPO

PAGE = REPO / "docs/reference.md"
CONF = REPO / "conf"

BAR, NO_BREAK = "\\|", "\u00a0"  # in a cell of a table

HEAD = """# Reference

Every option there is. This page is generated from the code and from `conf/`: `python -m tests.docs.reference --write`.

`GROUP=OPTION` chooses a file of that folder of `conf/`, which sets some keys; `KEY=VALUE` sets a single one, as in
`optim.lr=1e-3`. `python run.py --help` lists the groups, and `python run.py GROUP=OPTION --cfg job` prints what a command
would run with. A `conf/` of your own where you type the command comes before ours: a file there adds an option, or
replaces one of the same name.

The column **continued** says what happens if you change a key and go on with a run by `dir=RUN`:

| | what happens |
|---|---|
| free | it may change; the change is written down |
| resumable | it may change, and you are told, because the numbers that come will differ |
| identity | it makes another run, and continuing is refused |

Keys that are marked with · do not count at all: a run with another value is still the same run, in the same directory.
"""


# --- what there is ---


@dataclass(frozen=True)
class Choice:
    """A file of conf/: `GROUP=NAME`, with the line that says when to choose it, and what it sets by itself."""

    group: str
    name: str

    @cached_property
    def text(self) -> str:
        """What is in the file."""
        return (CONF / self.group / f"{self.name}.yaml").read_text()

    @property
    def when(self) -> str:
        """The comment at the top, without the commands in it."""
        head = itertools.takewhile(lambda line: line.startswith("# "), self.text.splitlines())
        return " ".join(line[2:] for line in head if not line.startswith(("# @", "# python ")))

    @cached_property
    def sets(self) -> Mapping[str, Any]:
        """What the file sets, without what its own defaults set."""
        return {key: value for key, value in yaml.safe_load(self.text).items() if key != "defaults"}

    @cached_property
    def composed(self) -> Mapping[str, Any]:
        """What the choice sets, its defaults included; what refers to another key is left as it is written."""
        # Not with Hydra, which takes a hundred times as long: in these files `_self_` comes last or is left out.
        others = [name for name in yaml.safe_load(self.text).get("defaults", []) if name != "_self_"]
        merged = OmegaConf.merge(*(OmegaConf.create(Choice(self.group, name).composed) for name in others), self.sets)
        return OmegaConf.to_container(merged)


def list_choices(group: str) -> list[Choice]:
    """Return the options of a group in alphabetical order."""
    return [Choice(group, path.stem) for path in sorted((CONF / group).glob("*.yaml"))]


def is_option(hint: Any) -> bool:
    """Return whether a type is a dataclass. (The limits in annotations are objects of dataclasses.)"""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


# --- types, values and meanings, in words ---


def describe_type(hint: Any) -> str:
    """Return a type as a person would say it: `int ≥ 1`, `gelu` or `swiglu`, `float` or `null`."""
    return join_words(list_types(hint))


def list_types(hint: Any) -> list[str]:
    """Return what a value may be, each in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return [describe_range(arguments[0], arguments[1:])]
    if origin is Literal:
        return [f"`{show_value(value)}`" for value in arguments]
    if origin in (Union, types.UnionType):
        return [word for one in arguments for word in list_types(one)]
    if origin in (tuple, list):
        return [f"list of {describe_type(arguments[0])}"]
    if is_option(hint) or (origin is not None and issubclass(origin, Mapping)):
        return ["`{…}`"]
    if hint is bool:
        return ["`true`", "`false`"]
    return [{str: "text", type(None): "`null`", Any: "any"}.get(hint) or f"`{hint.__name__}`"]


def describe_range(hint: Any, limits: tuple[Any, ...]) -> str:
    """Return a type with the limits it has: `int ≥ 1`, `0 < float ≤ 1`."""
    low, high, others = "", "", ""
    for limit in limits:
        match limit:
            case Ge(ge=value) | Interval(ge=value) if value is not None:
                low = f"{value:g} ≤"
            case Gt(gt=value) | Interval(gt=value) if value is not None:
                low = f"{value:g} <"
        match limit:
            case Le(le=value) | Interval(le=value) if value is not None:
                high = f" ≤ {value:g}"
            case Lt(lt=value) | Interval(lt=value) if value is not None:
                high = f" < {value:g}"
            case MinLen():
                others = ", not empty"
            case FieldInfo() if limit.metadata:
                others = f" like `{limit.metadata[0].pattern}`"
    name = describe_type(hint)
    if low and high:
        name = f"`{low} {name.strip('`')}{high}`"
    elif low:
        number, sign = low.split()
        name = f"`{name.strip('`')} {'≥' if sign == '≤' else '>'} {number}`"
    # In a narrow column it stays in one line.
    return f"{name.replace(' ', NO_BREAK)}{others}"


def join_words(words: list[str]) -> str:
    """Return `a`, `a or b`, `a, b or c`, each once."""
    words = list(dict.fromkeys(words))
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def show_value(value: Any) -> str:
    """Return a value as YAML has it in one line."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", f"{value:g}")
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("\n...").strip()


def split_docstring(option: Any) -> tuple[list[str], dict[str, str]]:
    """Split a docstring into its paragraphs, and what its section "Attributes:" says about each field."""
    text, _, listed = inspect.cleandoc(option.__doc__).partition("\n\nAttributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", listed, re.MULTILINE)
    return text.split("\n\n"), {name: " ".join(meaning.split()) for name, meaning in entries}


def find_meaning(name: str, option: Any, union: Sequence[Any] = ()) -> str:
    """Return what a dataclass, a base of it, or else another of its union says about a field."""
    for one in (*option.__mro__, *union):
        if is_option(one) and name in (about := split_docstring(one)[1]):
            return about[name] if ". " in about[name] else about[name].rstrip(".")
    return ""


# --- tables ---


@dataclass(frozen=True)
class Row:
    """One key: what may be set, what it is without that, and what changing it means for a run that goes on."""

    key: str
    type: str
    default: str
    continued: str
    meaning: str

    def __str__(self) -> str:
        continued = f" {self.continued} |" if self.continued else ""
        return f"| `{self.key}` | {self.type} | {self.default} |{continued} {self.meaning.replace('|', BAR)} |"


def list_rows(option: Any, prefix: str, *, sets: Mapping[str, Any], union: Sequence[Any] = ()) -> Iterator[Row]:
    """Yield a row for each field of a dataclass of options, and for those of a dataclass in a field.

    `sets` is what the file of the choice sets; `union` has the other options that may stand in its place.
    """
    hints = get_type_hints(option, include_extras=True)
    for each in fields(option):
        if each.name == "kind":
            continue
        key, hint = f"{prefix}.{each.name}".lstrip("."), hints[each.name]
        inner = next((one for one in (hint, *get_args(hint)) if is_option(one)), None)
        default = sets[each.name] if each.name in sets else default_of(each)
        if inner is not None and (default is None or inner is not hint):
            yield Row(key, describe_type(hint), show_default(default), continued(key), first_sentence(inner))
        if inner is not None:
            yield from list_rows(inner, key, sets=default if isinstance(default, Mapping) else {})
            continue
        meaning = find_meaning(each.name, option, union)
        yield Row(key, describe_type(hint), show_default(default), continued(key), meaning)


def default_of(each: Any) -> Any:
    """Return the default of a field of a dataclass; MISSING where it has none."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def show_default(value: Any) -> str:
    """Return a default in code; a value that must be given is said to be needed."""
    if value is MISSING or value == "???":
        return "needed"
    if dataclasses.is_dataclass(value) or (isinstance(value, Mapping) and value):
        return "`{…}`"
    return f"`{show_value(value)}`"


def continued(key: str) -> str:
    """Return the class of a key, marked where it does not count at all; nothing for one that is not a run's."""
    if key.startswith("hydra."):
        return ""
    *path, leaf = key.split(".")
    document: Any = {leaf: 0}
    for part in reversed(path):
        document = {part: document}
    return classify_key(key) if select_result_keys(document) else f"{classify_key(key)} ·"


def first_sentence(option: Any) -> str:
    """Return the first sentence of a docstring."""
    return re.split(r"(?<=[.!?])\s", " ".join(option.__doc__.split()))[0]


def format_table(head: Sequence[str], lines: Sequence[str]) -> str:
    """Return a table of Markdown with lines that are ready; nothing where there are none."""
    rule = "|".join("---" for _ in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *lines]) if lines else ""


def format_rows(rows: Sequence[Row], owners: Sequence[str] = ()) -> str:
    """Return the table of some keys; `owners` says which kinds have each, where these are several."""
    head = ["key", "type", "default", *(["continued"] if any(row.continued for row in rows) else []), "meaning"]
    if not owners:
        return format_table(head, [str(row) for row in rows])
    return format_table(
        ["key", "of", *head[1:]],
        [str(row).replace(" | ", f" | {of} | ", 1) for row, of in zip(rows, owners, strict=True)],
    )


# --- sections ---


def kinds_of(option: Any) -> list[str]:
    """Return the names that YAML has for a dataclass of a union."""
    return list(get_args(get_type_hints(option)["kind"]))


def options_in(hint: Any) -> list[Any]:
    """Return the dataclasses of a union that `kind` tells apart, in their order; none for any other type."""
    union = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return [one for one in get_args(union) if is_option(one) and any(each.name == "kind" for each in fields(one))]


def describe_choices(group: str, rules: str = "") -> str:
    """Return the table of the options of a group; `rules` is the key whose named rules they set, if there is one."""
    choices = list_choices(group)
    if not rules:
        return format_table(["option", "when to choose it"], [f"| `{one.name}` | {one.when} |" for one in choices])
    lines = []
    for one in choices:
        found = one.composed if rules == group else one.composed.get(rules.partition(".")[2], {})
        named = ", ".join(f"`{name}`: {rule['kind']}" for name, rule in found.items())
        lines.append(f"| `{one.name}` | {one.when} | {named} |")
    return format_table(["option", "when to choose it", "what it sets, and of which kind"], lines)


def describe_kinds(prefix: str, options: Sequence[Any], group: str = "") -> Iterator[str]:
    """Yield a section for each dataclass of a union, after a table of what at least half have from a base of theirs.

    With `group`, a file of conf/ chooses the kind: what that file sets is the default.
    """
    tables: dict[Any, list[Row]] = {}
    holders: dict[Row, list[Any]] = {}
    for option in options:
        choice = Choice(group, kinds_of(option)[0])
        there = bool(group) and (CONF / group / f"{choice.name}.yaml").exists()
        sets = choice.composed if there else {}
        tables[option] = list(list_rows(option, prefix, sets=sets, union=options))
        for row in tables[option]:
            if row.key.removeprefix(f"{prefix}.").partition(".")[0] not in option.__annotations__:
                holders.setdefault(row, []).append(option)
    inheriting = Counter(row.key for row, have in holders.items() for _ in have)
    shared = {row: have for row, have in holders.items() if len(have) > 1 and 2 * inheriting[row.key] >= len(options)}
    if shared:
        names = {row: "all" if len(have) == len(options) else of_kinds(have) for row, have in shared.items()}
        yield format_rows(list(shared), list(names.values()))
    for option in options:
        kinds = kinds_of(option)
        title = f"`{group}={kinds[0]}`" if group else f"`{prefix.removesuffix('.NAME')}` of kind `{kinds[0]}`"
        yield f"### {title}" + "".join(f", `{kind}`" for kind in kinds[1:])
        yield from (escape(paragraph) for paragraph in split_docstring(option)[0])
        yield describe_class(option)
        yield format_rows([row for row in tables[option] if option not in shared.get(row, ())])
        for other in list_choices(group) if group else ():
            if other.name not in kinds and other.composed.get("kind") in kinds:
                values = [f"`{key}: {show_value(value)}`" for key, value in other.sets.items()]
                yield f"`{group}={other.name}` sets {', '.join(values)}."


def of_kinds(options: Sequence[Any]) -> str:
    """Return the names of some kinds."""
    return ", ".join(f"`{kind}`" for option in options for kind in kinds_of(option))


def describe_class(option: Any) -> str:
    """Return what a model or data says of itself: what goes in or out, what `remat` may name, what it can show."""
    said = []
    for name, text in (
        ("takes", "Takes {}."),
        ("gives", "Gives {}."),
        ("scopes", "`remat` may recompute {}"),
        ("tags", "and store {}."),
        ("shows", "`eval` has {} for it."),
    ):
        value = vars(option).get(name, ())
        words = [value] if isinstance(value, str) and name not in option.__dataclass_fields__ else value
        if words and not isinstance(words, str):
            said.append(text.format(", ".join(f"`{word}`" for word in words)) if words != [""] else "")
    return " ".join(filter(None, said))


def escape(paragraph: str) -> str:
    """Return a paragraph of a docstring as Markdown; an indented one is code."""
    return paragraph if paragraph.startswith("    ") else paragraph.replace("<", "&lt;")


def describe_verb(verb: str) -> Iterator[str]:
    """Yield what a verb does, how it is typed, and what its arguments mean."""
    module, what = VERBS[verb]
    parser = VerbParser(add_help=False)
    importlib.import_module(f"runner.{module}").add_arguments(parser)
    yield f"### `{verb}`"
    yield f"{what[0].upper()}{what[1:]}."
    # Not argparse's own text, which is another one in another version of Python.
    usage, lines = [], []
    for action in parser._actions:
        name = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
        if action.choices:
            name = f"{{{','.join(action.choices)}}}"
        word = " ".join([*action.option_strings[-1:], *([] if action.option_strings and action.nargs == 0 else [name])])
        several = {"*": f"[{word} …]", "+": f"{word} …", "?": f"[{word}]"}.get(action.nargs, word)
        usage.append(f"[{word}]" if action.option_strings and not action.required else several)
        says = (action.help or "") % vars(action)
        if action.default and show_value(action.default) not in says:
            says += f" (`{action.default}` if left out)"
        lines.append(f"| `{word}` | {says} |")
    yield f"```text\n{' '.join(['python -m runner', verb, *usage])}\n```"
    yield format_table(["argument", "meaning"], lines)


def describe_config() -> Iterator[str]:
    """Yield the sections about everything that a run's configuration holds, group after group."""
    hints = get_type_hints(Config, include_extras=True)
    whole = yaml.safe_load((CONF / "config.yaml").read_text())
    groups = {name: option for entry in whole["defaults"] if isinstance(entry, dict) for name, option in entry.items()}
    yield "## The run itself"
    rows = []
    for row in list_rows(Config, "", sets={**whole, **dict.fromkeys(groups, None)}):
        if row.key.partition(".")[0] not in groups:
            rows.append(row)
    yield format_rows(rows)
    for group, option in groups.items():
        if group in hints:
            yield f"## `{group}`"
            yield from describe_group(group, option, hints[group])
    yield "## `experiment`"
    yield "An experiment sets keys of several groups at once. Its file says what to expect of it."
    lines = [f"| `{one.name}` | {one.when} |" for one in list_choices("experiment")]
    yield format_table(["experiment", "what it is, and what to expect"], lines)


def describe_group(group: str, default: str, hint: Any) -> Iterator[str]:
    """Yield the sections of one group of choices."""
    several = f" Several may be chosen: `{group}=[A,B]`." if group in ("eval", "preempt", "retention") else ""
    yield f"`{group}=OPTION`; `{default}` if left out.{several}"
    if kinds := options_in(hint):
        yield describe_choices(group)
        yield from describe_kinds(group, kinds, group)
    elif is_option(hint):
        inner = get_type_hints(hint, include_extras=True)
        rules = {
            name: found for name in inner if get_args(inner[name]) and (found := options_in(get_args(inner[name])[-1]))
        }
        yield describe_choices(group, rules=next((f"{group}.{name}" for name in rules), ""))
        yield from split_docstring(hint)[0]
        choice = Choice(group, default)
        yield format_rows(list(list_rows(hint, group, sets=choice.composed)))
        for name, found in rules.items():
            yield from describe_kinds(f"{group}.{name}.NAME", found)
    else:
        yield describe_choices(group, rules=group)
        yield from describe_kinds(f"{group}.NAME", options_in(get_args(hint)[-1]))


def describe_launchers() -> Iterator[str]:
    """Yield the sections about how runs are started: keys that are no part of a run."""
    yield "## `hydra/launcher` and `hydra/sweeper`"
    yield (
        "How runs are started: no part of what a run is. With `-m`, and with the extra `submitit`, there are "
        "`submitit_local` and `submitit_slurm` as well; with the extra `search`, `hydra/sweeper=optuna`."
    )
    yield describe_choices("hydra/launcher")
    for title, prefix, option in (
        ("hydra/launcher=local", "hydra.launcher", LocalOptions),
        ("hydra/launcher=slurm", "hydra.launcher", SlurmOptions),
        ("hydra/sweeper=optuna", "hydra.sweeper", SearchOptions),
    ):
        yield f"### `{title}`"
        yield from split_docstring(option)[0]
        yield format_rows(list(list_rows(option, prefix, sets={})))


def describe_verbs() -> Iterator[str]:
    """Yield the sections about what is done with runs afterwards."""
    yield "## Verbs"
    yield (
        "`python -m runner VERB …`, or `holdfast VERB …`. `RUN` is `outputs/NAME/RUN`; a checkpoint is `RUN@STEP`, "
        "`RUN@best` or `RUN@newest` (the same as `RUN`). Each verb takes `--json`, which prints one JSON document instead."
    )
    for verb in VERBS:
        yield from describe_verb(verb)


def render_page() -> str:
    """Return the page."""
    return (
        "\n\n".join(filter(None, (HEAD.rstrip(), *describe_config(), *describe_launchers(), *describe_verbs()))) + "\n"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(render_page())
    else:
        print(render_page(), end="")
