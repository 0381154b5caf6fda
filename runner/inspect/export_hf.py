"""Write a model of ours as a folder of Hugging Face: `export RUN --to hf DIR`, and `from_pretrained(DIR)` reads it.

Which tensors an array becomes is said by the table of its family (models/hf_families.py), the one that reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import Gpt, HfModel, HfShape, Vit
from models.hf_config import choose_family, write_config, write_preprocessor
from models.hf_families import FAMILIES, LAYER, NameRow
from runner.checkpoint.arrays import LeafSpec
from runner.checkpoint.hf_folder import CONFIG, INDEX, PREPROCESSOR, WEIGHTS
from runner.config.schema import Config, validate_options
from runner.errors import ConfigError
from runner.inspect.lookup import Checkpoint, find_attempt, read_config_document
from runner.inspect.weight_format import WeightFormat
from runner.train.dataset import read_data_record

# As transformers does: a file of a sharded folder is no larger.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class HfExport:
    """Say what a folder is to hold.

    Attributes:
        option: the model.
        family: the name of its family.
        config: its config.json.
        tokenizer: the files of a tokenizer that go with it.
        preprocessor: its preprocessor_config.json, where it is given images.
    """

    option: Gpt | Vit
    family: str
    config: Mapping[str, Any]
    tokenizer: tuple[Path, ...]
    preprocessor: Mapping[str, Any] | None = None

    def write(self, path: Path, values: Mapping[str, Any]) -> dict[str, str]:
        """Write the folder that `path`, the name of its weights, is in; return the types of the arrays."""
        from safetensors.numpy import save_file

        folder, shards = path.parent, list(_split_shards(self._iter_shapes(values)))
        sizes, where = 0, {}
        for number, names in enumerate(shards, 1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            wanted = set(names)
            tensors = {
                name: np.ascontiguousarray(tensor, np.float32)
                for name, tensor in self._iter_tensors(values)
                if name in wanted
            }
            save_file(tensors, folder / file, metadata={"format": "pt"})
            sizes += sum(tensor.nbytes for tensor in tensors.values())
            where.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(where.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for file_of_tokenizer in self.tokenizer:
            shutil.copyfile(file_of_tokenizer, folder / file_of_tokenizer.name)
        (folder / CONFIG).write_text(json.dumps(dict(self.config), indent=2) + "\n")
        if self.preprocessor is not None:
            (folder / PREPROCESSOR).write_text(json.dumps(dict(self.preprocessor), indent=2) + "\n")
        return {name: np.asarray(value).dtype.name for name, value in values.items()}

    def _iter_tensors(self, values: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every tensor with its name, as a view of an array of ours."""
        for row in FAMILIES[self.family].rows:
            if row.leaf not in values:
                continue
            value = np.asarray(values[row.leaf])
            if LAYER not in row.tensors[0]:
                yield from self._split_entry(row, value, None)
                continue
            for layer, entry in enumerate(value):
                yield from self._split_entry(row, entry, layer)

    def _split_entry(self, row: NameRow, entry: np.ndarray, layer: int | None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the tensors that one entry of an array is made of, along its last dimension."""
        sizes = find_widths(self.option) if len(row.tensors) > 1 else [entry.shape[-1]]
        parts = np.split(entry, np.cumsum(sizes)[:-1], axis=-1)
        for name, part in zip(row.tensors, parts, strict=True):
            tensor = part if row.axes is None else part.transpose(np.argsort(row.axes))
            yield name.replace(LAYER, str(layer)), tensor[(None,) * row.leading]

    def _iter_shapes(self, values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
        for name, tensor in self._iter_tensors(values):
            yield name, 4 * tensor.size


def plan_hf_export(checkpoint: Checkpoint, specs: Mapping[str, LeafSpec]) -> WeightFormat:
    """Return how a checkpoint with these weights becomes a folder of Hugging Face.

    Raises ConfigError, with what to use in its place, where no family is what the model is.
    """
    document = read_config_document(checkpoint.run_dir, find_attempt(checkpoint).get("drift", ()))
    config: Config = validate_options(Config, document)
    model: Any = config.model
    if not isinstance(model, Gpt | Vit | HfModel):
        raise ConfigError(
            f"--to hf: model={model.kind} is in no family of Hugging Face; {', '.join(FAMILIES)} are, from model=gpt "
            "and model=vit; use --to safetensors"
        )
    option = model.network if isinstance(model, HfModel) else model
    shape = model.shape if isinstance(model, HfModel) else None
    try:
        family = choose_family(option) if shape is None else shape.family
    except ValueError as error:
        raise ConfigError(f"--to hf: {error}; use --to safetensors for this run") from None
    rows = {row.leaf for row in FAMILIES[family].rows}
    if foreign := sorted(set(specs) - rows):
        raise ConfigError(
            f"--to hf: {foreign[0]} is nothing that {family} has ({len(foreign)} of these); use --to safetensors"
        )
    inputs = _find_inputs(checkpoint, shape, option)
    made = write_config(option, family, _count_outputs(specs), inputs)
    pixels = None if shape is None else shape.pixels
    preprocessor = write_preprocessor(inputs, pixels) if isinstance(option, Vit) else None
    tokenizer = _list_tokenizer_files(checkpoint)
    made |= _find_special_tokens(tokenizer) if isinstance(option, Gpt) else {}
    # Read in the order of the page: the class is what a person calls.
    auto = "AutoModelForCausalLM" if isinstance(option, Gpt) else "AutoModelForImageClassification"
    return WeightFormat(
        WEIGHTS,
        HfExport(option, family, made, tokenizer, preprocessor).write,
        f"from transformers import {auto}",
        f'{auto}.from_pretrained(".")',
        makes_model=True,
        head=("---", "library_name: transformers", "tags: [holdfast]", "---", ""),
    )


def _split_shards(sizes: Iterator[tuple[str, int]], limit: int | None = None) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file, none of which is larger than a shard may be."""
    limit = SHARD_BYTES if limit is None else limit
    names: list[str] = []
    filled = 0
    for name, size in sizes:
        if names and filled + size > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def find_widths(option: Gpt | Vit) -> list[int]:
    """Return how many numbers the queries, the keys and the values of a layer have."""
    if isinstance(option, Vit):
        return [option.width] * 3
    shared = (option.num_kv_heads or option.num_heads) * option.head_size
    return [option.num_heads * option.head_size, shared, shared]


def _count_outputs(specs: Mapping[str, LeafSpec]) -> int:
    """Return the size of the vocabulary, or the number of classes, by the arrays that have it."""
    if embedding := specs.get("params.embed.embedding"):
        return embedding.shape[0]
    return specs["params.head.kernel"].shape[-1]


def _find_inputs(checkpoint: Checkpoint, shape: HfShape | None, option: Gpt | Vit) -> tuple[int, ...]:
    """Return the shape of one example. Raises ConfigError where nothing says it, or an image is no square."""
    inputs = () if shape is None else shape.image
    if not inputs:
        record = read_data_record(checkpoint.run_dir)
        inputs = tuple((record or {}).get("inputs", ()))
    if not inputs or (isinstance(option, Vit) and inputs[0] != inputs[1]):
        raise ConfigError(
            f"--to hf: the examples have the shape {list(inputs)}; images of the family vit are square; use "
            "--to safetensors"
        )
    return inputs


def _list_tokenizer_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the files of the tokenizer that a run keeps; none where it trains on bytes, or on tokens of others."""
    folder = checkpoint.run_dir.tokenizer
    # Not what a link leads to: somebody else may have made the run.
    found = [path for path in folder.glob("*") if path.is_file() and not path.is_symlink()]
    return tuple(sorted(found))


def _find_special_tokens(tokenizer: tuple[Path, ...]) -> dict[str, int]:
    """Return the numbers of the tokens that begin and end a text, where the files of a tokenizer name them."""
    named = {path.name: path for path in tokenizer}
    if not {"tokenizer.json", "tokenizer_config.json"} <= named.keys():
        return {}
    try:
        said = json.loads(named["tokenizer_config.json"].read_text())
        added = json.loads(named["tokenizer.json"].read_text()).get("added_tokens", [])
        numbers = {token["content"]: token["id"] for token in added}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    found = {}
    for kind in ("bos", "eos"):
        token = said.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in numbers:
            found[f"{kind}_token_id"] = numbers[token]
    return found
