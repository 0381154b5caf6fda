"""A folder of Hugging Face as the teacher of `objective=distill`: its logits, and the same weights after a restart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from data.sources import Sources
from data.tables import Table
from runner.errors import ConfigError
from runner.train.teacher import open_teacher
from tests.conftest import SMALL, Door, assert_same, composed
from tests.hf_folders import (
    CLASSES,
    SEQ,
    SIDE,
    VOCAB,
    compute_theirs,
    make_batch,
    make_theirs,
    write_llama,
    write_tokenizer,
)

WORDS = (
    *("objective=distill", "objective.teacher=hf:teacher", *SMALL, "schedule=constant", "schedule.warmup_steps=2"),
    *("ckpt=periodic", "ckpt.save.periodic.steps=10", "train.steps=20"),
)


def make_sources(name: str, num_outputs: int) -> Sources:
    """Return data for a model of tests/hf_folders.py."""
    examples = {"inputs": make_batch(name)} if name == "vit" else {"tokens": np.zeros((2, SEQ + 1), np.int32)}
    table = Table({**examples, **({"label": np.zeros(2, np.int32)} if name == "vit" else {})})
    return Sources(table, table, (SIDE, SIDE, 3) if name == "vit" else (SEQ,), num_outputs, "", "")


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3", "vit"])
def test_it_says_what_transformers_says(name: str, tmp_path: Path) -> None:
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path / name)
    words = ("data=digits", "model=mlp") if name == "vit" else ("data=stdlib", "data.seq_len=24")
    config = composed(*words, "objective=distill", f"objective.teacher=hf:{tmp_path / name}")
    sources = make_sources(name, CLASSES if name == "vit" else VOCAB)
    mesh = config.mesh.build(config.data.batch_size, 1, None)
    teacher = open_teacher(config, config.objective, sources, mesh)  # type: ignore[arg-type]
    batch = make_batch(name)
    logits = teacher.teach(teacher.loaded[0], jnp.asarray(batch), {})
    np.testing.assert_allclose(logits, compute_theirs(theirs, batch), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="objective.teacher=hf:.*choose a teacher|data.tokenizer=FOLDER"):
        open_teacher(config, config.objective, make_sources(name, CLASSES + 1), mesh)  # type: ignore[arg-type]


@pytest.mark.forked
def test_it_is_the_same_one_after_a_restart(door: Door) -> None:
    write_llama(door.cwd / "teacher")
    for name, steps in (("whole", 20), ("halves", 10)):
        done = door.run(*WORDS, f"name={name}", f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
        assert "teacher: hf:teacher" in done.stdout
    whole, halves = (next((door.cwd / "outputs" / name).iterdir()) for name in ("whole", "halves"))
    more = door.run(f"dir={halves}", "train.steps=20")
    assert more.returncode == 0, more.stderr
    assert_same(whole, halves, 20)
    lines = [json.loads(line)["teacher"] for line in (halves / "attempts.jsonl").read_text().splitlines()]
    assert lines == 2 * [{"folder": str(door.cwd / "teacher"), "digest": lines[0]["digest"]}]
    table = json.loads((whole / "checkpoints/20/holdfast.json").read_text())
    assert {name.partition(".")[0] for name in table["arrays"]} == {"params", "opt", "rng", "step"}
    # Other weights, no file of weights, no folder: each is refused, and the run stays as it is.
    damages: dict[str, Callable[[Path], Any]] = {
        "its weights have changed": lambda folder: write_llama(folder, seed=1),
        "bring its files back": lambda folder: (folder / "model.safetensors").unlink(),
        "hf:teacher is not there": shutil.rmtree,
    }
    for said, damage in damages.items():
        damage(door.cwd / "teacher")
        refused = door.run(f"dir={halves}", "train.steps=30")
        assert (refused.returncode, said in refused.stderr) == (3, True), refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    write_llama(door.cwd / "teacher")
    again = door.run(f"dir={halves}", "train.steps=30")
    assert again.returncode == 0, again.stderr


@pytest.mark.forked(quick=True)
def test_the_rows_that_no_token_has_are_left_out_and_other_tokens_refused(door: Door) -> None:
    vocab = write_tokenizer(door.cwd / "teacher", door.cwd / "corpus.txt")
    write_llama(door.cwd / "teacher", vocab=vocab + 4)
    done = door.run(*WORDS, "data.tokenizer=teacher", "train.steps=2")
    assert done.returncode == 0, done.stderr
    # As many tokens, two of which have changed places.
    shutil.copytree(door.cwd / "teacher", door.cwd / "other")
    said = json.loads((door.cwd / "other/tokenizer.json").read_text())
    numbers = said["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    (door.cwd / "other/tokenizer.json").write_text(json.dumps(said))
    for place in ("other", "bytes"):
        refused = door.run(*WORDS, f"data.tokenizer={place}", "train.steps=2", "name=none")
        assert refused.returncode == 2, refused.stdout
        assert "make tokens with that folder's tokenizer" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        assert not [*(door.cwd / "outputs").glob("none/*/checkpoints/*")]


@pytest.mark.forked(quick=True)
@pytest.mark.parametrize(("reference", "code", "said"), [("nowhere", 3, "is not there"), (".", 2, "config.json")])
def test_what_is_no_folder_is_refused_and_nothing_is_left(reference: str, code: int, said: str, door: Door) -> None:
    before = door.tree()
    refused = door.run(*WORDS, f"objective.teacher=hf:{reference}")
    assert (refused.returncode, said in refused.stderr) == (code, True), refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    assert door.tree() == before
