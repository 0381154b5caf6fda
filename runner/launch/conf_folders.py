"""Where choices are looked for: `conf` of the working directory first, then the product's own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from runner.errors import ConfigError
from runner.installation import find_product_conf
from runner.text import display_path


def list_conf_folders() -> list[Path]:
    """List the folders that choices are looked for in, the product's own at the end.

    Raises ConfigError where there is something called `conf` in the working directory that is no readable folder.
    """
    ours, own = find_product_conf(), Path.cwd() / "conf"
    # A broken link counts as well: whoever made it expects his choices to be found.
    if not os.path.lexists(own) or find_enclosing_run(own.parent) is not None:
        return [ours]
    try:
        next(own.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"{own}: {error.strerror}; `conf` of the working directory is where choices of your own are looked for: "
            "make it a readable folder, or type the command elsewhere"
        ) from None
    return [ours] if own.samefile(ours) else [own, ours]


def find_enclosing_run(folder: Path) -> Path | None:
    """Return the directory of a run that a folder is, or lies in; None where there is none.

    What lies there came with the run: its `conf` is no choice of the person who types a command there.
    """
    for path in (folder, *folder.parents):
        beside = (path / name for name in ("status.json", "attempts.jsonl", "checkpoints"))
        if (path / "config.yaml").is_file() and any(map(os.path.lexists, beside)):
            return path
    return None


def describe_unused_conf() -> str | None:
    """Return a line about a `conf` in the working directory that is not used; None where there is none."""
    here = Path.cwd()
    if not os.path.lexists(here / "conf") or (run := find_enclosing_run(here)) is None:
        return None
    return f"conf of this directory is not used: it came with the run in {display_path(run)}"


def is_group(key: str) -> bool:
    """Return whether a key is the name of a group of choices, as `model`."""
    # Not any path: `..` and `/etc` are folders as well.
    if not re.fullmatch(r"\w+(/\w+)*", key):
        return False
    # Not `Path.is_dir`, which raises where a name is too long.
    return any(os.path.isdir(folder / key) for folder in list_conf_folders())


def list_options(group: str) -> list[str]:
    """List the choices of a group."""
    return sorted({path.stem for folder in list_conf_folders() for path in (folder / group).glob("*.yaml")})


class OwnConf(SearchPathPlugin):
    """Have Hydra look into `conf` of the working directory before the product's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put it first."""
        for folder in list_conf_folders()[:-1]:
            search_path.prepend("working directory", str(folder))


@contextmanager
def name_replaced_config() -> Iterator[None]:
    """Say with a ConfigError that the working directory has a config.yaml in place of the product's, where it has."""
    try:
        yield
    except ConfigError as error:
        first, *others = list_conf_folders()
        # The folder of another program, which uses Hydra as well, is likelier than a person who has meant it.
        if others and (first / "config.yaml").is_file():
            replaced = display_path(first / "config.yaml")
            raise ConfigError(f"{error} ({replaced} is used in place of the product's own)") from None
        raise
