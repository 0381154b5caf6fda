"""Runs that begin with a Hugging Face folder: what is kept of it, killed and gone on with, without it, and out again."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from models import HfModel
from models.hf_config import read_shape
from runner.checkpoint.arrays import read_leaf_specs
from runner.checkpoint.hf_folder import HfFolder
from runner.checkpoint.hf_shape import read_hf_shape
from runner.checkpoint.record import STATE
from runner.errors import ConfigError
from runner.inspect.export_hf import plan_hf_export
from runner.inspect.load_model import load_model
from runner.inspect.lookup import find_checkpoint
from runner.session.base_files import describe_pixels
from tests.conftest import SMALL, Door, assert_same, composed
from tests.hf_folders import write_llama, write_tokenizer

# Without what says the shape of a model: the folder does.
DATA = (*(word for word in SMALL if not word.startswith("model.")), "data.tokenizer=bytes")
WORDS = (
    "model=hf",
    "init_from=hf:base",
    *DATA,
    "train.steps=20",
    "train.eval_steps=5",
    "ckpt.save.periodic.steps=5",
    "ckpt.write=blocking",
)


@pytest.fixture
def based(door: Door) -> Door:
    write_llama(door.cwd / "base")
    return door


def verb(door: Door, *words: str) -> Any:
    import subprocess
    import sys

    return subprocess.run(
        [sys.executable, "-m", "runner", *words], cwd=door.cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.forked(quick=True)
def test_it_begins_with_them_and_needs_the_folder_no_more(based: Door) -> None:
    done = based.run(*WORDS, "train.steps=5", "optim.lr=1e-30", "optim.weight_decay=0", "model.dropout=0.1")
    assert done.returncode == 0, done.stderr
    assert "weights from hf:base: 10 arrays as they are" in done.stdout
    run, folder = based.the_run, based.cwd / "base"
    kept = json.loads((run / "base.json").read_text())
    assert kept["files"] == {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in ("config.json", "model.safetensors")
    }
    model, _ = load_model(str(run))
    theirs = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(model.embed.embedding[...], theirs["model.embed_tokens.weight"])
    shutil.rmtree(folder)
    more = based.run(*WORDS, "train.steps=5", "optim.lr=1e-30", "optim.weight_decay=0", "model.dropout=0.1")
    assert more.returncode == 0, more.stderr
    assert "is finished: 5 steps" in more.stdout
    further = based.run(f"dir={run}", "train.steps=8")
    assert further.returncode == 0, further.stderr
    assert "restored step 5 " in further.stdout
    # A verb that builds the model, and the model itself.
    assert load_model(f"{run}@8")[0].num_layers == 2
    shown = verb(based, "eval", f"{run}@8")
    assert shown.returncode == 0, shown.stderr


@pytest.mark.forked(quick=True)
def test_without_the_folder_nothing_begins(based: Door) -> None:
    shutil.rmtree(based.cwd / "base")
    before = based.tree()
    for words in (WORDS, ("model=hf", *DATA), ("model=hf", "model.path=base", *DATA)):
        done = based.run(*words)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "base: is no folder" in done.stderr or "model.path: a folder is needed" in done.stderr
    assert based.tree() == before
    # The name of a model on the Hub is no folder either, and is told how to become one.
    done = based.run("model=hf", "init_from=hf:openai/gpt2", *DATA)
    assert (done.returncode, based.tree()) == (2, before)
    assert "hf download openai/gpt2 --local-dir gpt2" in done.stderr


@pytest.mark.forked
def test_killed_and_gone_on_with_without_the_folder_is_bit_identical(based: Door, make_door: Any, served: Any) -> None:
    reference = make_door("reference", served)
    write_llama(reference.cwd / "base")
    assert reference.run(*WORDS).returncode == 0
    based.kill_at(10, *WORDS)
    shutil.rmtree(based.cwd / "base")
    done = based.run(*WORDS)
    assert done.returncode == 0, done.stderr
    assert "restored step " in done.stdout
    assert_same(based.the_run, reference.the_run, 20)


@pytest.mark.forked(quick=True)
def test_a_start_from_scratch_with_changed_weights_is_refused(based: Door) -> None:
    never = ("ckpt=none", "ckpt.last=false", "train.steps=3")
    words = (*(word for word in WORDS if not word.startswith("ckpt.save")), *never)
    assert based.run(*words).returncode == 0
    write_llama(based.cwd / "base", seed=1)
    refused = based.run(f"dir={based.the_run}", "train.steps=4")
    assert refused.returncode == 3, refused.stdout
    assert "began with other weights: model.safetensors of hf:base changed since" in refused.stderr
    write_llama(based.cwd / "base")
    done = based.run(f"dir={based.the_run}", "train.steps=4")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_weights_alone_go_into_a_model_that_is_written_out(based: Door) -> None:
    shape = ("model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.width=16", "model.hidden=24")
    words = (*DATA, *shape, "model.activation=swiglu", "model.tied=false", "init_from=hf:base", "train.steps=1")
    done = based.run(*words)
    assert done.returncode == 3
    assert "float32[2, 16, 16] there, float32[3, 16, 16] here" in done.stderr
    done = based.run(*words, "init_from.partial=true")
    assert done.returncode == 0, done.stderr
    assert "(the first 2 of 3 layers taken)" in done.stdout


@pytest.mark.forked(quick=True)
def test_a_run_from_scratch_becomes_a_folder_and_comes_back(door: Door) -> None:
    shape = ("model.num_layers=2", "model.num_heads=4", "model.width=16", "model.hidden=24", "model.activation=swiglu")
    assert door.run(*DATA, *shape, "train.steps=2", "optim.ema=0.5").returncode == 0
    run = door.the_run
    for weights in ("params", "ema"):
        done = verb(door, "export", f"{run}@best", "--to", "hf", weights, "--weights", weights)
        assert done.returncode == 0, done.stderr
        folder = door.cwd / weights
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        assert "AutoModelForCausalLM.from_pretrained" in (folder / "README.md").read_text()
        model, _ = load_model(str(run), weights)  # type: ignore[arg-type]
        tensors = load_file(folder / "model.safetensors")
        np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"].T, model.blocks.ffn.up.kernel[1])
        assert "lm_head.weight" not in tensors
    assert verb(door, "export", str(run), "--to", "hf", "params").returncode == 2  # it is there already
    back = door.run("model=hf", "init_from=hf:ema", *DATA, "train.steps=1", "name=back")
    assert back.returncode == 0, back.stderr
    assert "weights from hf:ema: 9 arrays as they are" in back.stdout


@pytest.fixture
def tokenized(door: Door) -> Door:
    """A folder whose vocabulary is that of a tokenizer, which lies in it."""
    write_llama(door.cwd / "base", vocab=write_tokenizer(door.cwd / "base", door.cwd / "corpus.txt") + 4)
    return door


@pytest.mark.forked(quick=True)
def test_text_is_made_of_the_tokens_of_the_folder(tokenized: Door) -> None:
    words = (*(word for word in WORDS if word != "data.tokenizer=bytes"), "train.steps=2", "+eval.text.kind=text")
    done = tokenized.run(*words)
    assert done.returncode == 0, done.stderr
    run, folder = tokenized.the_run, tokenized.cwd / "base"
    kinds = json.loads((run / "data.json").read_text())["num_outputs"]
    assert f"the data has a vocabulary of {kinds} tokens, and the model one of {kinds + 4}" in done.stdout
    assert (run / "tokenizer/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    # The samples are text: their beginnings are pieces of the corpus.
    (said,) = (run / "media/text").iterdir()
    corpus = (tokenized.cwd / "corpus.txt").read_text()
    prompts = [
        ast.literal_eval(line.partition(" after ")[2]) for line in said.read_text().splitlines() if "after" in line
    ]
    assert prompts
    assert all(prompt in corpus for prompt in prompts)
    shutil.rmtree(folder)
    more = tokenized.run(f"dir={run}", "train.steps=4")
    assert more.returncode == 0, more.stderr
    assert "restored step 2 " in more.stdout
    assert verb(tokenized, "export", str(run), "--to", "hf", "out").returncode == 0
    config = json.loads((tokenized.cwd / "out/config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (0, kinds + 4)
    assert (tokenized.cwd / "out/tokenizer.json").read_bytes() == (run / "tokenizer/tokenizer.json").read_bytes()


@pytest.mark.forked(quick=True)
def test_a_tokenizer_goes_with_a_model_from_scratch(tokenized: Door) -> None:
    words = (*(word for word in SMALL if word != "data.tokenizer=bytes"), "data.tokenizer=base", "train.steps=1")
    done = tokenized.run(*words)
    assert done.returncode == 0, done.stderr
    kinds = json.loads((tokenized.the_run / "data.json").read_text())["num_outputs"]
    embedding = load_file(tokenized.cwd / "base/model.safetensors")["model.embed_tokens.weight"]
    assert kinds == embedding.shape[0] - 4
    gone = tokenized.run(*SMALL, "data.tokenizer=nowhere", "name=other")
    assert gone.returncode == 2
    assert "data.tokenizer=nowhere: there is no tokenizer.json" in gone.stderr
    assert not (tokenized.cwd / "outputs/other").exists()


@pytest.mark.forked(quick=True)
def test_what_no_family_is_is_not_written_out(door: Door) -> None:
    assert door.run(*SMALL, "train.steps=1").returncode == 0
    said = "model.activation=relu2 with rmsnorm and rotary positions is in no family"
    checkpoint = find_checkpoint(f"{door.the_run}@1")
    specs = {name: spec for name, spec in read_leaf_specs(checkpoint.directory / STATE).items() if "params." in name}
    with pytest.raises(ConfigError, match=said):
        plan_hf_export(checkpoint, specs)
    done = verb(door, "export", str(door.the_run), "--to", "hf", "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "use --to safetensors" in done.stderr
    assert not Path(door.cwd / "out").exists()


def test_how_images_are_given_is_told(tmp_path: Path) -> None:
    said = {"model_type": "vit", "image_size": 12, "patch_size": 4, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(said))
    folder = HfFolder(tmp_path, said, (), {})
    digits = ("data=digits", "model=vit")
    assert describe_pixels(composed(*digits), folder) == ""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": [1, 2, 3]}))
    assert describe_pixels(composed(*digits), folder).startswith(
        "warning: these weights were trained on images normalized with mean 0.5, 0.5, 0.5 and standard deviation 1.0, 2"
    )
    for normalize, begin in (
        (True, "images are normalized as the folder says"),
        (False, "images are taken as the data"),
    ):
        model = HfModel(path="x", shape=read_hf_shape(tmp_path), normalize=normalize)
        assert describe_pixels(replace(composed(*digits), model=model), folder).startswith(begin)
    # As a run that began before: its configuration knows of none.
    older = HfModel(path="x", shape=read_shape(said))
    assert describe_pixels(replace(composed(*digits), model=older), folder).startswith("warning: ")
