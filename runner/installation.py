"""Where this program lies, in a checkout or installed from a wheel: its choices, and how to start it once more."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

from runner.errors import ConfigError

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


def import_own_packages() -> None:
    """Import `models` and `data` from where ours are, in a process that somebody else started, with his search path.

    Folders of that name often lie beside a notebook, and Python would take those. Modules in them are found after ours.
    Raises ConfigError where such a package was imported already: one process has no two of a name.
    """
    for name in OWN_PACKAGES:
        ours = PACKAGE.parent / name
        if name not in sys.modules:
            sys.path.insert(0, str(PACKAGE.parent))
            try:
                import_module(name)
            finally:
                sys.path.remove(str(PACKAGE.parent))
        folders = [Path(folder).resolve() for folder in getattr(sys.modules[name], "__path__", ())]
        if ours not in folders:
            raise ConfigError(
                f"{name}: this process has imported another package of that name ({folders[0] if folders else name}); "
                "expected Holdfast's own: load the model before yours is imported, or give yours another name"
            )
    # Not before: it is one of them itself.
    from data.user_target import share_package_name

    for name in OWN_PACKAGES:
        share_package_name(name)
