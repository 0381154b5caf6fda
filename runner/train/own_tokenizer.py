"""The tokenizer of a run's text lies in the run too: what made its tokens is there when the folder it came from is not.

It is copied while nothing of the run depends on it, and read from there ever after. No jax.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.encodings import TOKENIZER
from data.text_tokenizer import BYTES, find_tokenizer
from runner import files, hosts
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.rundir.layout import RunDir

# What else lies beside a tokenizer.json and belongs to it: for whoever gets the model back with `export --to hf`.
OTHER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "tokenizer.model"),
)


def find_chosen_tokenizer(config: Config) -> str | None:
    """Return where the tokenizer of the data is, as it was typed; None where text is bytes."""
    place: str | None = getattr(config.data, "tokenizer", None)
    return None if place == BYTES or config.data.gives != "tokens" else place


def check_tokenizer(config: Config) -> None:
    """Raise ConfigError where the tokenizer of a run that is to begin is not there."""
    if (place := find_chosen_tokenizer(config)) is not None:
        try:
            find_tokenizer(place)
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None


def keep_tokenizer(config: Config, run_dir: RunDir) -> Config:
    """Return a configuration whose text is read with the run's own copy of its tokenizer, made now if there is none.

    Raises ConfigError where there is neither.
    """
    if (place := find_chosen_tokenizer(config)) is None:
        return config
    own = run_dir.tokenizer
    if hosts.is_lead() and not run_dir.holds_checkpoints() and os.path.exists(Path(place).expanduser()):
        check_tokenizer(config)
        _copy_tokenizer(find_tokenizer(place), own)
    return read_with_own_tokenizer(config, run_dir)


def read_with_own_tokenizer(config: Config, run_dir: RunDir) -> Config:
    """Return a configuration whose text is read with the run's own copy of its tokenizer, where there is one."""
    if find_chosen_tokenizer(config) is None or not (run_dir.tokenizer / TOKENIZER).is_file():
        return config
    data: Any = config.data
    return replace(config, data=replace(data, tokenizer=str(run_dir.tokenizer)))


def _copy_tokenizer(file: Path, own: Path) -> None:
    """Copy a tokenizer and what belongs to it; it is there as a whole or not at all."""
    fresh = own.parent / f".{own.name}.{os.getpid()}"
    files.make_folder(fresh)
    try:
        shutil.copyfile(file, fresh / TOKENIZER)
        for name in OTHER_FILES:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, fresh / name)
        for path in fresh.iterdir():
            files.sync_path(path)
        files.remove_tree(own)
        files.rename_path(fresh, own)
    finally:
        files.remove_tree(fresh)
