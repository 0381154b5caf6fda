"""The transformers against independent ones: written here from the papers in float64, and those of `transformers`.

The second kind needs torch, which is no dependency: where it is not installed, these tests are skipped.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from models import Gpt, Model, Vit
from tests.fresh import fresh

GPT2 = Gpt(
    **{"num_layers": 3, "num_heads": 4, "width": 32, "hidden": 96, "context": 24, "norm_epsilon": 1e-5},
    **{"activation": "gelu", "norm": "layernorm", "positions": "learned", "biases": True},
)
LLAMA = Gpt(
    **{"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "width": 32, "hidden": 80, "norm_epsilon": 1e-5},
    **{"activation": "swiglu", "tied": False, "rotary_base": 500.0},
)
DEFAULT = Gpt(num_layers=3, num_heads=4, width=32, hidden=96)
VIT = Vit(num_layers=3, num_heads=4, width=32, hidden=96, patch_size=4, positions="learned", pool="cls")
VOCAB, SEQ, CLASSES, EPSILON = 61, 24, 7, 1e-6
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, SEQ))
IMAGES = np.random.default_rng(1).random((2, 12, 8, 3), np.float32)
GPTS = pytest.mark.parametrize("option", [GPT2, LLAMA, DEFAULT], ids=["gpt2", "llama", "default"])

Tree = dict[str, Any]


def ours(option: Model) -> tuple[Tree, np.ndarray]:
    """Random weights, biases and scales also, and what our model makes of the examples with them."""
    inputs, num_outputs = ((SEQ,), VOCAB) if isinstance(option, Gpt) else (IMAGES.shape[1:], CLASSES)
    graphdef, params, rest = fresh(option, inputs, num_outputs, 0.25)
    batch = jnp.asarray(TOKENS if isinstance(option, Gpt) else IMAGES)
    with jax.default_matmul_precision("highest"):
        out = np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params, rest, copy=True)(batch))(params))
    assert out.std() > 0.1  # there is something to compare
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params)), out


# The papers, in float64.


def layer_norm(x: np.ndarray, p: Tree, epsilon: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def rms_norm(x: np.ndarray, p: Tree, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"]


def linear(x: np.ndarray, p: Tree) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0.0)


def rotated(x: np.ndarray, base: float) -> np.ndarray:
    """Each pair (i, i + half) of a head as a complex number, turned by position × base^(−i / half)."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * np.arange(x.shape[0])[:, None] * base ** (-np.arange(half) / half))
    turned = (x[:, :half] + 1j * x[:, half:]) * turn
    return np.concatenate([turned.real, turned.imag], -1)


def attention(x: np.ndarray, p: Tree, heads: int, kv_heads: int, base: float | None, *, causal: bool) -> np.ndarray:
    """One example, one head after the other."""
    seq, width = x.shape
    size = width // heads
    parts = np.split(linear(x, p["qkv"]), np.arange(1, heads + 2 * kv_heads) * size, axis=-1)
    mixed = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        q, k, v = parts[head], parts[heads + shared], parts[heads + kv_heads + shared]
        if base is not None:
            q, k = rotated(q, base), rotated(k, base)
        weights = np.exp(q @ k.T / math.sqrt(size))
        if causal:
            weights = weights * np.tri(seq)
        mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
    return linear(np.concatenate(mixed, -1), p["out"])


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gpt(option: Gpt, params: Tree, tokens: np.ndarray) -> np.ndarray:
    norm = layer_norm if option.norm == "layernorm" else rms_norm
    base = option.rotary_base if option.positions == "rotary" else None
    x = params["embed"]["embedding"][tokens]
    if base is None:
        x = x + params["positions"]["embedding"][: len(tokens)]
    for layer in range(option.num_layers):
        p = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
        normed = norm(x, p["norm_attention"], option.norm_epsilon)
        kv_heads = option.num_kv_heads or option.num_heads
        x = x + attention(normed, p["attention"], option.num_heads, kv_heads, base, causal=True)
        up = linear(normed := norm(x, p["norm_ffn"], option.norm_epsilon), p["ffn"]["up"])
        if option.activation == "swiglu":
            gate = linear(normed, p["ffn"]["gate"])
            up = up * gate / (1 + np.exp(-gate))
        else:
            up = gelu_tanh(up) if option.activation == "gelu" else np.maximum(up, 0) ** 2
        x = x + linear(up, p["ffn"]["down"])
    x = norm(x, params["norm"], option.norm_epsilon)
    return x @ params["embed"]["embedding"].T if option.tied else linear(x, params["head"])


def vit(option: Vit, params: Tree, image: np.ndarray) -> np.ndarray:
    side = option.patch_size
    kernel = params["patches"]["kernel"].reshape(-1, option.width)
    patches = [
        image[row : row + side, column : column + side].reshape(-1)
        for row in range(0, image.shape[0], side)
        for column in range(0, image.shape[1], side)
    ]
    x = np.stack(patches) @ kernel + params["patches"]["bias"]
    x = np.concatenate([params["cls"][0], x]) + params["positions"]
    for layer in range(option.num_layers):
        p = jax.tree.map(lambda leaf: leaf[layer], params["blocks"])  # noqa: B023
        normed = layer_norm(x, p["norm_attention"], EPSILON)
        x = x + attention(normed, p["attention"], option.num_heads, option.num_heads, None, causal=False)
        up = linear(layer_norm(x, p["norm_ffn"], EPSILON), p["ffn"]["up"])
        x = x + linear(up * 0.5 * (1 + erf(up / math.sqrt(2))), p["ffn"]["down"])
    return linear(layer_norm(x[0], params["norm"], EPSILON), params["head"])


@GPTS
def test_gpt_is_what_the_papers_say(option: Gpt) -> None:
    params, out = ours(option)
    np.testing.assert_allclose(out, [gpt(option, params, row) for row in TOKENS], atol=1e-4)


def test_vit_is_what_the_paper_says() -> None:
    params, out = ours(VIT)
    np.testing.assert_allclose(out, [vit(VIT, params, image) for image in IMAGES.astype(np.float64)], atol=1e-4)


# `transformers`, with the same weights.

WANTS = "a comparison with another library, run where it is: pip install torch transformers"


def theirs(model: Any, weights: dict[str, np.ndarray], batch: np.ndarray) -> np.ndarray:
    """What a model of theirs makes of a batch, with all of its weights replaced."""
    torch = pytest.importorskip("torch", reason=WANTS)
    missing, unexpected = model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # the one that is tied to the embedding
    with torch.no_grad():
        return model.double().eval()(torch.tensor(batch)).logits.numpy()


def layers(blocks: Tree, count: int, prefix: str, names: dict[str, str], *, flip: bool) -> dict[str, np.ndarray]:
    """Stacked layers one by one, by their names; `flip`: theirs are (outputs, inputs)."""
    found = {}
    for name, path in names.items():
        leaf = blocks
        for key in path.split("."):
            leaf = leaf[key]
        for layer in range(count):
            found[f"{prefix}.{layer}.{name}"] = leaf[layer].T if flip else leaf[layer]
    return found


def pairs(names: dict[str, str]) -> dict[str, str]:
    """`kernel` and `bias` of linear maps."""
    return {
        f"{name}.{w}": f"{path}.{k}" for name, path in names.items() for w, k in (("weight", "kernel"), ("bias",) * 2)
    }


def norms(names: dict[str, str]) -> dict[str, str]:
    return {
        f"{name}.{w}": f"{path}.{k}" for name, path in names.items() for w, k in (("weight", "scale"), ("bias",) * 2)
    }


def split_heads(blocks: Tree, sizes: list[int]) -> Tree:
    """The same with `q`, `k`, `v` beside `qkv`."""
    qkv = {name: np.split(leaf, np.cumsum(sizes)[:-1], axis=-1) for name, leaf in blocks["attention"]["qkv"].items()}
    apart = {part: {name: leaf[i] for name, leaf in qkv.items()} for i, part in enumerate("qkv")}
    return {**blocks, "attention": {**blocks["attention"], **apart}}


def test_gpt2_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason=WANTS)
    pytest.importorskip("torch", reason=WANTS)
    params, out = ours(GPT2)
    config = transformers.GPT2Config(
        **{"n_layer": GPT2.num_layers, "n_head": GPT2.num_heads, "n_embd": GPT2.width, "n_inner": GPT2.hidden},
        **{"n_positions": GPT2.context, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0},
    )
    linears = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out"}
    names = pairs({**linears, "mlp.c_fc": "ffn.up", "mlp.c_proj": "ffn.down"})
    names |= norms({"ln_1": "norm_attention", "ln_2": "norm_ffn"})
    weights = {
        "transformer.wte.weight": params["embed"]["embedding"],
        "transformer.wpe.weight": params["positions"]["embedding"],
        "transformer.ln_f.weight": params["norm"]["scale"],
        "transformer.ln_f.bias": params["norm"]["bias"],
        **layers(params["blocks"], GPT2.num_layers, "transformer.h", names, flip=False),
    }
    np.testing.assert_allclose(out, theirs(transformers.GPT2LMHeadModel(config), weights, TOKENS), atol=1e-4)


def test_llama_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason=WANTS)
    pytest.importorskip("torch", reason=WANTS)
    params, out = ours(LLAMA)
    kv_heads, size = LLAMA.num_kv_heads or 0, LLAMA.width // LLAMA.num_heads
    config = transformers.LlamaConfig(
        **{"num_hidden_layers": LLAMA.num_layers, "num_attention_heads": LLAMA.num_heads, "vocab_size": VOCAB},
        **{"num_key_value_heads": kv_heads, "hidden_size": LLAMA.width, "intermediate_size": LLAMA.hidden},
        **{"rms_norm_eps": LLAMA.norm_epsilon, "tie_word_embeddings": False},
        rope_parameters={"rope_type": "default", "rope_theta": LLAMA.rotary_base},
    )
    linears = {f"self_attn.{part}_proj": f"attention.{part}" for part in "qkv"} | {"self_attn.o_proj": "attention.out"}
    linears |= {f"mlp.{part}_proj": f"ffn.{part}" for part in ("gate", "up", "down")}
    names = {f"{name}.weight": f"{path}.kernel" for name, path in linears.items()}
    names |= {"input_layernorm.weight": "norm_attention.scale", "post_attention_layernorm.weight": "norm_ffn.scale"}
    blocks = split_heads(params["blocks"], [LLAMA.width, kv_heads * size, kv_heads * size])
    weights = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
        "lm_head.weight": params["head"]["kernel"].T,
        **layers(blocks, LLAMA.num_layers, "model.layers", names, flip=True),
    }
    np.testing.assert_allclose(out, theirs(transformers.LlamaForCausalLM(config), weights, TOKENS), atol=1e-4)


def test_vit_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason=WANTS)
    pytest.importorskip("torch", reason=WANTS)
    params, out = ours(VIT)
    config = transformers.ViTConfig(
        **{"num_hidden_layers": VIT.num_layers, "num_attention_heads": VIT.num_heads, "hidden_size": VIT.width},
        **{"intermediate_size": VIT.hidden, "image_size": IMAGES.shape[1:3], "patch_size": VIT.patch_size},
        **{"num_channels": IMAGES.shape[3], "num_labels": CLASSES, "layer_norm_eps": EPSILON},
    )
    linears = {f"attention.{part}_proj": f"attention.{part}" for part in "qkv"} | {"attention.o_proj": "attention.out"}
    names = pairs({**linears, "mlp.fc1": "ffn.up", "mlp.fc2": "ffn.down"})
    names |= norms({"layernorm_before": "norm_attention", "layernorm_after": "norm_ffn"})
    projection = "vit.embeddings.patch_embeddings.projection"
    weights = {
        "vit.embeddings.cls_token": params["cls"],
        "vit.embeddings.position_embeddings": params["positions"][None],
        f"{projection}.weight": params["patches"]["kernel"].transpose(3, 2, 0, 1),
        f"{projection}.bias": params["patches"]["bias"],
        "vit.layernorm.weight": params["norm"]["scale"],
        "vit.layernorm.bias": params["norm"]["bias"],
        "classifier.weight": params["head"]["kernel"].T,
        "classifier.bias": params["head"]["bias"],
        **layers(split_heads(params["blocks"], [VIT.width] * 3), VIT.num_layers, "vit.layers", names, flip=True),
    }
    pixels = IMAGES.transpose(0, 3, 1, 2).astype(np.float64)
    np.testing.assert_allclose(out, theirs(transformers.ViTForImageClassification(config), weights, pixels), atol=1e-4)
