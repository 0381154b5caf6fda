"""The model that a Hugging Face folder describes, and how images are made for it."""

from __future__ import annotations

from pathlib import Path

from models import HfShape
from models.hf_config import read_shape
from runner.checkpoint.hf_folder import CONFIG, PREPROCESSOR, read_hf_config, read_json_file
from runner.errors import ConfigError
from runner.text import display_path


def read_hf_shape(folder: Path) -> HfShape:
    """Return what the files of a folder say of its model. Raises ConfigError where they say nothing understood."""
    config, file = read_hf_config(folder), folder / CONFIG
    try:
        shape = read_shape(config)
        if shape.image and (folder / PREPROCESSOR).is_file():
            file = folder / PREPROCESSOR
            shape = read_shape(config, read_json_file(file))
    except ValueError as error:
        raise ConfigError(f"{display_path(file)}: {error}") from None
    return shape
