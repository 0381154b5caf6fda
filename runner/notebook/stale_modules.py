"""Refuse a model of code that its file no longer has: Python imports a module once, and a notebook edits it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

from data.user_target import split_target
from runner.config.code_origins import find_origins
from runner.errors import RefusedError
from runner.text import display_path
from runner.types import Document

# By module: the spec that its import made, which a reload makes anew, and the hash of its files then.
_imported: dict[str, tuple[ModuleSpec | None, str]] = {}


def refuse_stale_modules(document: Document) -> None:
    """Raise RefusedError where a target's file has changed since a model was first loaded from it in this process.

    Whether it had changed between its import and that first time cannot be known.
    """
    for origin in find_origins(document):
        name = split_target(origin.name)[0]
        module = sys.modules.get(name)
        if module is None:
            continue
        spec, known = _imported.setdefault(name, (module.__spec__, origin.hash))
        if spec is not module.__spec__:
            _imported[name] = module.__spec__, origin.hash
        elif known != origin.hash:
            raise RefusedError(
                f"{display_path(origin.file)}: has changed since this process imported it, and the model would be "
                f"that of the old code; restart the kernel, or importlib.reload(sys.modules[{name!r}]), and load again"
            )
