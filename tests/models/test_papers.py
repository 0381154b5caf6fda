"""Known models in our options: as many parameters as their papers and releases say. Nothing is allocated."""

from __future__ import annotations

import math

import jax
import pytest
from flax import nnx

from models import Gpt, Model, Resnet, Vit

GPT2 = Gpt(
    **{"num_layers": 12, "num_heads": 12, "width": 768, "hidden": 3072, "context": 1024, "norm_epsilon": 1e-5},
    **{"activation": "gelu", "norm": "layernorm", "positions": "learned", "biases": True},
)
LLAMA2 = {"num_layers": 32, "num_heads": 32, "width": 4096, "activation": "swiglu", "tied": False}
MISTRAL = {**LLAMA2, "num_kv_heads": 8, "hidden": 14336, "norm_epsilon": 1e-5}
RESNET18 = Resnet(stages=(2, 2, 2, 2), width=64, stem="imagenet")
RESNET34 = Resnet(stages=(3, 4, 6, 3), width=64, stem="imagenet")
VIT_B16 = Vit(patch_size=16, num_layers=12, num_heads=12, width=768, hidden=3072, positions="learned", pool="cls")
PHOTOGRAPH = (224, 224, 3)


@pytest.mark.parametrize(
    ("option", "inputs", "num_outputs", "expected"),
    [
        pytest.param(GPT2, (1024,), 50257, 124_439_808, id="GPT-2 small"),
        pytest.param(Gpt(**LLAMA2, hidden=11008, norm_epsilon=1e-5), (4096,), 32000, 6_738_415_616, id="Llama 2 7B"),
        pytest.param(Gpt(**MISTRAL), (4096,), 32000, 7_241_732_096, id="Mistral 7B"),
        pytest.param(RESNET18, PHOTOGRAPH, 1000, 11_689_512, id="ResNet-18"),
        pytest.param(RESNET34, PHOTOGRAPH, 1000, 21_797_672, id="ResNet-34"),
        pytest.param(VIT_B16, PHOTOGRAPH, 1000, 86_567_656, id="ViT-B/16"),
    ],
)
def test_a_known_model_has_its_number_of_parameters(
    option: Model, inputs: tuple[int, ...], num_outputs: int, expected: int
) -> None:
    model = nnx.eval_shape(lambda: option.build(inputs, num_outputs, nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == expected
