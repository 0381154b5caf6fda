"""Find the files beside a user's own file that it imports, by reading alone: none of them is run.

`train.py` mostly imports a `networks.py` beside it. A change of either is a change of what the run computes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from runner.errors import ConfigError
from runner.installation import OWN_PACKAGES, PACKAGE
from runner.text import display_path


def list_imported_files(file: Path) -> tuple[Path, ...]:
    """Return the files beside this one that it imports, also through each other; of a package all of its files."""
    found: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        for name in _list_imports(waiting.pop()):
            for each in _find_files_beside(file, name):
                if each != file and each not in found:
                    found[each] = None
                    waiting.append(each)
    return tuple(sorted(found))


def check_imports_beside(key: str, name: str, file: Path) -> None:
    """Raise ConfigError where a file, or one that it imports, would get another module than the one beside it.

    What lies beside a file is searched last, so that it hides nothing; Python itself searches it first, where a file is
    run as a script. A `models.py` is what many people call theirs, and a package here has that name.
    """
    # In a package it is the package's folder that counts, and its own files are imported as parts of it.
    if (file.parent / "__init__.py").is_file():
        return
    for importing in (file, *list_imported_files(file)):
        for imported in _list_imports(importing):
            top = imported.partition(".")[0]
            beside = next(iter(_find_module(file.parent, top)), None)
            elsewhere = _find_elsewhere(file, top)
            if beside is None or elsewhere is None or _is_shared(file, imported):
                continue
            owner = "a package of Holdfast's own" if top in OWN_PACKAGES else f"the module at {elsewhere}"
            raise ConfigError(
                f"{key}: {name}: {display_path(importing)} imports {top}, which is {owner} and not "
                f"{display_path(beside)}; give that one another name (my_{top}), and import it by that"
            )


def _list_imports(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports; `from a import b` may mean the module a.b."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        # Whoever imports it says what is wrong with it.
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _find_files_beside(file: Path, name: str) -> list[Path]:
    """Return the files beside this one that a dotted name stands for."""
    parts = name.split(".")
    if _find_elsewhere(file, parts[0]) is not None and not _is_shared(file, name):
        return []
    folder = file.parent
    for depth in range(len(parts)):
        if module := _find_module(folder, parts[depth]):
            # A package may import any of its files by itself.
            return sorted(module[0].parent.rglob("*.py")) if module[0].name == "__init__.py" else module
        folder /= parts[depth]
    return []


def _find_module(folder: Path, name: str) -> list[Path]:
    candidates = (folder / name / "__init__.py", folder / f"{name}.py")
    return [each for each in candidates if each.is_file()][:1]


def _find_elsewhere(file: Path, top: str) -> str | None:
    """Return where a module comes from if it is not from beside a file; None where it is, or nowhere."""
    if top in sys.stdlib_module_names or top in OWN_PACKAGES:
        return top
    try:
        spec = find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or spec.origin is None or Path(spec.origin).resolve().is_relative_to(file.parent.resolve()):
        return None
    return spec.origin


def _is_shared(file: Path, name: str) -> bool:
    """Return whether a name is found all the same: of Python's own, or in a package beside that is called as ours.

    Modules of such a package are found, but not what its `__init__.py` defines.
    """
    top, _, below = name.partition(".")
    if top not in OWN_PACKAGES:
        return top in sys.stdlib_module_names
    own, theirs = PACKAGE.parent / top, file.parent / top
    first = below.partition(".")[0]
    return bool(first and _find_module(theirs, first) and not _find_module(own, first))
