"""Adapters of a model that came from Hugging Face, as PEFT adds them to that model: by its names, in its shapes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models import Gpt, HfModel, HfShape
from runner.errors import ConfigError
from runner.inspect.hf_adapters import PREFIX, name_as_hf
from runner.inspect.load_model import load_model
from runner.train.tuned_weights import TunedWeights, format_peft
from tests.checkpoint.test_hf_weights import TOLERANCE
from tests.conftest import Door, composed
from tests.hf_folders import VOCAB, WANTS, compute_theirs, make_batch, make_theirs, write_llama
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


@pytest.mark.forked(quick=True)
def test_what_trains_whole_beside_them_is_a_module_to_save(door: Door) -> None:
    """PEFT puts these in the place of its own: they are the tensors of the model that is exported."""
    write_llama(door.cwd / "base")
    done = door.run(
        *(*WORDS, "train.steps=5", "tune=lora", "tune.rank=2", "tune.targets=[attn_out]", "optim.lr=0.05"),
        "tune.train=[norm,head,blocks.1.attention.qkv,blocks.*.norm_ffn]",
    )
    assert done.returncode == 0, done.stderr
    arrays = export(door.the_run, door.cwd / "adapters", "peft")
    export(door.the_run, door.cwd / "whole", "hf")
    after = load_file(door.cwd / "whole/model.safetensors")
    told = json.loads((door.cwd / "adapters/adapter_config.json").read_text())
    norms = [f"model.layers.{layer}.post_attention_layernorm" for layer in range(2)]
    parts = [f"model.layers.1.self_attn.{part}_proj" for part in "kqv"]
    assert told["modules_to_save"] == sorted(["lm_head", "model.norm", *norms, *parts])
    assert told["target_modules"] == [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
    for module in told["modules_to_save"]:
        np.testing.assert_array_equal(arrays[f"{PREFIX}{module}.weight"], after[f"{module}.weight"])
    assert len(arrays) == len(told["modules_to_save"]) + 2 * len(told["target_modules"])


@pytest.mark.forked(quick=True)
@pytest.mark.parametrize("family", ["gpt2", "llama3"])
def test_peft_computes_what_the_run_does(family: str, door: Door) -> None:
    """Adapters, and modules that train whole beside them, on a model that transformers has made."""
    torch, peft = (pytest.importorskip(name, reason=WANTS) for name in ("torch", "peft"))
    transformers = pytest.importorskip("transformers", reason=WANTS)
    made = make_theirs(family)
    made.save_pretrained(door.cwd / "base")
    (door.cwd / "tokens").mkdir()
    np.random.default_rng(0).integers(0, VOCAB, 4000).astype(np.uint16).tofile(door.cwd / "tokens/train.bin")
    done = door.run(
        *("model=hf", "init_from=hf:base", "data=tokens", "data.path=tokens", f"data.vocab_size={VOCAB}"),
        *("data.seq_len=16", "data.batch_size=8", "train.steps=5", "train.eval_batches=1", "log.tensorboard=false"),
        *("tune=lora", "tune.rank=2", "tune.train=[norm]", "optim.lr=0.05"),
    )
    assert done.returncode == 0, done.stderr
    export(door.the_run, door.cwd / "adapters", "peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(door.cwd / "base").eval()
    tuned = peft.PeftModel.from_pretrained(theirs, door.cwd / "adapters").eval()
    tokens = make_batch(family)
    model, _ = load_model(str(door.the_run))
    ours = np.asarray(model(jnp.asarray(tokens)))
    with torch.no_grad():
        found = tuned(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, ours, atol=TOLERANCE)
    assert np.abs(ours - compute_theirs(made, tokens)).max() > 0.01


def test_half_a_module_is_no_module_to_save() -> None:
    config: Any = composed("data=stdlib", "tune=lora", "tune.targets=[down]", "tune.train=[up,blocks.1.ffn.bias]")
    adapter = {"down.lora_a": np.zeros((4, 8)), "down.lora_b": np.zeros((8, 2))}
    trained = {**adapter, "up.kernel": np.ones((3, 4)), "blocks.ffn.bias": np.ones((1, 5))}
    frozen = {"down.kernel": np.zeros((4, 2)), "blocks.ffn.bias": np.zeros((2, 5))}
    arrays, told = format_peft(TunedWeights(trained, frozen, {}), config)
    assert told["modules_to_save"] == ["blocks.1.ffn", "up"]
    assert arrays[f"{PREFIX}up.weight"].shape == (4, 3)
    alone = {"down.kernel": np.zeros((4, 2))}
    more: Any = dataclasses.replace(config, tune=dataclasses.replace(config.tune, train=("up", "down.bias")))
    with pytest.raises(ConfigError, match="part of down alone, or it has an adapter"):
        format_peft(TunedWeights({**adapter, "up.kernel": np.ones((3, 4)), "down.bias": np.zeros(2)}, alone, {}), more)
    with pytest.raises(ConfigError, match=r"up\.scale_of_mine is of no linear layer"):
        format_peft(TunedWeights({**trained, "up.scale_of_mine": np.zeros(4)}, frozen, {}), config)
    with pytest.raises(ConfigError, match=r"part of blocks\.1\.ffn alone"):
        format_peft(TunedWeights(trained, {**frozen, "blocks.ffn.kernel": np.zeros((3, 5, 5))}, {}), config)


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
