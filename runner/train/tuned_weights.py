"""The weights of a run that trained a part of a model (`tune=`): whole, or its adapters alone in the layout of PEFT.

Nothing of the model is built: names, shapes and the configuration say how the parts belong together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.adapters import merge_adapters
from runner.checkpoint.arrays import read_leaf_specs, read_leaves
from runner.checkpoint.frozen_base import list_frozen, open_tuned_base
from runner.checkpoint.record import STATE
from runner.config.schema import Config, read_document, validate_options
from runner.config.tune import LoraTune
from runner.errors import ConfigError
from runner.train.frozen_layers import iter_paths, join_frozen, nest_paths
from runner.train.tune_model import choose_frozen, find_trained, is_adapter, name_layers
from runner.types import JsonObject

Arrays = dict[str, np.ndarray]
# What PEFT puts before the name of a module.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TunedWeights:
    """What a checkpoint and its base have, each by the path of the parameter.

    Attributes:
        trained: the parameters that train, or their average.
        frozen: those that do not.
        beside: what lasts beside parameters, by its name in the checkpoint.
    """

    trained: Arrays
    frozen: Arrays
    beside: Arrays


def read_tuned_weights(checkpoint: Path, base: Path, part: str) -> TunedWeights:
    """Read the weights of a checkpoint; `part` is `params`, or `ema` for the average of what trains."""
    names = list(read_leaf_specs(checkpoint / STATE))
    wanted = [name for name in names if name.startswith((f"{part}.", "extra."))]
    own = read_leaves(checkpoint / STATE, wanted)
    return TunedWeights(
        _cut_prefix(own, f"{part}."),
        _cut_prefix(read_leaves(base / STATE, list_frozen(base)), "frozen."),
        {name: value for name, value in own.items() if name.startswith("extra.")},
    )


def merge_whole(tuned: TunedWeights, config: Config) -> Arrays:
    """Return every weight of the model under the name it has where all of it trains, adapters added to their kernels.

    They are added in float32, and rounded to the type of the kernel.
    """
    whole = _join_parts(tuned, config)
    if isinstance(config.tune, LoraTune):
        whole = merge_adapters(whole, config.tune.scale)
    return {**{f"params.{path}": np.asarray(leaf) for path, leaf in iter_paths(whole)}, **tuned.beside}


def _join_parts(tuned: TunedWeights, config: Config) -> dict[str, Any]:
    """Return every parameter in one tree, adapters beside their kernels."""
    shapes = {**_abstract(tuned.frozen), **_abstract(tuned.trained)}
    for path in tuned.trained.keys() & tuned.frozen.keys():
        # Layers of one stack, of which some train.
        train, still = tuned.trained[path], tuned.frozen[path]
        shapes[path] = _Shape((len(train) + len(still), *train.shape[1:]))
    frozen = choose_frozen(config, nest_paths(shapes))
    return join_frozen(nest_paths(tuned.trained), nest_paths(tuned.frozen), frozen)


def read_whole_weights(checkpoint: Path) -> Arrays | None:
    """Return every weight of a checkpoint of which a part was trained, as `merge_whole` does; None for any other.

    Raises LostBaseError, and RefusedError where its run has no configuration that says how they belong together.
    """
    if (base := open_tuned_base(checkpoint)) is None:
        return None
    document = read_document(checkpoint.parent.parent / "config.yaml")
    return merge_whole(read_tuned_weights(checkpoint, base, "params"), validate_options(Config, document))


def format_peft(tuned: TunedWeights, config: Config) -> tuple[Arrays, JsonObject]:
    """Return adapters as PEFT lays them out: arrays of adapter_model.safetensors, and adapter_config.json.

    A is [rank, inputs] and B [outputs, rank] there; layers of a stack have numbers, `blocks.0.attention.qkv`. Names
    are ours. What `tune.train` names beside the adapters are its `modules_to_save`.

    Raises ConfigError where there are no adapters, or where `tune.train` names a part of a module alone.
    """
    tune = config.tune
    if not isinstance(tune, LoraTune):
        raise ConfigError(f"--to peft: tune={tune.kind} trains no adapters; choose another format")
    saved = _list_saved_modules(tuned, config, tune) if tune.train else {}
    layers = sorted({path.rpartition(".")[0] for path in tuned.trained if is_adapter(path)})
    arrays: Arrays = {
        f"{PEFT_PREFIX}{module}.{name}": value for module, leaves in saved.items() for name, value in leaves.items()
    }
    targets = []
    for layer in layers:
        a, b = tuned.trained[f"{layer}.lora_a"], tuned.trained[f"{layer}.lora_b"]
        stack = a.ndim + b.ndim - 2 - tuned.frozen[f"{layer}.kernel"].ndim
        a = a.reshape(*a.shape[:stack], -1, tune.rank)
        b = b.reshape(*b.shape[:stack], tune.rank, -1)
        for place in np.ndindex(a.shape[:stack]):
            first, _, rest = layer.partition(".")
            name = ".".join([first, *map(str, place), *([rest] if rest else [])])
            targets.append(name)
            # As arrays of their own: safetensors writes what lies in memory.
            arrays[f"{PEFT_PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a[place].T)
            arrays[f"{PEFT_PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b[place].T)
    return arrays, {
        "peft_type": "LORA",
        "r": tune.rank,
        "lora_alpha": tune.alpha,
        "use_rslora": tune.rslora,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted(saved) or None,
        "target_modules": targets,
        "task_type": None,
        "base_model_name_or_path": config.init_from.run,
    }


def _list_saved_modules(tuned: TunedWeights, config: Config, tune: LoraTune) -> dict[str, Arrays]:
    """Return each module that trains whole beside the adapters, by its name, with its arrays as PyTorch has them.

    Raises ConfigError where a part of a module trains alone.
    """
    whole = {path: np.asarray(leaf) for path, leaf in iter_paths(_join_parts(tuned, config))}
    adapted = {path.rpartition(".")[0] for path in whole if is_adapter(path)}
    chosen = find_trained(tune.train, {path: value.shape for path, value in whole.items() if not is_adapter(path)})
    saved: dict[str, Arrays] = {}
    halves: set[str] = set()
    for path, value in whole.items():
        names, layers = name_layers(path, value.shape), chosen.get(path, ())
        for at, (name, entry) in enumerate(zip(names, value, strict=True) if names else [(path, value)]):
            module, _, leaf = name.rpartition(".")
            if (layers is not None and at not in layers) or path.rpartition(".")[0] in adapted:
                halves.add(module)
            if path in chosen and (layers is None or at in layers):
                saved.setdefault(module, {}).update(_lay_out_as_torch(module, leaf, entry))
    if odd := sorted(saved.keys() & halves):
        raise ConfigError(
            f"--to peft: tune.train names a part of {odd[0]} alone, or it has an adapter as well; PEFT keeps whole "
            "modules beside adapters: use --to safetensors"
        )
    return saved


def _lay_out_as_torch(module: str, leaf: str, value: np.ndarray) -> Arrays:
    """Return an array of a linear layer, a norm or an embedding as PyTorch has it. Raises ConfigError for any other."""
    name = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}.get(leaf)
    if name is None or not module or value.ndim != (2 if leaf in ("kernel", "embedding") else 1):
        raise ConfigError(
            f"--to peft: {module}.{leaf} is of no linear layer, norm or embedding, and trains beside the adapters; use "
            "--to safetensors"
        )
    return {name: np.ascontiguousarray(value.T if leaf == "kernel" else value)}


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


def _abstract(values: Arrays) -> dict[str, Any]:
    return {path: _Shape(value.shape) for path, value in values.items()}


def _cut_prefix(values: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): np.asarray(value) for name, value in values.items() if name.startswith(prefix)}


def count_values(values: Mapping[str, np.ndarray]) -> int:
    """Return how many numbers there are in all."""
    return sum(math.prod(value.shape) for value in values.values())
