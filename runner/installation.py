"""Where this program lies, in a checkout or installed from a wheel: its choices, and how to start it once more."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
OWN_PACKAGES = (PACKAGE.name, "models", "data")


def find_product_conf() -> Path:
    """Return the folder with the product's own choices: inside the package in a wheel, beside it in a checkout."""
    # Inside comes first: beside an installed package, in site-packages, a folder `conf` would be somebody else's.
    inside = PACKAGE / "conf"
    return inside if (inside / "config.yaml").is_file() else PACKAGE.parent / "conf"


def find_run_program() -> tuple[str, ...]:
    """Return what to give to a Python interpreter, before the overrides of a run, so that it works on that run."""
    script = PACKAGE.parent / "run.py"
    if find_product_conf().parent != PACKAGE and script.is_file():
        return (str(script),)
    # -P: a folder called `runner` where the command is typed must not be imported in place of ours.
    return ("-P", "-m", "runner.launch")


def find_typed_program() -> tuple[str, ...]:
    """Return what to give to a Python interpreter so that it is the program that was typed: run.py, `holdfast`, any."""
    script = Path(sys.argv[0]).resolve()
    # A module of ours that was started with -m cannot be started by its path: its folder would come first for imports.
    if script.is_relative_to(PACKAGE) or not script.is_file():
        return find_run_program()
    return (str(script),)


def keep_own_packages_first() -> None:
    """Have `models`, `data` and `runner` be ours in this process and in those that it starts with its search path.

    A folder of that name may come before: of the working directory, or of PYTHONPATH.
    """
    for name in OWN_PACKAGES:
        # Not importlib.util.find_spec: it answers with what is imported already, which a new process has not.
        found = PathFinder.find_spec(name)
        ours = PACKAGE.parent / name / "__init__.py"
        # No origin: a folder without __init__.py, which hides a package that only an editable install knows.
        if found is not None and (found.origin is None or Path(found.origin).resolve() != ours):
            sys.path.insert(0, str(PACKAGE.parent))
            return
