"""A user's own model, data and objective: found before jax starts, imported when it is built; or a line says why not.

A module is looked for where the command is typed, and then where Python looks. Whether it may be imported at all is
decided in trust.py, before.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import data
import models
from runner.config.explain import suggest_word
from runner.errors import ConfigError, RefusedError
from runner.text import display_path

if TYPE_CHECKING:
    from data.sources import Source
    from runner.config.schema import Config

TRUST_FLAG = "--trust"

NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
# part → what its target is called with, before the options; rngs by name, as flax modules take it
CALLS = {"model": (("inputs", "num_outputs"), ("rngs",)), "data": ((), ()), "objective": (("model", "batch"), ())}


@dataclass(frozen=True)
class CodeOrigin:
    """Where one target comes from: its file, and every file of its package if it is in one."""

    key: str  # model.target
    name: str  # my_file:MyModel
    file: Path
    files: tuple[Path, ...]

    @property
    def hash(self) -> str:
        """Eight hex digits over the files."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self.files)).hexdigest()[:8]


def check_targets_exist(document: Mapping[str, Any]) -> None:
    """Raises ConfigError where a target cannot be read, or no module of that name is to be found. Imports nothing."""
    for key, name in find_targets(document).items():
        _look_here()
        if not re.fullmatch(f"{NAME}:{NAME}", name) or name.partition(":")[0].endswith(".py"):
            raise ConfigError(f"{key}: got {name}; expected module:attribute{_meant(name)}")
        top = name.partition(":")[0].partition(".")[0]
        if find_spec(top) is None:
            near = suggest_word(top, [path.stem for path in Path.cwd().glob("*.py")])
            raise ConfigError(
                f"{key}: {name}: there is no module {top} in {Path.cwd()}, nor is one installed"
                f"{near or '; run the command where the file is, or set PYTHONPATH'}"
            )


def import_targets(config: Config) -> None:
    """Import every target. Raises ConfigError where that fails, or where it could not be called as it will be."""
    document = config.document
    check_targets_exist(document)
    for key, name in find_targets(document).items():
        part = key.partition(".")[0]
        found = _found(key, name)
        if part in CALLS:
            _check_call(key, name, found, part, document[part]["options"])


def choose_objective(config: Config, source: Source) -> str:
    """The objective that is usual for this model on this data. Raises ConfigError where they do not go together."""
    from data.user_data import classify_source

    gives, names = classify_source(source)
    model, read = (getattr(part, "target", part.kind) for part in (config.model, config.data))
    takes = config.model.takes or getattr(_found("model.target", model), "takes", ())
    if takes and gives not in takes:
        raise ConfigError(f"model={model} takes {' or '.join(takes)}, but data={read} gives {gives}; choose another")
    usual = config.model.objective or ("next_token" if gives == "tokens" else "classify")
    objective = usual if config.objective.kind == "default" else config.objective.kind
    if lacking := [name for name in models.REQUIRED_BATCH_KEYS.get(objective, ()) if name not in names]:
        raise ConfigError(
            f"objective={objective} reads {lacking[0]}, which data={read} does not give (it has: {', '.join(names)}); "
            "choose objective=external with a loss of your own, or other data"
        )
    return usual


@contextmanager
def as_config_error(part: str) -> Iterator[None]:
    """What a target made and cannot be worked with, as an error of the configuration."""
    try:
        yield
    except (models.InvalidModelOrObjective, data.InvalidUserData) as error:
        raise ConfigError(f"{part}.target: {error}") from None


def find_origins(document: Mapping[str, Any]) -> list[CodeOrigin]:
    """The files that the targets of a document come from. Imports nothing; one that is not found is left out."""
    found = []
    for key, name in find_targets(document).items():
        _look_here()
        top, *below = name.partition(":")[0].split(".")
        spec = find_spec(top) if re.fullmatch(NAME, top) else None
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            continue
        file, files = Path(spec.origin), [Path(spec.origin)]
        for folder in map(Path, spec.submodule_search_locations or ()):
            files = sorted(folder.rglob("*.py"))
            inner = folder.joinpath(*below)
            file = next((path for path in (inner.with_suffix(".py"), inner / "__init__.py") if path in files), file)
        found.append(CodeOrigin(key, name, file, tuple(files)))
    return found


def describe_origins(found: Iterable[CodeOrigin]) -> dict[str, Any]:
    """What an attempt remembers of them, as JSON values."""
    return {origin.key: {"target": origin.name, "file": str(origin.file), "hash": origin.hash} for origin in found}


def list_changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each file that is not what it was at the attempt before."""
    lines = [
        f"{display_path(Path(now[key]['file']))} has changed since then ({old['hash']} → {now[key]['hash']}): what goes on is "
        "not what was interrupted"
        for key, old in before.items()
        if key in now and old["hash"] != now[key]["hash"]
    ]
    return list(dict.fromkeys(lines))


def _found(key: str, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"{key}: {name}: {_import_trouble(module, error)}") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            where = getattr(found, "__file__", None)
            raise ConfigError(
                f"{key}: {name}: {display_path(Path(where)) if where else module} has no '{part}'{suggest_word(part, dir(found))}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{key}: {name} is of type {type(found).__name__}; expected a class or a function")
    return found


def _check_call(key: str, name: str, target: Any, part: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError where the target cannot be called with what it will get."""
    positional, named = CALLS[part]
    try:
        signature = inspect.signature(_called(target))
    except ValueError:  # some that are written in C do not say
        return
    takes = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_POSITIONAL]
    names = [parameter.name for parameter in takes if parameter.kind is not parameter.VAR_KEYWORD]
    if len(names) == len(takes) and (unknown := sorted(options.keys() - set(names))):
        its = [each for each in names[len(positional) :] if each not in named]
        near = suggest_word(unknown[0], its) or f"; it has: {', '.join(its) or 'none'}"
        raise ConfigError(f"{part}.options.{unknown[0]}: {name} has no such option{near}")
    try:
        signature.bind(*positional, **dict.fromkeys(named), **options)
    except TypeError as error:
        called = ", ".join([*positional, *(f"{each}={each}" for each in named), *(f"{each}=…" for each in options)])
        raise ConfigError(f"{key}: {name}({', '.join(names)}) cannot be called as ({called}): {error}") from None


def _import_trouble(module: str, error: ImportError | SyntaxError) -> str:
    """What went wrong, and in which line of the user's."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}"
    if isinstance(error, SyntaxError):
        return f"cannot be imported: {error.msg} ({display_path(Path(error.filename or module))}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    last = frames[-1] if len(frames) > 1 else None
    where = f" ({display_path(Path(last.filename))}, line {last.lineno})" if last else ""
    return f"cannot be imported: {str(error).splitlines()[0]}{where}"


def _look_here() -> None:
    """Find modules beside the command, as `python -m` does; a script finds only those beside itself."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def _meant(name: str) -> str:
    """`, such as my_file:MyModel`, made from what was typed where that can be seen."""
    bare = name.replace(".py:", ":").removesuffix(".py").replace("/", ".")
    guess = bare if ":" in bare else ":".join(bare.rsplit(".", 1))
    return f"; did you mean {guess}?" if re.fullmatch(f"{NAME}:{NAME}", guess) else ", such as my_file:MyModel"


def _called(target: Any) -> Any:
    """What is called in the end: the metaclass of flax modules says nothing about their arguments."""
    return partial(target.__init__, None) if inspect.isclass(target) else target


def find_targets(document: Mapping[str, Any]) -> dict[str, str]:
    """The code of his own that a user names in a document: `{"model.target": "my_file:MyModel"}`."""
    return dict(_targets(document, ""))


def require_trust(run: Path, document: Mapping[str, Any], typed: Mapping[str, Any], way_out: str) -> None:
    """Raises RefusedError where the document of a run names code that `typed`, a document composed here, does not."""
    asked = [f"{key}={target}" for key, target in find_targets(document).items() if _at(typed, key) != target]
    if asked:
        raise RefusedError(
            f"{display_path(run)} asks for code of its own: {', '.join(asked)}; if you trust it {way_out}"
        )


def trust_flag(document: Mapping[str, Any]) -> str:
    """What to type as well when a run of this document is named: the flag, where it needs one."""
    return f" {TRUST_FLAG}" if find_targets(document) else ""


def _targets(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, Mapping):
        return
    if node.get("kind") == "external":
        yield f"{prefix}target", str(node.get("target"))
        return  # below are options, which are the target's
    for key, value in node.items():
        yield from _targets(value, f"{prefix}{key}.")


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
