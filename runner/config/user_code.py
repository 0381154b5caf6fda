"""A user's own model, data and objective: found before jax starts, imported when they are built, or refused in a line.

A target is named in the configuration as `module:attribute`. Its module is looked for where Python looks, and only then
where the command is typed: no file there takes the place of a library. A target that a run's directory names, and not
the command, is imported only with `--trust`: looking at somebody else's run must not run his code.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
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

from data.data_errors import InvalidUserData
from models import REQUIRED_BATCH_KEYS, InvalidModelOrObjective
from runner.config.explain import suggest_word
from runner.errors import ConfigError
from runner.installation import OWN_PACKAGES, keep_own_packages_first
from runner.text import display_path
from runner.types import Document

if TYPE_CHECKING:
    from data.sources import Source
    from runner.config.schema import Config

DOTTED_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
# For each part, what its target is called with before the options: by position, and by name, as flax modules take rngs.
ARGUMENTS = {
    "model": (("inputs", "num_outputs"), ("rngs",)),
    "data": ((), ()),
    "objective": (("model", "batch"), ()),
}


@dataclass(frozen=True)
class CodeOrigin:
    """The file that a target comes from, and all files of its package if it is in one.

    `key` is where the configuration names it (`model.target`), `name` how (`my_file:MyModel`).
    """

    key: str
    name: str
    file: Path
    files: tuple[Path, ...]

    @property
    def hash(self) -> str:
        """Return eight hex digits over the contents of the files."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self.files)).hexdigest()[:8]


def find_targets(document: Document) -> dict[str, str]:
    """Return the user's own code that a document names: `{"model.target": "my_file:MyModel"}`."""
    return dict(_iter_targets(document, ""))


def check_targets_exist(document: Document) -> None:
    """Raise ConfigError where a target cannot be read, or no module of that name can be found. Imports nothing."""
    for key, name in find_targets(document).items():
        _add_current_folder_to_path()
        if not re.fullmatch(f"{DOTTED_NAME}:{DOTTED_NAME}", name) or name.partition(":")[0].endswith(".py"):
            raise ConfigError(f"{key}: got {name}; expected module:attribute{_suggest_target(name)}")
        # The package alone: to find a module in it, Python would import the package.
        top = name.partition(":")[0].partition(".")[0]
        if find_spec(top) is None:
            near = suggest_word(top, [path.stem for path in Path.cwd().glob("*.py")])
            raise ConfigError(
                f"{key}: {name}: there is no module {top} in {Path.cwd()}, nor is one installed"
                f"{near or '; run the command where the file is, or set PYTHONPATH'}"
            )
        if hidden := _find_hidden_module(top):
            raise ConfigError(
                f"{key}: {name}: {top} is a module of {hidden}; give {top} in this directory another name"
            )


def import_targets(config: Config) -> None:
    """Import every target. Raises ConfigError where that fails, or where it cannot be called as it will be."""
    document = config.document
    check_targets_exist(document)
    for key, name in find_targets(document).items():
        part = key.partition(".")[0]
        target = _import_target(key, name)
        if part in ARGUMENTS:
            _check_call(key, name, target, part, document[part]["options"])


def choose_objective(config: Config, source: Source) -> str:
    """Return the objective that is usual for the model of a run on its data (`source`).

    Raises ConfigError where the model does not take such data, or where the objective reads arrays that it has not.
    """
    from data.user_data import classify_source

    gives, names = classify_source(source)
    model, read = (getattr(part, "target", part.kind) for part in (config.model, config.data))
    # A user's own model may say what it takes, in an attribute; a function mostly has none.
    takes = config.model.takes or getattr(_import_target("model.target", model), "takes", ())
    if takes and gives not in takes:
        raise ConfigError(f"model={model} takes {' or '.join(takes)}, but data={read} gives {gives}; choose another")
    usual = config.model.objective or ("next_token" if gives == "tokens" else "classify")
    objective = usual if config.objective.kind == "default" else config.objective.kind
    if lacking := [name for name in REQUIRED_BATCH_KEYS.get(objective, ()) if name not in names]:
        raise ConfigError(
            f"objective={objective} reads {lacking[0]}, which data={read} does not give (it has: {', '.join(names)}); "
            "choose objective=external with a loss of your own, or other data"
        )
    return usual


@contextmanager
def as_config_error(part: str) -> Iterator[None]:
    """Turn the refusal of what a target of `part` returned into a ConfigError that names the target."""
    try:
        yield
    except (InvalidModelOrObjective, InvalidUserData) as error:
        raise ConfigError(f"{part}.target: {error}") from None


def find_origins(document: Document) -> list[CodeOrigin]:
    """Return the files that the targets of a document come from. Imports nothing; what is not found is left out."""
    found = []
    for key, name in find_targets(document).items():
        _add_current_folder_to_path()
        top, *below = name.partition(":")[0].split(".")
        spec = find_spec(top) if re.fullmatch(DOTTED_NAME, top) else None
        # Modules that are built in, or in an archive, have no file of their own.
        if spec is None or spec.origin is None or not Path(spec.origin).is_file():
            continue
        file, files = Path(spec.origin), [Path(spec.origin)]
        for folder in map(Path, spec.submodule_search_locations or ()):
            files = sorted(folder.rglob("*.py"))
            inner = folder.joinpath(*below)
            candidates = (inner.with_suffix(".py"), inner / "__init__.py")
            file = next((path for path in candidates if path in files), file)
        found.append(CodeOrigin(key, name, file, tuple(files)))
    return found


def describe_origins(origins: Iterable[CodeOrigin]) -> dict[str, Any]:
    """Return what an attempt remembers of the user's code, as plain JSON values."""
    return {origin.key: {"target": origin.name, "file": str(origin.file), "hash": origin.hash} for origin in origins}


def list_changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each file that is not what it was, from what `describe_origins` gave for two attempts."""
    lines = []
    for key, old in before.items():
        if key in now and old["hash"] != now[key]["hash"]:
            file, new_hash = display_path(Path(now[key]["file"])), now[key]["hash"]
            lines.append(
                f"{file} has changed since then ({old['hash']} → {new_hash}): what goes on is not what was interrupted"
            )
    # Model, data and objective may be in one file.
    return list(dict.fromkeys(lines))


def _import_target(key: str, name: str) -> Any:
    """Return what `module:attribute` names. Raises ConfigError where it cannot be imported or called."""
    module, _, attribute = name.partition(":")
    try:
        target: Any = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"{key}: {name}: {_explain_import_error(module, error)}") from None
    for part in attribute.split("."):
        if not hasattr(target, part):
            file = getattr(target, "__file__", None)
            where = display_path(Path(file)) if file else module
            raise ConfigError(f"{key}: {name}: {where} has no '{part}'{suggest_word(part, dir(target))}")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(f"{key}: {name} is of type {type(target).__name__}; expected a class or a function")
    return target


def _check_call(key: str, name: str, target: Any, part: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError where the target cannot be called with what it will get."""
    positional, named = ARGUMENTS[part]
    try:
        signature = inspect.signature(_initializer_or_self(target))
    except ValueError:
        # Some callables that are written in C do not say what they take.
        return
    takes = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_POSITIONAL]
    names = [parameter.name for parameter in takes if parameter.kind is not parameter.VAR_KEYWORD]
    # An unknown option gets a line of its own, unless the target takes any keyword.
    takes_any_option = len(names) < len(takes)
    if not takes_any_option and (unknown := sorted(options.keys() - set(names))):
        its = [each for each in names[len(positional) :] if each not in named]
        near = suggest_word(unknown[0], its) or f"; it has: {', '.join(its) or 'none'}"
        raise ConfigError(f"{part}.options.{unknown[0]}: {name} has no such option{near}")
    try:
        signature.bind(*positional, **dict.fromkeys(named), **options)
    except TypeError as error:
        called = ", ".join([*positional, *(f"{each}={each}" for each in named), *(f"{each}=…" for each in options)])
        raise ConfigError(f"{key}: {name}({', '.join(names)}) cannot be called as ({called}): {error}") from None


def _explain_import_error(module: str, error: ImportError | SyntaxError) -> str:
    """Return what went wrong, and in which line of the user's code."""
    # `module` itself or one of its packages is missing, and not something that it imports.
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        top = module.partition(".")[0]
        way_out = f"; {top} is a package of Holdfast's own: give yours another name" if top in OWN_PACKAGES else ""
        return f"there is no module {error.name}{way_out}"
    if isinstance(error, SyntaxError):
        file = display_path(Path(error.filename or module))
        return f"cannot be imported: {error.msg} ({file}, line {error.lineno})"
    # The last frame that is in a file; the first one is ours.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    last = frames[-1] if len(frames) > 1 else None
    where = f" ({display_path(Path(last.filename))}, line {last.lineno})" if last else ""
    return f"cannot be imported: {str(error).splitlines()[0]}{where}"


def _add_current_folder_to_path() -> None:
    """Let Python find modules where the command is typed, after all others."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
        keep_own_packages_first()


def _find_hidden_module(top: str) -> str | None:
    """Return where a module comes from in whose place there is a file in the working directory; None where none is."""
    here = next((file for file in (Path(f"{top}.py"), Path(top, "__init__.py")) if file.is_file()), None)
    spec = find_spec(top)
    if here is None or spec is None or (spec.origin and os.path.exists(spec.origin) and here.samefile(spec.origin)):
        return None
    if top in OWN_PACKAGES:
        return "Holdfast's own"
    return "Python's own" if top in sys.stdlib_module_names else str(spec.origin)


def _suggest_target(name: str) -> str:
    """Return `; did you mean my_file:MyModel?`, made from what was typed if that can be guessed, else an example."""
    bare = name.replace(".py:", ":").removesuffix(".py").replace("/", ".")
    guess = bare if ":" in bare else ":".join(bare.rsplit(".", 1))
    if re.fullmatch(f"{DOTTED_NAME}:{DOTTED_NAME}", guess):
        return f"; did you mean {guess}?"
    return ", such as my_file:MyModel"


def _initializer_or_self(target: Any) -> Any:
    """Return what has the signature of a call: the metaclass of flax modules hides that of `__init__`."""
    return partial(target.__init__, None) if inspect.isclass(target) else target


def _iter_targets(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, Mapping):
        return
    if node.get("kind") == "external":
        # Below are options, which are the target's: one that is called `kind` means something else.
        yield f"{prefix}target", str(node.get("target"))
        return
    for key, value in node.items():
        yield from _iter_targets(value, f"{prefix}{key}.")
