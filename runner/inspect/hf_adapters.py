"""Give adapters of a Hugging Face model the names and the shapes that PEFT gives them there.

One layer of ours may be several of theirs: queries, keys and values have one A, and each its rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from models import Gpt, HfModel
from models.hf_families import FAMILIES, LAYER
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
        arrays: A, [rank, inputs], and B, [outputs, rank], of each layer, by our names with those of layers numbered.
        description: adapter_config.json with our names.
        model: which family it is of, and its shape.
    """
    assert model.shape is not None, "a run writes it down when it begins"
    network, family = model.network, FAMILIES[model.shape.family]
    rows = {row.leaf: row.tensors for row in family.rows}
    renamed, modules = {}, list[str]()
    for layer in description["target_modules"]:
        numbers = [part for part in layer.split(".") if part.isdecimal()]
        leaf = ".".join(["params", *(part for part in layer.split(".") if not part.isdecimal()), "kernel"])
        names = [tensor.removesuffix(".weight").replace(LAYER, "".join(numbers)) for tensor in rows[leaf]]
        a, b = (arrays[f"{PREFIX}{layer}.{matrix}.weight"] for matrix in MATRICES)
        widths = find_widths(network) if len(names) > 1 else [len(b)]
        for name, part in zip(names, np.split(b, np.cumsum(widths)[:-1]), strict=True):
            renamed.update({f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": part})
        modules += names
    return renamed, {
        **description,
        "target_modules": modules,
        "task_type": "CAUSAL_LM" if isinstance(network, Gpt) else None,
        # A matrix of gpt2 has its inputs first.
        "fan_in_fan_out": model.shape.family == "gpt2",
        "base_model_name_or_path": (description["base_model_name_or_path"] or "").removeprefix("hf:") or None,
    }
