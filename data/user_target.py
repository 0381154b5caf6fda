"""Import a user's own code by the name that he gives it: `module:attribute`, or `path/to/file.py:attribute`.

Free of everything heavy: processes that make batches import the user's function once more.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

# As YAML and Python write one; with a 0 in front it is a name.
_WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}", re.ASCII)


def import_target(target: str) -> Any:
    """Return what a target names. Raises what the user's code raises, and AttributeError where it lacks the name."""
    module, attribute = split_target(target)
    found: Any = import_user_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def split_target(target: str) -> tuple[str, str]:
    """Return the module, or the file, and the attribute that a target names. A path may have colons."""
    module, _, attribute = target.rpartition(":")
    return module, attribute


def restore_number_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as a target gets them: mappings within them whose keys are all whole numbers have such keys.

    A document has text alone as keys. `optax.piecewise_constant_schedule` asks for numbers, and sorts them.
    """
    return {name: _restore_below(value) for name, value in options.items()}


def _restore_below(value: Any) -> Any:
    if isinstance(value, Mapping):
        keys = [*value]
        if keys and all(isinstance(key, str) and _WHOLE_NUMBER.fullmatch(key) for key in keys):
            keys = [int(key) for key in keys]
        return dict(zip(keys, map(_restore_below, value.values()), strict=True))
    if isinstance(value, list | tuple):
        return [_restore_below(each) for each in value]
    return value


def is_file_target(module: str) -> bool:
    """Return whether the first half of a target is a file."""
    return module.endswith(".py")


def import_user_module(module: str) -> ModuleType:
    """Import a module, or a file, once. A module in a package that has the name of one of ours is found as well."""
    if module in sys.modules:
        return sys.modules[module]
    if is_file_target(module):
        return _import_file(module)
    share_package_name(module.partition(".")[0])
    return importlib.import_module(module)


def _import_file(written: str) -> ModuleType:
    """Import a file. It is remembered under the name that the user gave it, for whoever asks for that next."""
    path = Path(os.path.realpath(Path(written).expanduser()))
    # The topmost folder of its package: there its relative imports begin.
    root, names = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    # Modules that lie beside it are found, as where Python runs the file; after all others, so that they hide none.
    if str(root) not in sys.path:
        sys.path.append(str(root))
    module = _import_from(path, f"{path.stem} ({path})") if len(names) == 1 else _import_from_package(root, names)
    sys.modules[written] = module
    return module


def _import_from_package(root: Path, names: list[str]) -> ModuleType:
    """Import a module of the package that lies in `root`, also where another package has that name already."""
    top, init = names[0], root / names[0] / "__init__.py"
    share_package_name(top, root)
    spec = find_spec(top)
    if spec is None or spec.origin is None or not init.samefile(spec.origin):
        # Under another name: its relative imports follow it there.
        top = f"{top} ({root})"
        if top not in sys.modules:
            _import_from(init, top)
    return importlib.import_module(".".join([top, *names[1:]]))


def _import_from(path: Path, name: str) -> ModuleType:
    """Import a file under a name of its own: a file `resnet.py` takes the place of no module that is called so."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = spec_from_file_location(name, path, submodule_search_locations=folder)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    # Whatever it is, Ctrl-C as well: half a module must not be found by who imports it next. Python does the same.
    except BaseException:
        del sys.modules[name]
        raise
    return module


def share_package_name(top: str, root: Path | None = None) -> None:
    """Let a package of ours find modules of the user's package of the same name, after its own.

    `models/` and `data/` are what many people call theirs. `root`: the folder it is in; None: the working directory.
    """
    own, theirs = sys.modules.get(top), (root or Path.cwd()) / top
    if own is None or not theirs.is_dir() or not hasattr(own, "__path__"):
        return
    if any(theirs.samefile(folder) for folder in own.__path__ if os.path.isdir(folder)):
        return
    own.__path__.append(str(theirs))


def find_in_shared_package(module: str, own: Path) -> Path | None:
    """Return the file of `models.tower` in a package of the user's that is called as ours; None where there is none.

    `own` is the folder of our package: what is there as well is ours.
    """
    below = Path(*module.split(".")[1:])
    if below == Path() or _find_module_file(own / below) is not None:
        return None
    return _find_module_file(Path.cwd() / own.name / below)


def _find_module_file(path: Path) -> Path | None:
    return next((file for file in (path.with_name(f"{path.name}.py"), path / "__init__.py") if file.is_file()), None)
