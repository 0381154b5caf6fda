"""The families of Hugging Face models that ours can be, as tables: names of tensors, and what a config.json may say.

Everything here is data. models/hf_config.py reads and writes configurations by these tables, and
runner/checkpoint/hf_weights.py tensors. The values of fields that a config.json leaves out are those of transformers
5.24. To add a family, write a `Family` and name it in FAMILIES; where it needs a part that no model of ours has, that
part comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The place of the number of a layer in the name of a tensor.
LAYER = "{layer}"


@dataclass(frozen=True)
class NameRow:
    """Say of which tensors an array of ours is made.

    Attributes:
        leaf: its name; arrays of `blocks` have a leading dimension for the layers.
        tensors: their names; several are joined along the last dimension of ours.
        axes: their dimensions in the order that ours has; None: as they are.
        leading: how many leading dimensions of one entry they have that ours has not.
    """

    leaf: str
    tensors: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    leading: int = 0


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        architecture: the class of transformers that has these names.
        model: which of our models it is.
        prefix: what the names begin with, except in a folder of the bare model, without its output layer.
        rows: the names.
        unused: what a folder may hold besides, as regular expressions: buffers that are computed, and no weights.
        fields: of config.json, with the field of ours that each one sets.
        defaults: what is not in config.json.
        fixed: fields that have to have one of these values: with any other it is another network.
        ours: fields of ours that the family always has.
        immaterial: fields that change no number that the network computes in evaluation.
    """

    architecture: str
    model: Literal["gpt", "vit"]
    prefix: str
    rows: tuple[NameRow, ...]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any]
    unused: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    immaterial: frozenset[str] = frozenset()


def _name_linear(leaf: str, *tensors: str, flip: bool = True) -> tuple[NameRow, NameRow]:
    """Return the rows of a linear map; `flip`: their matrices are (outputs, inputs), ours (inputs, outputs)."""
    weights, biases = (tuple(f"{name}.{kind}" for name in tensors) for kind in ("weight", "bias"))
    return NameRow(f"{leaf}.kernel", weights, (1, 0) if flip else None), NameRow(f"{leaf}.bias", biases)


def _name_norm(leaf: str, tensor: str) -> tuple[NameRow, NameRow]:
    return NameRow(f"{leaf}.scale", (f"{tensor}.weight",)), NameRow(f"{leaf}.bias", (f"{tensor}.bias",))


BLOCKS = "params.blocks"
GPT2_LAYER, LLAMA_LAYER, VIT_LAYER = (f"transformer.h.{LAYER}", f"model.layers.{LAYER}", f"vit.encoder.layer.{LAYER}")

GPT2_ROWS = (
    NameRow("params.embed.embedding", ("transformer.wte.weight",)),
    NameRow("params.positions.embedding", ("transformer.wpe.weight",)),
    *_name_norm(f"{BLOCKS}.norm_attention", f"{GPT2_LAYER}.ln_1"),
    *_name_linear(f"{BLOCKS}.attention.qkv", f"{GPT2_LAYER}.attn.c_attn", flip=False),
    *_name_linear(f"{BLOCKS}.attention.out", f"{GPT2_LAYER}.attn.c_proj", flip=False),
    *_name_norm(f"{BLOCKS}.norm_ffn", f"{GPT2_LAYER}.ln_2"),
    *_name_linear(f"{BLOCKS}.ffn.up", f"{GPT2_LAYER}.mlp.c_fc", flip=False),
    *_name_linear(f"{BLOCKS}.ffn.down", f"{GPT2_LAYER}.mlp.c_proj", flip=False),
    *_name_norm("params.norm", "transformer.ln_f"),
    NameRow("params.head.kernel", ("lm_head.weight",), (1, 0)),
)
# Llama, and those that were made after it: they differ in where biases are, and in norms of queries and keys.
LLAMA_ROWS = (
    NameRow("params.embed.embedding", ("model.embed_tokens.weight",)),
    *_name_norm(f"{BLOCKS}.norm_attention", f"{LLAMA_LAYER}.input_layernorm"),
    *_name_linear(f"{BLOCKS}.attention.qkv", *(f"{LLAMA_LAYER}.self_attn.{part}_proj" for part in "qkv")),
    *_name_linear(f"{BLOCKS}.attention.out", f"{LLAMA_LAYER}.self_attn.o_proj"),
    NameRow(f"{BLOCKS}.attention.q_norm.scale", (f"{LLAMA_LAYER}.self_attn.q_norm.weight",)),
    NameRow(f"{BLOCKS}.attention.k_norm.scale", (f"{LLAMA_LAYER}.self_attn.k_norm.weight",)),
    *_name_norm(f"{BLOCKS}.norm_ffn", f"{LLAMA_LAYER}.post_attention_layernorm"),
    *_name_linear(f"{BLOCKS}.ffn.gate", f"{LLAMA_LAYER}.mlp.gate_proj"),
    *_name_linear(f"{BLOCKS}.ffn.up", f"{LLAMA_LAYER}.mlp.up_proj"),
    *_name_linear(f"{BLOCKS}.ffn.down", f"{LLAMA_LAYER}.mlp.down_proj"),
    *_name_norm("params.norm", "model.norm"),
    NameRow("params.head.kernel", ("lm_head.weight",), (1, 0)),
)
VIT_ATTENTION = f"{VIT_LAYER}.attention.attention"
VIT_ROWS = (
    NameRow("params.cls", ("vit.embeddings.cls_token",)),
    NameRow("params.positions", ("vit.embeddings.position_embeddings",), leading=1),
    NameRow("params.patches.kernel", ("vit.embeddings.patch_embeddings.projection.weight",), (2, 3, 1, 0)),
    NameRow("params.patches.bias", ("vit.embeddings.patch_embeddings.projection.bias",)),
    *_name_norm(f"{BLOCKS}.norm_attention", f"{VIT_LAYER}.layernorm_before"),
    *_name_linear(f"{BLOCKS}.attention.qkv", *(f"{VIT_ATTENTION}.{part}" for part in ("query", "key", "value"))),
    *_name_linear(f"{BLOCKS}.attention.out", f"{VIT_LAYER}.attention.output.dense"),
    *_name_norm(f"{BLOCKS}.norm_ffn", f"{VIT_LAYER}.layernorm_after"),
    *_name_linear(f"{BLOCKS}.ffn.up", f"{VIT_LAYER}.intermediate.dense"),
    *_name_linear(f"{BLOCKS}.ffn.down", f"{VIT_LAYER}.output.dense"),
    *_name_norm("params.norm", "vit.layernorm"),
    *_name_linear("params.head", "classifier"),
)

# Of every configuration: what files, tools and text generation ask for, labels, dropout (which is ours to choose, with
# model.dropout), and the width of the random numbers that weights once began with.
IMMATERIAL = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id"),
        *("return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16", "problem_type"),
        *("id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix"),
        *("initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout_prob", "resid_pdrop"),
        *("attention_probs_dropout_prob", "embd_pdrop", "attn_pdrop", "pretraining_tp", "_attn_implementation"),
        *("_attn_implementation_autoset", "attn_implementation", "_commit_hash", "tf_legacy_loss", "unsloth_version"),
        *(
            "unsloth_fixed",
            "gradient_checkpointing",
            "chunk_size_feed_forward",
            "model_type",
            "keys_to_ignore_at_inference",
        ),
        *("do_sample", "temperature", "top_k", "top_p", "max_length", "min_length", "num_beams", "num_beam_groups"),
        *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_return_sequences", "typical_p"),
        *("diversity_penalty", "encoder_no_repeat_ngram_size", "early_stopping", "max_new_tokens"),
    }
)
ROTARY_IMMATERIAL = IMMATERIAL | {"max_window_layers"}
ROTARY_FIELDS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "hidden_size": "width",
    "intermediate_size": "hidden",
    "hidden_act": "activation",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
    # Rotary positions have no end; it is kept for whoever gets the model back.
    "max_position_embeddings": "context",
    "vocab_size": "vocab",
}
ROTARY_DEFAULTS = {
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None},
    **{"hidden_size": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    **{"rope_theta": 10_000.0, "max_position_embeddings": 2048},
}
ROTARY_OURS = {"norm": "rmsnorm", "positions": "rotary", "biases": False}
# Of one layer like the next, without a mixture of experts: what our blocks are.
ROTARY_UNUSED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        model="gpt",
        prefix="transformer.",
        rows=GPT2_ROWS,
        unused=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
        fields={
            "n_layer": "num_layers",
            "n_head": "num_heads",
            "n_embd": "width",
            "n_inner": "hidden",
            "n_positions": "context",
            "activation_function": "activation",
            "layer_norm_epsilon": "norm_epsilon",
            "tie_word_embeddings": "tied",
            "vocab_size": "vocab",
        },
        defaults={
            **{"n_layer": 12, "n_head": 12, "n_embd": 768, "n_inner": None, "n_positions": 1024, "vocab_size": 50257},
            **{"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        },
        fixed={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "is_decoder": (True, False),
            "is_encoder_decoder": (False,),
        },
        ours={"norm": "layernorm", "positions": "learned", "biases": True},
        # n_ctx is an older name of n_positions; `summary_…` are of a head that none of ours is.
        immaterial=IMMATERIAL
        | {"n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout"}
        | {"summary_proj_to_labels", "summary_type", "summary_use_proj", "gradient_checkpointing"},
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        model="gpt",
        prefix="model.",
        rows=LLAMA_ROWS,
        unused=ROTARY_UNUSED,
        fields={**ROTARY_FIELDS, "attention_bias": "attention_bias", "mlp_bias": "ffn_biases"},
        defaults={
            **{**ROTARY_DEFAULTS, "intermediate_size": 11008, "vocab_size": 32000},
            **{"attention_bias": False, "mlp_bias": False},
        },
        fixed={"is_encoder_decoder": (False,)},
        ours=ROTARY_OURS,
        immaterial=ROTARY_IMMATERIAL,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        model="gpt",
        prefix="model.",
        rows=LLAMA_ROWS,
        unused=ROTARY_UNUSED,
        fields={**ROTARY_FIELDS, "sliding_window": "window"},
        defaults={
            **{**ROTARY_DEFAULTS, "intermediate_size": 14336, "vocab_size": 32000, "num_key_value_heads": 8},
            **{"sliding_window": 4096},
        },
        fixed={"is_encoder_decoder": (False,)},
        ours=ROTARY_OURS,
        immaterial=ROTARY_IMMATERIAL,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        model="gpt",
        prefix="model.",
        rows=LLAMA_ROWS,
        unused=ROTARY_UNUSED,
        fields={**ROTARY_FIELDS, "sliding_window": "window"},
        defaults={
            **{**ROTARY_DEFAULTS, "intermediate_size": 22016, "vocab_size": 151936, "num_key_value_heads": 32},
            **{"use_sliding_window": False, "sliding_window": 4096},
        },
        fixed={"is_encoder_decoder": (False,), "use_mrope": (False,)},
        ours={**ROTARY_OURS, "qkv_biases": True},
        immaterial=ROTARY_IMMATERIAL,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        model="gpt",
        prefix="model.",
        rows=LLAMA_ROWS,
        unused=ROTARY_UNUSED,
        fields={**ROTARY_FIELDS, "sliding_window": "window", "attention_bias": "attention_bias"},
        defaults={
            **{**ROTARY_DEFAULTS, "intermediate_size": 22016, "vocab_size": 151936, "num_key_value_heads": 32},
            **{"use_sliding_window": False, "sliding_window": 4096, "head_dim": 128, "attention_bias": False},
        },
        fixed={"is_encoder_decoder": (False,)},
        ours={**ROTARY_OURS, "qk_norm": True},
        immaterial=ROTARY_IMMATERIAL,
    ),
    "vit": Family(
        architecture="ViTForImageClassification",
        model="vit",
        prefix="vit.",
        rows=VIT_ROWS,
        # Of the bare model alone: a layer that no classifier has.
        unused=(r"vit\.pooler\.dense\.(weight|bias)",),
        fields={
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "hidden_size": "width",
            "intermediate_size": "hidden",
            "patch_size": "patch_size",
            "image_size": "image_size",
            "num_channels": "channels",
            "layer_norm_eps": "layernorm_epsilon",
        },
        defaults={
            **{"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072},
            **{"patch_size": 16, "image_size": 224, "num_channels": 3, "layer_norm_eps": 1e-12},
        },
        fixed={"hidden_act": ("gelu",), "qkv_bias": (True,), "is_encoder_decoder": (False,)},
        ours={"positions": "learned", "pool": "cls"},
        immaterial=IMMATERIAL | {"encoder_stride", "pooler_act", "pooler_output_size"},
    ),
}

# The feed-forward part by its name in their configurations, where each row of ours is known by the first of its names.
ACTIVATIONS = {
    "gpt2": {
        "gelu_new": "gelu",
        "gelu_pytorch_tanh": "gelu",
        "gelu": "gelu_exact",
        "relu": "relu",
        "relu2": "relu2",
    },
    "rotary": {"silu": "swiglu", "swish": "swiglu"},
}
