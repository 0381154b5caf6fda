"""Read a config.json of Hugging Face as one of our models, and write one. Free of jax, by the tables of hf_families.py.

A field that is known to change what a network computes is understood or refused; so is one that nobody here knows,
unless it is empty: what is passed over in silence would train another network than the one whose weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models import Gpt, HfShape, PixelScale, RotaryScaling, Vit
from models.hf_families import ACTIVATIONS, FAMILIES, Family

# What a config.json says of rotary positions, in transformers 4 and 5.
ROTARY_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
WINDOW_KEYS = ("use_sliding_window", "layer_types")
LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_frequency",
    "high_freq_factor": "high_frequency",
    "original_max_position_embeddings": "original_context",
}


# Of a field that nobody knows: it says nothing.
EMPTY: tuple[Any, ...] = (None, False, {}, [], "", 0)


def read_shape(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> HfShape:
    """Return the model of ours that a config.json describes, given images as a preprocessor_config.json says.

    Raises:
        ValueError: the family is none of ours, or a field asks for what no model of ours does.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(f"model_type={json.dumps(name)} is none of the families there are: {', '.join(FAMILIES)}")
    _check_fields(config, family)
    fields: dict[str, Any] = dict(family.ours)
    for theirs, ours in family.fields.items():
        value = config.get(theirs, family.defaults.get(theirs))
        if value is not None:
            fields[ours] = value
    try:
        if family.model == "gpt":
            return _make_gpt(str(name), config, fields)
        shape = _make_vit(family, fields)
        return replace(shape, pixels=read_pixels(preprocessor or {"do_normalize": False}, shape.image[-1]))
    except TypeError as error:
        raise ValueError(f"a field has another type than it should have: {error}") from None


def _check_fields(config: Mapping[str, Any], family: Family) -> None:
    """Raise ValueError where a field is not understood and may change what is computed."""
    known = family.immaterial | set(family.fields)
    if family.model == "gpt" and family.ours["positions"] == "rotary":
        known |= set(ROTARY_KEYS)
    if "use_sliding_window" in family.defaults:
        known |= set(WINDOW_KEYS)
    for key, value in config.items():
        if key in family.fixed:
            if value not in family.fixed[key]:
                words = " or ".join(json.dumps(each) for each in family.fixed[key])
                raise ValueError(f"{key}={json.dumps(value)} is not supported; only {words} is")
        elif key not in known and value not in EMPTY:
            raise ValueError(
                f"{key}={json.dumps(value)[:60]} is not known for this family, and may change what it computes; if it "
                "does not, take it out of config.json"
            )
    for theirs, ours in family.fields.items():
        value = config.get(theirs, family.defaults.get(theirs))
        if value is not None and not _has_its_type(ours, value):
            raise ValueError(f"{theirs}={json.dumps(value)[:60]} is nothing that it can be")


def _has_its_type(ours: str, value: Any) -> bool:
    """Tell whether a value is one that a field of ours can have: a name, a truth value, or a number above 0."""
    if ours == "activation":
        return isinstance(value, str)
    if ours in ("tied", "attention_bias", "ffn_biases"):
        return isinstance(value, bool)
    kind: Any = (int, float) if ours.endswith("epsilon") else int
    return isinstance(value, kind) and not isinstance(value, bool) and value > 0


def _make_vit(family: Family, fields: dict[str, Any]) -> HfShape:
    side, channels = fields.pop("image_size"), fields.pop("channels")
    return HfShape(family="vit", network=Vit(**fields), image=(side, side, channels))


def read_pixels(preprocessor: Mapping[str, Any], channels: int) -> PixelScale | None:
    """Return how a preprocessor_config.json normalizes images with values from 0 to 1; None where it does not.

    Raises ValueError where it does something else with their values.
    """
    rescaled, factor = preprocessor.get("do_rescale", True), preprocessor.get("rescale_factor", 1 / 255)
    if rescaled is not True or not isinstance(factor, int | float) or abs(255 * factor - 1) > 1e-5:
        raise ValueError(
            f"do_rescale={json.dumps(rescaled)} with rescale_factor={json.dumps(factor)} is not supported; images have "
            "values from 0 to 1 (true and 1 ÷ 255)"
        )
    if preprocessor.get("do_normalize", True) is not True:
        return None
    # What is not said is 0.5, as in transformers' processor of this family.
    said = {key: preprocessor.get(f"image_{key}") or 0.5 for key in ("mean", "std")}
    values = {key: value if isinstance(value, list) else channels * [value] for key, value in said.items()}
    for key, each in values.items():
        numbers = [value for value in each if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) != channels or len(each) != channels or (key == "std" and min(numbers) <= 0):
            raise ValueError(f"image_{key}={json.dumps(said[key])[:60]} is no number for each of {channels} channels")
    return PixelScale(**{key: tuple(map(float, each)) for key, each in values.items()})


def write_preprocessor(image: tuple[int, ...], pixels: PixelScale | None) -> dict[str, Any]:
    """Return the preprocessor_config.json of a model of ours, which is given images of this shape from 0 to 1."""
    scale = {} if pixels is None else {"image_mean": list(pixels.mean), "image_std": list(pixels.std)}
    return {
        "image_processor_type": "ViTImageProcessor",
        **{"do_resize": True, "size": {"height": image[0], "width": image[1]}, "resample": 3},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": pixels is not None, **scale},
    }


def _make_gpt(name: str, config: Mapping[str, Any], fields: dict[str, Any]) -> HfShape:
    vocab = fields.pop("vocab")
    table = ACTIVATIONS["gpt2" if name == "gpt2" else "rotary"]
    if fields["activation"] not in table:
        raise ValueError(f"activation {json.dumps(fields['activation'])} is not supported; {', '.join(table)} are")
    fields["activation"] = table[fields["activation"]]
    if name == "gpt2":
        fields.setdefault("hidden", 4 * fields["width"])
        return HfShape(family=name, network=Gpt(**fields), vocab=vocab)
    has_biases = fields.pop("attention_bias", False)
    if has_biases:
        fields.update(qkv_biases=True, attn_out_biases=True)
    fields.update(_read_rotary(config))
    if "use_sliding_window" in FAMILIES[name].defaults and not config.get("use_sliding_window", False):
        # It is written beside, and used nowhere.
        fields.pop("window", None)
    if name in ("qwen2", "qwen3"):
        kinds = set(config.get("layer_types") or ())
        if kinds - {"full_attention"} and not config.get("use_sliding_window", False):
            raise ValueError(
                f"layer_types with {', '.join(sorted(map(str, kinds)))} is not supported; full_attention is"
            )
    # What they all are by default need not be said: then it is one of ours of the plainer form.
    if fields.get("num_kv_heads") == fields["num_heads"]:
        fields.pop("num_kv_heads")
    if fields.get("head_dim") == fields["width"] / fields["num_heads"]:
        fields.pop("head_dim")
    return HfShape(family=name, network=Gpt(**fields), vocab=vocab)


def _read_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our fields of rotary positions, as transformers 4 and 5 write them. Raises ValueError for other kinds."""
    said: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        said |= config.get(key) or {}
    theta = said.pop("rope_theta", config.get("rope_theta", 10_000.0))
    share = said.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={share} is not supported; 1.0 is")
    kinds = {said.pop(key, None) for key in ("rope_type", "type")} - {None}
    kind = kinds.pop() if len(kinds) == 1 else "default" if not kinds else " and ".join(map(str, kinds))
    if kind == "default" and not said:
        return {"rotary_base": float(theta)}
    if kind != "llama3" or set(said) != set(LLAMA3_KEYS):
        raise ValueError(
            f"rope type {json.dumps(kind)} with {', '.join(sorted(said)) or 'nothing'} is not supported; default is, "
            f"and llama3 with {', '.join(LLAMA3_KEYS)}"
        )
    scaling = {ours: said[theirs] for theirs, ours in LLAMA3_KEYS.items()}
    scaling = {key: value if key == "original_context" else float(value) for key, value in scaling.items()}
    return {"rotary_base": float(theta), "rotary_scaling": RotaryScaling(**scaling)}


def choose_family(option: Gpt | Vit) -> str:
    """Return the family that computes what a model of ours does.

    Raises ValueError, with the reason and what to use, where none does.
    """
    if isinstance(option, Vit):
        if option.positions != "learned" or option.pool != "cls":
            raise ValueError(
                f"model.positions={option.positions} with model.pool={option.pool} is in no family; vit has "
                "model.positions=learned model.pool=cls"
            )
        return "vit"
    if option.norm == "layernorm" and option.positions == "learned":
        return _check_gpt2(option)
    if option.norm != "rmsnorm" or option.positions != "rotary":
        raise ValueError(
            f"model.norm={option.norm} with model.positions={option.positions} is in no family; gpt2 has layernorm and "
            "learned, llama rmsnorm and rotary"
        )
    if option.activation != "swiglu":
        raise ValueError(
            f"model.activation={option.activation} with rmsnorm and rotary positions is in no family; llama has "
            "model.activation=swiglu"
        )
    return _choose_rotary(option)


def _check_gpt2(option: Gpt) -> str:
    odd = [
        (option.activation == "swiglu", "model.activation=swiglu", "model.activation=gelu"),
        ((option.num_kv_heads or option.num_heads) != option.num_heads, "model.num_kv_heads", "as many as heads"),
        (option.head_size * option.num_heads != option.width, "model.head_dim", "width ÷ num_heads"),
        (option.qk_norm, "model.qk_norm=true", "model.qk_norm=false"),
        (option.window is not None, "model.window", "none"),
        (_list_biases(option) != (True, True, True), "a part without biases", "model.biases=true"),
    ]
    for is_odd, what, instead in odd:
        if is_odd:
            raise ValueError(f"{what} is nothing that gpt2 has; it has {instead}")
    return "gpt2"


def _choose_rotary(option: Gpt) -> str:
    qkv, out, ffn = _list_biases(option)
    own_head = option.head_size * option.num_heads != option.width
    if option.qk_norm and qkv == out and not ffn and option.window is None:
        return "qwen3"
    if not option.qk_norm and (qkv, out, ffn) == (True, False, False) and not own_head and option.window is None:
        return "qwen2"
    if not option.qk_norm and not (qkv or out or ffn) and option.window is not None:
        return "mistral"
    if not option.qk_norm and qkv == out and option.window is None:
        return "llama"
    raise ValueError(
        f"model.qk_norm={str(option.qk_norm).lower()} with biases for qkv {qkv}, after attention {out}, ffn {ffn}, and "
        f"model.window={option.window} is in no family; llama has no model.qk_norm and model.biases=false"
    )


def _list_biases(option: Gpt) -> tuple[bool, bool, bool]:
    own = (option.qkv_biases, option.attn_out_biases, option.ffn_biases)
    first, second, third = (option.biases if each is None else each for each in own)
    return first, second, third


def write_config(option: Gpt | Vit, family: str, num_outputs: int, inputs: tuple[int, ...]) -> dict[str, Any]:
    """Return the config.json of a model of ours; `inputs`: the shape of the examples it was trained on."""
    table = FAMILIES[family]
    qkv, _, ffn = _list_biases(option) if isinstance(option, Gpt) else (False, False, False)
    values: dict[str, Any] = {
        **{name: getattr(option, name) for name in option.__dataclass_fields__},
        **{"vocab": num_outputs, "attention_bias": qkv, "ffn_biases": ffn},
    }
    if isinstance(option, Gpt):
        names = ACTIVATIONS["gpt2" if family == "gpt2" else "rotary"]
        values["activation"] = next(theirs for theirs, ours in names.items() if ours == option.activation)
        values["num_kv_heads"] = option.num_kv_heads or option.num_heads
        values["head_dim"] = option.head_size
    else:
        values.update(image_size=inputs[0], channels=inputs[2])
    config: dict[str, Any] = {"architectures": [table.architecture], "model_type": family, "dtype": "float32"}
    config |= {theirs: values[ours] for theirs, ours in table.fields.items()}
    if isinstance(option, Gpt) and family != "gpt2":
        config["max_position_embeddings"] = max(option.context, *inputs)
        config["rope_theta"] = option.rotary_base
        config["rope_scaling"] = None
        if (scaling := option.rotary_scaling) is not None:
            said = {theirs: getattr(scaling, ours) for theirs, ours in LLAMA3_KEYS.items()}
            config["rope_scaling"] = {"rope_type": "llama3", **said}
    if "use_sliding_window" in table.defaults:
        config["use_sliding_window"] = False
    if family in ("qwen2",):
        config.pop("head_dim")
    if isinstance(option, Vit):
        config |= {"hidden_act": "gelu", "qkv_bias": True}
        config["id2label"] = {str(index): f"LABEL_{index}" for index in range(num_outputs)}
        config["label2id"] = {f"LABEL_{index}": index for index in range(num_outputs)}
    # Ours ends a text where a person says so.
    return {**config, "bos_token_id": None, "eos_token_id": None} if isinstance(option, Gpt) else config
