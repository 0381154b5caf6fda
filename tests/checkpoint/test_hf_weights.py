"""Weights of Hugging Face folders: the logits of transformers, and what cannot be taken is refused in one line."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import Gpt, HfModel, PixelScale
from models.gpt import sample_tokens
from models.hf_config import choose_family, read_pixels, read_shape, write_config, write_preprocessor
from models.hf_families import FAMILIES
from runner.checkpoint.hf_folder import open_hf_folder
from runner.checkpoint.hf_shape import read_hf_shape
from runner.checkpoint.hf_weights import open_hf_weights
from runner.checkpoint.store import name_leaves
from runner.checkpoint.transfer import take_weights
from runner.errors import ConfigError, RefusedError
from runner.inspect import export_hf
from runner.inspect.export_hf import HfExport
from runner.optim.parameter_groups import is_stacked
from tests.hf_folders import CLASSES, MADE, SEQ, SIDE, VOCAB, compute_theirs, make_batch, make_theirs, write_llama

# Of float32 with sums in another order. The logits are of the size of 1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Return a model of transformers and the folder that it has saved, once for each name."""
    found: dict[str, tuple[Any, Path]] = {}
    root = tmp_path_factory.mktemp("hf")

    def make(name: str) -> tuple[Any, Path]:
        if name not in found:
            theirs = make_theirs(name)
            theirs.save_pretrained(root / name)
            found[name] = theirs, root / name
        return found[name]

    return make


def load_ours(folder: Path, **options: Any) -> nnx.Module:
    """Return our model of a folder, with its weights."""
    shape = read_shape(json.loads((folder / "config.json").read_text()))
    model = HfModel(path=str(folder), shape=shape, **options)
    fresh = model.build(shape.image or (SEQ,), CLASSES if shape.image else shape.vocab, nnx.Rngs(0))
    graphdef, params, rest = nnx.split(fresh, nnx.Param, ...)
    state = {"params": nnx.to_pure_dict(params)}
    state, report = take_weights(state, open_hf_weights(folder), partial=False, stacked=is_stacked)
    assert report.exact
    nnx.replace_by_pure_dict(params, state["params"])
    made = nnx.merge(graphdef, params, rest)
    made.eval()
    return made


def compute_ours(folder: Path, batch: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(load_ours(folder)(jnp.asarray(batch)))


@pytest.mark.parametrize("name", MADE)
def test_its_logits_are_those_of_transformers(name: str, made: Callable[[str], tuple[Any, Path]]) -> None:
    theirs, folder = made(name)
    batch = make_batch(name)
    expected = compute_theirs(theirs, batch)
    assert expected.std() > 0.1  # there is something to compare
    np.testing.assert_allclose(compute_ours(folder, batch), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", MADE)
def test_what_is_written_out_gives_transformers_the_same_logits(
    name: str, tmp_path: Path, made: Callable[[str], tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    theirs, folder = made(name)
    shape = read_shape(json.loads((folder / "config.json").read_text()))
    params = nnx.state(load_ours(folder), nnx.Param)
    values = {".".join(["params", *map(str, path)]): leaf[...] for path, leaf in nnx.to_flat_state(params)}
    # In several files as well.
    monkeypatch.setattr(export_hf, "SHARD_BYTES", 30_000 if name in ("llama2", "gpt2") else 10**9)
    family = choose_family(shape.network)
    config = write_config(shape.network, family, shape.vocab or CLASSES, shape.image or (SEQ,))
    HfExport(shape.network, family, config, ()).write(tmp_path / "model.safetensors", values)
    auto = transformers.AutoModelForImageClassification if shape.image else transformers.AutoModelForCausalLM
    again, told = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert type(again) is type(theirs)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or name not in ("llama2", "gpt2")
    batch = make_batch(name)
    # Exactly: every number is what it was.
    np.testing.assert_array_equal(compute_theirs(again.eval(), batch), compute_theirs(theirs, batch))


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_its_greedy_text_is_that_of_transformers(name: str, made: Callable[[str], tuple[Any, Path]]) -> None:
    import torch

    theirs, folder = made(name)
    prompt = make_batch(name)[0, :4]
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(prompt)[None], max_new_tokens=24, do_sample=False)[0].numpy()
    key = jax.random.key(0)
    with jax.default_matmul_precision("highest"):
        # Of the one likeliest token.
        said = sample_tokens(load_ours(folder), jnp.asarray(prompt), 24, key, top_k=1)
    np.testing.assert_array_equal(said, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_half_precision_give_each_value(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    theirs = make_theirs("llama2").to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    # Not `float()`, which would leave the frequencies of its positions rounded.
    again = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    batch = make_batch("llama2")
    np.testing.assert_allclose(compute_ours(tmp_path, batch), compute_theirs(again, batch), atol=TOLERANCE)


def test_shards_are_read_by_their_index(tmp_path: Path, made: Callable[[str], tuple[Any, Path]]) -> None:
    theirs, whole = made("llama2")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    batch = make_batch("llama2")
    np.testing.assert_array_equal(compute_ours(tmp_path, batch), compute_ours(whole, batch))


def test_a_folder_of_the_bare_model_is_taken(tmp_path: Path, made: Callable[[str], tuple[Any, Path]]) -> None:
    theirs, whole = made("gpt2")
    # As the original GPT-2 lies on the hub: no prefix, and buffers that are no weights.
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(whole / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    batch = make_batch("gpt2")
    np.testing.assert_allclose(compute_ours(tmp_path, batch), compute_theirs(theirs, batch), atol=TOLERANCE)


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data")])
def test_a_device_reads_its_part_alone(spec: tuple[str | None, ...], tmp_path: Path) -> None:
    weights = open_hf_weights(write_llama(tmp_path))
    for leaf, found in weights.specs.items():
        whole = weights.read(leaf, (slice(None),) * len(found.shape))
        assert whole.shape == found.shape
        for axis, name in enumerate(spec[: len(found.shape)]):
            if name is None:
                continue
            middle = found.shape[axis] // 2
            for part in (slice(0, middle), slice(middle, None), slice(1, 2)):
                index = tuple(part if at == axis else slice(None) for at in range(len(found.shape)))
                np.testing.assert_array_equal(weights.read(leaf, index), whole[index])


def test_nothing_is_there_twice(tmp_path: Path) -> None:
    """What numpy has at any moment is the weights, of which jax takes the memory, and not one array more."""
    folder = write_llama(tmp_path, vocab=60_000)
    weights = open_hf_weights(folder)
    state = {"params": {"embed": {"embedding": jnp.zeros((60_000, 16))}, "head": {"kernel": jnp.zeros((16, 60_000))}}}
    size = largest = 60_000 * 16 * 4
    tracemalloc.start()
    try:
        state, _ = take_weights(state, weights, partial=True, stacked=is_stacked)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(
        state["params"]["head"]["kernel"], load_file(folder / "model.safetensors")["lm_head.weight"].T
    )
    assert peak < 2 * size + 0.2 * largest


# --- what is refused ---


def change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **fields}
        (folder / "config.json").write_text(json.dumps(config))

    return change


def change_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return write


def write_index(weight_map: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def cut(name: str, size: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])

    return write


DOWN = "model.layers.1.mlp.down_proj.weight"
NAMES = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
        (cut("config.json", 20), "config.json: is no JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is no object of JSON"),
        (change_config(model_type="mamba"), f'"mamba" is none of the families there are: {", ".join(FAMILIES)}'),
        (change_config(model_type=["llama"]), "none of the families there are"),
        (change_config(num_local_experts=8), "num_local_experts=8 is not known"),
        (change_config(quantization_config={"bits": 4}), "quantization_config=.* is not known"),
        (change_config(attn_logit_softcapping=30.0), "attn_logit_softcapping=30.0 is not known"),
        (change_config(hidden_act="gelu"), 'activation "gelu" is not supported; silu'),
        (change_config(rope_scaling={"type": "yarn", "factor": 4.0}), 'rope type "yarn" with factor is not supported'),
        (change_config(rope_scaling={"type": "linear", "factor": 4.0}), 'rope type "linear"'),
        (change_config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (change_config(hidden_size="many"), 'hidden_size="many" is nothing that it can be'),
        (change_config(hidden_size=-4), "hidden_size=-4 is nothing"),
        (change_config(num_attention_heads=5), "width=16 must be a multiple"),
        (change_tensors(lambda tensors: tensors.pop(DOWN)), f"has no tensor {DOWN}, beside model.layers.0"),
        (
            change_tensors(lambda tensors: tensors.update({DOWN: np.ones((3, 4), np.float32)})),
            "layers differ in the shape",
        ),
        (
            change_tensors(lambda tensors: tensors.update({DOWN: np.ones((16, 24), np.int8)})),
            "is I8; only F32, BF16, F16",
        ),
        (
            change_tensors(lambda tensors: tensors.update({DOWN: np.ones((16, 24, 1), np.float32)})),
            "another number of dimensions",
        ),
        (change_config(tie_word_embeddings=True), "lm_head.weight is the embedding, and it is another"),
        (cut("model.safetensors", 4), "damaged or cut off"),
        (cut("model.safetensors", 300), "damaged or cut off"),
        (cut("model.safetensors", 10_000), "damaged or cut off"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pytorch_model.bin is a pickle, which runs code",
        ),
        (write_index({NAMES: "b.safetensors"}), "b.safetensors is missing, which model.safetensors.index.json names"),
        (write_index({NAMES: "a.safetensors", "model.other": "a.safetensors"}), "has no tensor model.other"),
        (write_index([]), "has no weight_map"),
        (write_index({NAMES: 3}), "has no weight_map"),
        *(
            (write_index({NAMES: name}), "expected files of this folder")
            for name in ("../a.safetensors", "/etc/passwd", "x/a.safetensors", "..", "a.bin", "a\n.safetensors")
        ),
    ],
)
def test_what_cannot_be_taken_is_refused_in_one_line(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "llama")
    damage(folder)
    with pytest.raises(ConfigError, match=said) as refused:
        open_hf_weights(folder)
    assert "\n" not in str(refused.value)


def test_what_says_nothing_may_be_there(tmp_path: Path) -> None:
    folder = write_llama(
        tmp_path, pretraining_tp=1, use_cache=True, new_field=None, pruned_heads={}, torch_dtype="bfloat16"
    )
    assert open_hf_folder(folder).tensors
    assert open_hf_weights(folder).specs


def test_a_window_is_kept_and_holds_longer_sequences_off(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, model_type="mistral", sliding_window=16)
    model = HfModel(path="x", shape=read_shape(json.loads((folder / "config.json").read_text())))
    assert nnx.eval_shape(lambda: model.build((16,), 256, nnx.Rngs(0))).context == 16
    with pytest.raises(ValueError, match="look back model.window=16 tokens, and looks at all 17"):
        model.build((17,), 256, nnx.Rngs(0))
    with pytest.raises(ValueError, match="vocabulary of 257 tokens, and the model one of 256"):
        model.build((16,), 257, nnx.Rngs(0))


def test_an_image_has_to_be_what_the_model_was_made_for() -> None:
    shape = read_shape({"model_type": "vit", "image_size": SIDE, "patch_size": 4})
    with pytest.raises(ValueError, match=f"takes images of {SIDE} × {SIDE} × 3, and the data has 8 × 8 × 1"):
        HfModel(path="x", shape=shape).build((8, 8, 1), CLASSES, nnx.Rngs(0))


def test_weights_of_another_shape_are_named_and_taken_as_far_as_they_fit(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "small", layers=2)
    bigger = read_shape(json.loads((write_llama(tmp_path / "big", layers=3) / "config.json").read_text())).network

    def fresh() -> dict[str, Any]:
        return {"params": nnx.to_pure_dict(nnx.state(bigger.build((8,), 256, nnx.Rngs(0)), nnx.Param))}

    weights = open_hf_weights(folder)
    with pytest.raises(RefusedError, match=r"float32\[2, 16, 16\] there, float32\[3, 16, 16\] here.*partial=true"):
        take_weights(fresh(), weights, partial=False, stacked=is_stacked)
    state, report = take_weights(fresh(), weights, partial=True, stacked=is_stacked)
    down = state["params"]["blocks"]["ffn"]["down"]["kernel"]
    theirs = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(down[1], theirs[DOWN].T)
    np.testing.assert_array_equal(down[2], fresh()["params"]["blocks"]["ffn"]["down"]["kernel"][2])
    assert "params.embed.embedding" in report.taken


def test_a_tensor_that_no_model_of_ours_has_is_unexpected(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    change_tensors(lambda tensors: tensors.update({"model.extra.weight": np.ones(3, np.float32)}))(folder)
    weights = open_hf_weights(folder)
    option = read_shape(json.loads((folder / "config.json").read_text())).network
    state = {"params": nnx.to_pure_dict(nnx.state(option.build((8,), 256, nnx.Rngs(0)), nnx.Param))}
    with pytest.raises(RefusedError, match=re.escape("model.extra.weight of model.safetensors is unexpected")):
        take_weights(state, weights, partial=False, stacked=is_stacked)


@pytest.mark.parametrize("name", MADE)
def test_a_family_is_found_again(name: str) -> None:
    """Nothing of transformers is needed: its configuration is what the table says."""
    family, fields = MADE[name]
    known = {**fields, "model_type": family.lower()}
    if name == "vit":
        del known["num_labels"]
    assert choose_family(read_shape(known).network) == family.lower()
    assert read_shape(known).vocab == (0 if name == "vit" else VOCAB)


def test_one_from_scratch_is_a_gpt2_to_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="a comparison with another library, run where it is")
    shape: Any = {"num_layers": 2, "num_heads": 2, "width": 16, "hidden": 24, "context": SEQ, "biases": True}
    option = Gpt(**shape, norm="layernorm", positions="learned", activation="gelu")
    model: Any = option.build((SEQ,), VOCAB, nnx.Rngs(0))
    values = name_leaves({"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))})
    family = choose_family(option)
    export = HfExport(option, family, write_config(option, family, VOCAB, (SEQ,)), ())
    export.write(tmp_path / "model.safetensors", values)
    theirs, batch = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), make_batch("gpt2")
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    np.testing.assert_allclose(model(jnp.asarray(batch)), compute_theirs(theirs, batch), atol=TOLERANCE)


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_images_are_normalized_as_the_folder_says(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    """What transformers is given by its processor, ours makes of values from 0 to 1; an export says so again."""
    theirs, folder = made("vit")
    shutil.copytree(folder, tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    shape, batch = read_hf_shape(tmp_path / "vit"), make_batch("vit")
    assert read_hf_shape(folder).pixels is None
    assert shape.pixels == PixelScale(mean=tuple(MEAN), std=tuple(STD))
    normalized = ((batch - np.float32(MEAN)) / np.float32(STD)).astype(np.float32)
    for done, given in ((True, normalized), (False, batch)):
        option = HfModel(path="x", shape=shape, normalize=done)
        graphdef, params, rest = nnx.split(option.build(shape.image, CLASSES, nnx.Rngs(0)), nnx.Param, ...)
        state, _ = take_weights(
            {"params": nnx.to_pure_dict(params)}, open_hf_weights(folder), partial=False, stacked=is_stacked
        )
        nnx.replace_by_pure_dict(params, state["params"])
        ours: Any = nnx.merge(graphdef, params, rest)
        np.testing.assert_allclose(ours(jnp.asarray(batch)), compute_theirs(theirs, given), atol=TOLERANCE)
    assert read_pixels(write_preprocessor(shape.image, shape.pixels), 3) == shape.pixels
    assert read_pixels(write_preprocessor(shape.image, None), 3) is None


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"do_rescale": False}, "do_rescale=false with rescale_factor=0.0039"),
        ({"rescale_factor": 1 / 127.5}, "is not supported; images have values from 0 to 1"),
        ({"image_mean": [0.5]}, r"image_mean=\[0.5\] is no number for each of 3 channels"),
        ({"image_std": [1, 0, 1]}, "image_std="),
        ({"image_mean": ["a", 0, 1]}, "image_mean="),
        ({"image_mean": {"a": 1}}, "image_mean="),
    ],
)
def test_what_else_is_done_to_pixels_is_refused(said: dict[str, Any], problem: str, tmp_path: Path) -> None:
    config = {"model_type": "vit", "image_size": SIDE, "patch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=f"preprocessor_config.json: .*{problem}"):
        read_hf_shape(tmp_path)
    assert read_pixels({}, 1) == PixelScale(mean=(0.5,), std=(0.5,))
