"""The files that a user's own code comes from: their hashes are remembered, so that a change in between is told.

Nothing is imported: looking at somebody else's run must not run his code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data.user_target import find_in_shared_package, is_file_target, split_target
from runner.config.imported_files import list_imported_files
from runner.config.user_code import DOTTED_NAME, add_current_folder_to_path, find_targets
from runner.installation import OWN_PACKAGES, PACKAGE
from runner.text import display_path
from runner.types import Document


@dataclass(frozen=True)
class CodeOrigin:
    """The file that a target comes from, and all files of its package if it is in one.

    `key` is where the configuration names it (`model.target`), `name` how (`my_file:MyModel`). What such a file imports
    from beside it has origins of its own.
    """

    key: str
    name: str
    file: Path
    files: tuple[Path, ...]

    @property
    def hash(self) -> str:
        """Return eight hex digits over the contents of the files."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self.files)).hexdigest()[:8]


def find_origins(document: Document) -> list[CodeOrigin]:
    """Return the files that the targets of a document come from. Imports nothing; what is not found is left out."""
    found = []
    for key, name in find_targets(document).items():
        add_current_folder_to_path()
        module = split_target(name)[0]
        if is_file_target(module):
            if (path := Path(module).expanduser()).is_file():
                beside = sorted(path.parent.rglob("*.py")) if (path.parent / "__init__.py").is_file() else [path]
                found.append(CodeOrigin(key, name, path, tuple(beside)))
                found += _find_imported(found[-1])
            continue
        top, *below = module.split(".")
        if top in OWN_PACKAGES and (theirs := find_in_shared_package(module, PACKAGE.parent / top)):
            found.append(CodeOrigin(key, name, theirs, tuple(sorted((Path.cwd() / top).rglob("*.py")))))
            continue
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
        # Not of an installed module: beside it lies everything that is installed.
        if file.parent == Path.cwd():
            found += _find_imported(found[-1])
    return found


def _find_imported(origin: CodeOrigin) -> list[CodeOrigin]:
    """Return an origin for each file beside a target's that it imports."""
    beside = (path for path in list_imported_files(origin.file) if path not in origin.files)
    return [
        CodeOrigin(f"{origin.key} imports {path.relative_to(origin.file.parent)}", f"{path.stem}:", path, (path,))
        for path in beside
    ]


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
