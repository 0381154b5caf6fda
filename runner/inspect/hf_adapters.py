"""Give adapters of a Hugging Face model the names and the shapes that PEFT gives them there.

One layer of ours may be several of theirs: queries, keys and values have one A, and each its rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from models import Gpt, HfModel, Vit
from models.hf_families import FAMILIES, LAYER, NameRow
from runner.inspect.export_hf import find_widths
from runner.types import JsonObject

# What PEFT puts before the name of a module, and what it calls the two matrices of one.
PREFIX = "base_model.model."
MATRICES = ("lora_A", "lora_B")


def name_as_hf(
    arrays: Mapping[str, np.ndarray], description: JsonObject, model: HfModel
) -> tuple[dict[str, np.ndarray], JsonObject]:
    """Return the arrays of adapter_model.safetensors and its adapter_config.json for the folder the model came from.

    Args:
        arrays: A, [rank, inputs], and B, [outputs, rank], of each layer, by our names with those of layers numbered,
            and of modules that trained whole their `weight` and their `bias`.
        description: adapter_config.json with our names.
        model: which family it is of, and its shape.
    """
    assert model.shape is not None, "a run writes it down when it begins"
    network, family = model.network, FAMILIES[model.shape.family]
    rows = {row.leaf: row for row in family.rows}
    renamed, modules = {}, list[str]()
    for layer in description["target_modules"]:
        names = _name_modules(rows[f"params.{_cut_number(layer)}.kernel"], layer)
        a, b = (arrays[f"{PREFIX}{layer}.{matrix}.weight"] for matrix in MATRICES)
        for name, part in zip(names, _split_outputs(b, names, network), strict=True):
            renamed.update({f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": part})
        modules += names
    saved: set[str] = set()
    for layer in description.get("modules_to_save") or ():
        found = _rename_module(layer, arrays, rows, network)
        renamed.update({f"{PREFIX}{name}": value for name, value in found.items()})
        saved |= {name.rpartition(".")[0] for name in found}
    return renamed, {
        **description,
        "target_modules": modules,
        "modules_to_save": sorted(saved) or None,
        "task_type": "CAUSAL_LM" if isinstance(network, Gpt) else None,
        # A matrix of gpt2 has its inputs first.
        "fan_in_fan_out": model.shape.family == "gpt2",
        "base_model_name_or_path": (description["base_model_name_or_path"] or "").removeprefix("hf:") or None,
    }


def _rename_module(
    layer: str, arrays: Mapping[str, np.ndarray], rows: Mapping[str, NameRow], network: Gpt | Vit
) -> dict[str, np.ndarray]:
    """Return the tensors of a module that trained whole, by their names there."""
    found: dict[str, np.ndarray] = {}
    for leaf, own in (("kernel", "weight"), ("scale", "weight"), ("embedding", "weight"), ("bias", "bias")):
        row, value = rows.get(f"params.{_cut_number(layer)}.{leaf}"), arrays.get(f"{PREFIX}{layer}.{own}")
        if row is None or value is None:
            continue
        names = _name_modules(row, layer)
        for name, part in zip(names, _split_outputs(value, names, network), strict=True):
            # In the order that the family has.
            found[f"{name}.{own}"] = np.ascontiguousarray(part.T) if leaf == "kernel" and row.axes is None else part
        if leaf == "embedding" and layer == "embed" and getattr(network, "tied", False):
            # What is tied is one array there, of which PEFT would train and keep one side alone.
            found["lm_head.weight"] = value
    return found


def _name_modules(row: NameRow, layer: str) -> list[str]:
    """Return the modules there that a layer of ours is made of."""
    number = "".join(part for part in layer.split(".") if part.isdecimal())
    return [tensor.rpartition(".")[0].replace(LAYER, number) for tensor in row.tensors]


def _cut_number(layer: str) -> str:
    return ".".join(part for part in layer.split(".") if not part.isdecimal())


def _split_outputs(value: np.ndarray, names: Sequence[str], network: Gpt | Vit) -> list[np.ndarray]:
    """Return the part of each module, along the first dimension."""
    widths = find_widths(network) if len(names) > 1 else [len(value)]
    return [np.ascontiguousarray(part) for part in np.split(value, np.cumsum(widths)[:-1])]
