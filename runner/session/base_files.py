"""What a run takes over from a Hugging Face folder: its shape, written down once, and which files its weights were.

As long as nothing of the run is durable it begins anew from the folder, which then must be what it was. From the first
checkpoint on the folder is not looked at any more.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import HfModel
from runner import files, hosts
from runner.checkpoint.hf_folder import HF, HfFolder
from runner.checkpoint.hf_shape import read_hf_shape
from runner.config.schema import Config, read_document, validate_options
from runner.errors import RefusedError
from runner.rundir.layout import RunDir
from runner.text import display_path
from runner.train.own_tokenizer import check_tokenizer
from runner.types import JsonObject


def settle_model(config: Config, run_dir: RunDir | None = None) -> Config:
    """Return a configuration that knows the shape of `model=hf`: as its run has written it down, or from the folder.

    Any other configuration is returned as it is. Of a run that is to begin its tokenizer is looked for as well.

    Raises:
        ConfigError: the folder is not there or is none, or the shape does not go with the other keys.
        RefusedError: the run's own configuration cannot be read.
    """
    model, is_there = config.model, run_dir is not None and run_dir.config.exists() and not config.overwrite
    if isinstance(model, HfModel) and model.shape is None:
        saved = read_document(run_dir.config)["model"].get("shape") if run_dir is not None and is_there else None
        # Of a run of another model nothing is taken: that it is another one is said later.
        config = apply_settled(config, _read_settled(model) if saved is None else {"shape": saved})
    if not is_there:
        check_tokenizer(config)
    return config


def describe_settled(config: Config) -> JsonObject:
    """Return what `settle_model` has found, for the other processes of a run; empty where there was nothing to find."""
    return {"shape": config.document["model"]["shape"]} if isinstance(config.model, HfModel) else {}


def apply_settled(config: Config, settled: JsonObject) -> Config:
    """Return a configuration with what `describe_settled` or a run's document says of its model."""
    if not settled:
        return config
    document: dict[str, Any] = config.document
    document["model"]["shape"] = settled["shape"]
    known: Config = validate_options(Config, document)
    return known


def _read_settled(model: HfModel) -> JsonObject:
    """Return what the folder of a model says. Raises ConfigError where it says nothing that is understood."""
    shape = read_hf_shape(Path(model.path or "").expanduser())
    return {"shape": json.loads(json.dumps(asdict(shape)))}


def describe_pixels(config: Config, folder: HfFolder) -> str:
    """Return a line on how images are given to weights of a folder that had them normalized; empty for any others."""
    pixels, model = read_hf_shape(folder.path).pixels, config.model
    if pixels is None:
        return ""
    how = f"mean {', '.join(map(str, pixels.mean))} and standard deviation {', '.join(map(str, pixels.std))}"
    if isinstance(model, HfModel) and model.shape is not None and model.shape.pixels is not None:
        if model.normalize:
            return f"images are normalized as the folder says: {how}"
        return f"images are taken as the data has them (model.normalize=false); the folder's had {how}"
    return (
        f"warning: these weights were trained on images normalized with {how}, and are given them from 0 to 1; say "
        "model=hf to have that done"
    )


def record_or_compare_base(run_dir: RunDir, folder: HfFolder) -> None:
    """Write down which files a run begins with; where it began before, compare them.

    Raises RefusedError where one has changed since.
    """
    # One process for all: the others read parts of the same files.
    if not hosts.is_lead():
        return
    measured = {path.name: _measure_file(path) for path in folder.files}
    source = f"{HF}{folder.path.absolute()}"
    now = {"source": source, "family": folder.config.get("model_type"), "files": measured}
    try:
        before = files.read_json_object(run_dir.base)
    except OSError:
        before = None
    known = (before or {}).get("files")
    if not isinstance(known, dict):
        files.replace_file(run_dir.base, files.format_json(now, indent=1) + "\n")
        return
    names = sorted(known.keys() | measured.keys())
    if changed := [name for name in names if known.get(name) != measured.get(name)]:
        raise RefusedError(
            f"{run_dir} began with other weights: {', '.join(changed[:3])} of {HF}{display_path(folder.path)} changed "
            "since, and nothing of the run is saved yet; bring the files back, or start another run: name=NAME"
        )


def _measure_file(path: Path) -> JsonObject:
    """Return size and sha256 of a file, which is how Hugging Face's own pages name its content."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
