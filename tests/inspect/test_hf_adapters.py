"""Adapters of a model that came from Hugging Face, as PEFT adds them to that model: by its names, in its shapes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from models import Gpt, HfModel, HfShape
from runner.inspect.hf_adapters import PREFIX, name_as_hf
from tests.conftest import Door
from tests.hf_folders import write_llama
from tests.inspect.test_tuned_runs import export
from tests.session.test_hf_start import WORDS


@pytest.mark.forked(quick=True)
def test_they_make_of_the_folder_what_was_trained(door: Door) -> None:
    """PEFT computes W + alpha / rank · BA for each module that it is told: that is the model that is exported."""
    folder = write_llama(door.cwd / "base")
    done = door.run(
        *WORDS, "tune=lora", "tune.rank=2", "tune.alpha=6", "tune.targets=[qkv,attn_out,ffn_*]", "optim.lr=0.05"
    )
    assert done.returncode == 0, done.stderr
    adapters = export(door.the_run, door.cwd / "adapters", "peft")
    export(door.the_run, door.cwd / "whole", "hf")
    before, after = (load_file(each / "model.safetensors") for each in (folder, door.cwd / "whole"))
    told = json.loads((door.cwd / "adapters/adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "base"
    assert told["task_type"] == "CAUSAL_LM"
    assert not told["fan_in_fan_out"]
    modules = told["target_modules"]
    assert len(modules) == 2 * 7
    assert len(adapters) == 2 * len(modules)
    for module in modules:
        a, b = (adapters[f"{PREFIX}{module}.lora_{each}.weight"] for each in "AB")
        merged = before[f"{module}.weight"] + 6 / 2 * b @ a
        assert np.abs(merged - before[f"{module}.weight"]).max() > 1e-3, module
        np.testing.assert_allclose(merged, after[f"{module}.weight"], atol=1e-6, err_msg=module)


def test_a_matrix_of_gpt2_has_its_inputs_first() -> None:
    """Its queries, keys and values are one module, whose adapter PEFT transposes when it is told so."""
    network = Gpt(num_layers=1, num_heads=2, width=8, hidden=16, positions="learned", biases=True)
    model: Any = HfModel(shape=HfShape(family="gpt2", network=network, vocab=10))
    layer, a, b = "blocks.0.attention.qkv", np.ones((2, 8)), np.ones((24, 2))
    arrays = {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
    renamed, told = name_as_hf(arrays, {"target_modules": [layer], "base_model_name_or_path": "hf:x"}, model)
    assert told["fan_in_fan_out"]
    assert told["target_modules"] == ["transformer.h.0.attn.c_attn"]
    assert {name: value.shape for name, value in renamed.items()} == {
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight": (2, 8),
        f"{PREFIX}transformer.h.0.attn.c_attn.lora_B.weight": (24, 2),
    }
