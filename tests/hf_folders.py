"""Folders of Hugging Face for tests: tiny random models that transformers makes and saves, and one made without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

VOCAB, SEQ, CLASSES, SIDE = 61, 24, 7, 12
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
GPT2 = {
    **{"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 64, "vocab_size": VOCAB},
    **{"bos_token_id": None, "eos_token_id": None},
}
# The name of a test, what transformers calls it, and its configuration.
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "activation_function": "gelu", "n_inner": 40}),
    "llama2": ("Llama", {**SIZES, "rms_norm_eps": 1e-5}),
    "llama3": (
        "Llama",
        {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 32}),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
    "vit": (
        "ViT",
        {
            **{key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
            **{"num_attention_heads": 4, "image_size": SIDE, "patch_size": 4, "num_labels": CLASSES},
        },
    ),
}
WANTS = "a comparison with another library, run where it is: pip install torch transformers"


def make_theirs(name: str) -> Any:
    """Return a model of transformers with random weights, norms and biases among them, the same each time."""
    torch = pytest.importorskip("torch", reason=WANTS)
    transformers = pytest.importorskip("transformers", reason=WANTS)
    family, fields = MADE[name]
    head = {"GPT2": "LMHeadModel", "ViT": "ForImageClassification"}.get(family, "ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


def make_batch(name: str) -> np.ndarray:
    """Return what a model is given: tokens, or images of height × width × channels."""
    generator = np.random.default_rng(1)
    return generator.random((2, SIDE, SIDE, 3), np.float32) if name == "vit" else generator.integers(0, VOCAB, (2, SEQ))


def compute_theirs(model: Any, batch: np.ndarray) -> np.ndarray:
    """Return the logits of a model of transformers."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(batch if batch.ndim == 2 else batch.transpose(0, 3, 1, 2))).logits.numpy()


def write_llama(folder: Path, *, vocab: int = 256, layers: int = 2, seed: int = 0, **fields: Any) -> Path:
    """Write a small llama, without transformers; the same each time for one seed."""
    width, hidden, heads, shared = 16, 24, 4, 2
    size = width // heads
    generator = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width), "model.norm": (width,)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {
            **{f"{start}.self_attn.q_proj": (width, width), f"{start}.self_attn.o_proj": (width, width)},
            **{f"{start}.self_attn.{part}_proj": (shared * size, width) for part in "kv"},
            **{f"{start}.mlp.{part}_proj": (hidden, width) for part in ("gate", "up")},
            **{f"{start}.mlp.down_proj": (width, hidden)},
            **{f"{start}.{name}_layernorm": (width,) for name in ("input", "post_attention")},
        }
    tensors = {
        f"{name}.weight": (generator.normal(size=shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }
    config = {
        **{"model_type": "llama", "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": shared, "vocab_size": vocab, "rms_norm_eps": 1e-5},
        **fields,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path, corpus: Path) -> int:
    """Write a tokenizer of about 300 tokens, and return of how many."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train([str(corpus)], trainer)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return int(made.get_vocab_size())
