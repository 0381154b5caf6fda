"""A user's own model, data and objective: found before jax starts, imported when they are built, or refused in a line.

A target is named in the configuration as `module:attribute`, or as `path/to/file.py:attribute`. A module is looked for
where Python looks, and only then where the command is typed: no file there takes the place of a library. A target that
a run's directory names, and not the command, is imported only with `--trust`: looking at somebody else's run must not
run his code.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.data_errors import InvalidUserData
from data.user_target import find_in_shared_package, import_user_module, is_file_target, split_target
from models import REQUIRED_BATCH_KEYS, TAUGHT, InvalidModelOrObjective
from models.remat_plan import RematPlanError
from models.user_arguments import initializer_of
from runner.checkpoint.trouble import PASSING_ERRNOS
from runner.config.evaluations import ASKED_BY_NAME
from runner.config.explain import suggest_word
from runner.config.imported_files import check_imports_beside
from runner.errors import ConfigError, HoldfastError
from runner.installation import OWN_PACKAGES, PACKAGE, keep_own_packages_first
from runner.log.user_sink import find_wrong_call
from runner.text import display_path
from runner.types import Document
from runner.user_frames import explain_raised, find_user_frame

if TYPE_CHECKING:
    from data.sources import Sources
    from runner.config.schema import Config

DOTTED_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
# What a target is called with before its options, by the beginning of its key. A part that is not here is called by the
# names of its parameters: whether it can be is known where it is made.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "data": (),
    "objective": ("model", "batch"),
    "eval": ("subject",),
    "ckpt.save": ("info", "history"),
    "retention": ("records",),
    "stop.rules": ("history",),
}
# What only the process that trains imports: who looks at a run needs none of it, and trust.py lets it pass.
TRAINING_PARTS = ("ckpt.save", "retention", "stop.rules", "log.sinks")
# What it is given as well where its parameters have these names.
ASKED: dict[str, tuple[str, ...]] = {"eval": ASKED_BY_NAME}
# Of these a finished object will do as well, which has nothing to call.
TAKES_OBJECTS = ("optim", "program")


def find_targets(document: Document) -> dict[str, str]:
    """Return the user's own code that a document names: `{"model.target": "my_file:MyModel"}`."""
    return dict(_iter_targets(document, ""))


def check_targets_exist(document: Document, *, for_training: bool = True) -> None:
    """Raise ConfigError where a target cannot be read, or no module of that name can be found. Imports nothing.

    Without `for_training` rules and loggers are passed over: who looks at a run need not have them.
    """
    targets = find_targets(document)
    _check_exist({key: name for key, name in targets.items() if for_training or not key.startswith(TRAINING_PARTS)})


def _check_exist(targets: Mapping[str, str]) -> None:
    for key, name in targets.items():
        add_current_folder_to_path()
        module, attribute = split_target(name)
        if module == "__main__":
            raise ConfigError(
                f"{key}: {name}: a run works in a process of its own, which cannot see what a notebook or a program "
                f"alone has; write it to a file (in a notebook: %%writefile my_file.py) and name my_file:{attribute}"
            )
        if is_file_target(module) and re.fullmatch(DOTTED_NAME, attribute):
            _check_file_exists(key, name, module)
            _check_name_defined(key, name, Path(module).expanduser())
            check_imports_beside(key, name, Path(module).expanduser())
            continue
        if not re.fullmatch(f"{DOTTED_NAME}:{DOTTED_NAME}", name):
            raise ConfigError(f"{key}: got {name}; expected module:attribute{_suggest_target(name)}")
        # The package alone: to find a module in it, Python would import the package.
        top = module.partition(".")[0]
        if find_spec(top) is None:
            near = suggest_word(top, [path.stem for path in Path.cwd().glob("*.py")])
            raise ConfigError(
                f"{key}: {name}: there is no module {top} in {Path.cwd()}, nor is one installed"
                f"{near or '; run the command where the file is, or name the file: path/to/file.py:Name'}"
            )
        if top in OWN_PACKAGES:
            _check_shared_name(key, name, module)
        elif hidden := _find_hidden_module(top):
            raise ConfigError(
                f"{key}: {name}: {top} is a module of {hidden}; give {top} in this directory another name, or name the "
                f"file: ./{top}.py:{attribute}"
            )
        check_imports_beside(key, name, Path(f"{top}.py"))


def _check_file_exists(key: str, name: str, file: str) -> None:
    path = Path(file).expanduser()
    if path.is_file():
        return
    near = suggest_word(path.name, [each.name for each in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
    near = near or "; check the path, or run it where the file is"
    raise ConfigError(f"{key}: {name}: there is no file {display_path(path)}{near}")


def _check_name_defined(key: str, name: str, file: Path) -> None:
    """Raise ConfigError where a file surely does not define what a target names. Reads it, and runs nothing.

    So the second of two models of a sweep is found missing before the first one trains.
    """
    try:
        defined = _list_defined_names(ast.parse(file.read_bytes()))
    except (OSError, SyntaxError, ValueError, RecursionError):
        # Whoever imports it says what is wrong with it.
        return
    wanted = split_target(name)[1].partition(".")[0]
    if defined is not None and wanted not in defined:
        raise ConfigError(
            f"{key}: {name}: {display_path(file)} has no '{wanted}'{suggest_word(wanted, sorted(defined))}"
        )


def _list_defined_names(module: ast.Module) -> set[str] | None:
    """Return the names that a module binds at its top level; None where that cannot be told by reading."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom | ast.Import):
            if any(alias.name == "*" for alias in node.names):
                return None
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == "__getattr__":
                return None
            names.add(node.name)
        elif isinstance(node, ast.Name):
            # `globals()["Net"] = …` and the like.
            if node.id in ("globals", "vars", "locals", "exec", "setattr"):
                return None
            if isinstance(node.ctx, ast.Store):
                names.add(node.id)
    # Names within functions are among them as well: what is surely missing is missing from all of them.
    return names


def _check_shared_name(key: str, name: str, module: str) -> None:
    """Raise ConfigError where a module of a user's package that is called as one of ours would not be found."""
    top = module.partition(".")[0]
    here, ours = Path.cwd(), PACKAGE.parent / top
    below = Path(*module.split("."))
    candidates = (below.with_name(f"{below.name}.py"), below / "__init__.py")
    theirs = next((file for file in candidates if (here / file).is_file()), None)
    if theirs is None or (here / top).resolve() == ours.resolve():
        return
    # What ours has as well is imported from ours: theirs has to be named by its file.
    if find_in_shared_package(module, ours) is None:
        raise ConfigError(
            f"{key}: {name}: {module} is Holdfast's own; name the file of yours: ./{theirs}:{split_target(name)[1]}"
        )


def import_targets(config: Config, *, for_training: bool = False) -> None:
    """Import every target that a model is built with; with `for_training`, the rules and loggers in place of these.

    Raises ConfigError where that fails, or where one cannot be called as it will be.
    """
    document = config.document
    targets = {
        key: name for key, name in find_targets(document).items() if key.startswith(TRAINING_PARTS) == for_training
    }
    _check_exist(targets)
    for key, name in targets.items():
        part = key.removesuffix(".target")
        target, options = _import_target(key, name), _find_part(document, part)["options"]
        positional = find_arguments(part)
        if positional is not None:
            _check_call(part, name, target, positional, options)
        else:
            _check_options(part, name, target, (), options)
        if part.startswith("log.sinks.") and (wrong := find_wrong_call(target, options)):
            raise ConfigError(f"{key}: {name}{wrong}")


def find_arguments(part: str) -> tuple[str, ...] | None:
    """Return what the target of a part, as `ckpt.save.mine`, is called with before its options; None: by its names."""
    return next((found for start, found in ARGUMENTS.items() if f"{part}.".startswith(f"{start}.")), None)


def _find_part(document: Document, part: str) -> Any:
    node: Any = document
    for name in part.split("."):
        node = node[name]
    return node


def choose_objective(config: Config, sources: Sources) -> str:
    """Return the objective that is usual for the model of a run on its data.

    Raises ConfigError where the model does not take such data, or where the objective cannot be measured on it: it
    reads arrays that are not there, or labels that are none for it.
    """
    from data.label_checks import check_labels_fit, find_usual_objective
    from data.user_data import classify_source

    gives, names = classify_source(sources.eval)
    model, read = (getattr(part, "target", part.kind) for part in (config.model, config.data))
    # A user's own model may say what it takes, in an attribute; a function mostly has none.
    takes = config.model.takes or getattr(_import_target("model.target", model), "takes", ())
    if takes and gives not in takes:
        raise ConfigError(f"model={model} takes {' or '.join(takes)}, but data={read} gives {gives}; choose another")
    # Conversations, say, are there for one objective, whatever the model is mostly made for.
    usual = getattr(config.data, "objective", "") or config.model.objective
    usual = usual or ("next_token" if gives == "tokens" else "classify")
    chosen = config.objective.kind
    if chosen == "external":
        return usual
    try:
        if chosen in ("default", "distill") and usual == "classify" and "label" in names:
            usual = find_usual_objective(sources.train)
        if chosen == "distill" and usual not in TAUGHT:
            raise ConfigError(f"objective=distill teaches classes or tokens, and here it is {usual}; leave it out")
        objective = usual if chosen in ("default", "distill") else chosen
        if lacking := [name for name in REQUIRED_BATCH_KEYS.get(objective, ()) if name not in names]:
            raise ConfigError(
                f"objective={objective} reads {lacking[0]}, which data={read} does not give (it has: "
                f"{', '.join(names)}); choose objective=external with a loss of your own, or other data"
            )
        for part in (sources.train, sources.eval, *sources.held_out.values()):
            check_labels_fit(objective, part, sources.num_outputs, sources.ignore_label)
        if objective == "classify" and sources.num_outputs == 1:
            only = f" ({sources.classes[0]})" if sources.classes else ""
            raise ValueError(
                f"there is one class alone{only}, so its loss is 0 whatever is learnt; expected two or more, or an "
                "objective that reads no label"
            )
    except ValueError as error:
        raise ConfigError(f"data={read}: {error}") from None
    return usual


@contextmanager
def as_config_error(part: str, target: str | None = None, *, anywhere: bool = False) -> Iterator[None]:
    """Turn the refusal of what a target of `part` returned into a ConfigError that names the target.

    Where `target` is given, so is whatever else its code raises: with the place in the file, and not a traceback.
    `anywhere`: also what a library raises that no file of the user's called, as where the target is a library's.
    """
    try:
        yield
    except (InvalidModelOrObjective, InvalidUserData) as error:
        name = f"{target}: " if target and not str(error).startswith(f"{target}: ") else ""
        raise ConfigError(f"{part}.target: {name}{error}") from None
    except (HoldfastError, RematPlanError, MemoryError):
        raise
    except SystemExit as error:
        # What a user's code ends by itself would look like a run that was asked to end.
        if target is None:
            raise
        raise ConfigError(f"{part}.target: {target}: it ends Python (SystemExit: {error}); return or raise") from None
    except Exception as error:
        place = find_user_frame(error) if target else None
        if target and anywhere:
            place = place or split_target(target)[0]
        # A disk in trouble is no mistake in anybody's code.
        is_trouble = isinstance(error, OSError) and error.errno in PASSING_ERRNOS
        if place is None or is_trouble or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        raise ConfigError(f"{part}.target: {target}: {explain_raised(error, place)}") from None


def _import_target(key: str, name: str) -> Any:
    """Return what a target names. Raises ConfigError where it cannot be imported or called."""
    module, attribute = split_target(name)
    try:
        target: Any = import_user_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"{key}: {name}: {_explain_import_error(module, error)}") from None
    except SystemExit as error:
        raise ConfigError(
            f"{key}: {name}: cannot be imported: it ends Python (SystemExit: {error}); put what it does as a script "
            'below `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        raised = explain_raised(error, find_user_frame(error) or module)
        raise ConfigError(f"{key}: {name}: cannot be imported: {raised}") from None
    for part in attribute.split("."):
        if not hasattr(target, part):
            file = getattr(target, "__file__", None)
            where = display_path(Path(file)) if file else module
            raise ConfigError(f"{key}: {name}: {where} has no '{part}'{suggest_word(part, dir(target))}")
        target = getattr(target, part)
    if not callable(target) and key.partition(".")[0] not in TAKES_OBJECTS:
        raise ConfigError(f"{key}: {name} is of type {type(target).__name__}; expected a class or a function")
    return target


def _check_options(part: str, name: str, target: Any, positional: tuple[str, ...], options: Mapping[str, Any]) -> None:
    """Raise ConfigError where an option is none of the target's; one that takes any keyword is asked nothing."""
    try:
        takes = inspect.signature(initializer_of(target)).parameters.values()
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take; a finished object takes nothing.
        return
    names = [each.name for each in takes if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    if any(each.kind is each.VAR_KEYWORD for each in takes):
        return
    if unknown := sorted(options.keys() - set(names)):
        asked = ASKED.get(part.partition(".")[0], ())
        # By position it is given whatever its parameters are called.
        given = (*positional, *names[: len(positional)], *asked, "inputs", "num_outputs", "rngs")
        its = [each for each in names if each not in given]
        near = suggest_word(unknown[0], its) or f"; it has: {', '.join(its) or 'none'}"
        raise ConfigError(f"{part}.options.{unknown[0]}: {name} has no such option{near}")


def _check_call(part: str, name: str, target: Any, positional: tuple[str, ...], options: Mapping[str, Any]) -> None:
    """Raise ConfigError where the target cannot be called with what it will get."""
    _check_options(part, name, target, positional, options)
    function = initializer_of(target)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    # What an objective is told by the names of its arguments: whether it trains, random numbers, weights.
    from models.call_roles import read_roles

    roles = read_roles(function, skip=len(positional))
    told = {*roles.training, *roles.evaluation, *roles.rngs, *roles.keys, "weights"} if part == "objective" else set()
    # Where an option has a name that could be asked for, it is what the user typed that counts.
    asked = {*ASKED.get(part.partition(".")[0], ())} - {*[*signature.parameters][: len(positional)], *options}
    named = (told | asked) & signature.parameters.keys()
    try:
        signature.bind(*positional, **dict.fromkeys(named), **options)
    except TypeError as error:
        called = ", ".join([*positional, *(f"{each}=…" for each in options)])
        names = ", ".join(signature.parameters)
        raise ConfigError(f"{part}.target: {name}({names}) cannot be called as ({called}): {error}") from None


def _explain_import_error(module: str, error: ImportError | SyntaxError) -> str:
    """Return what went wrong, and in which line of the user's code."""
    # `module` itself or one of its packages is missing, and not something that it imports.
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        top = module.partition(".")[0]
        way_out = f"; {top} is a package of Holdfast's own: name the file of yours" if top in OWN_PACKAGES else ""
        return f"there is no module {error.name}{way_out}"
    if isinstance(error, SyntaxError):
        file = display_path(Path(error.filename or module))
        return f"cannot be imported: {error.msg} ({file}, line {error.lineno})"
    # The last frame that is in a file; the first one is ours.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    last = frames[-1] if len(frames) > 1 else None
    where = f" ({display_path(Path(last.filename))}, line {last.lineno})" if last else ""
    return f"cannot be imported: {str(error).splitlines()[0]}{where}"


def add_current_folder_to_path() -> None:
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
    return "Python's own" if top in sys.stdlib_module_names else str(spec.origin)


def _suggest_target(name: str) -> str:
    """Return `; did you mean my_file:MyModel?`, made from what was typed if that can be guessed, else an example."""
    if name.endswith(".py"):
        return f", such as {name}:MyModel"
    bare = name.replace("/", ".")
    guess = bare if ":" in bare else ":".join(bare.rsplit(".", 1))
    if re.fullmatch(f"{DOTTED_NAME}:{DOTTED_NAME}", guess):
        return f"; did you mean {guess}?"
    return ", such as my_file:MyModel"


def _iter_targets(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, Mapping):
        return
    if node.get("kind") == "external":
        # Below are options, which are the target's: one that is called `kind` means something else.
        yield f"{prefix}target", str(node.get("target"))
        return
    for key, value in node.items():
        yield from _iter_targets(value, f"{prefix}{key}.")
