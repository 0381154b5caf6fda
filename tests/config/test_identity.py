"""Keys that came later, keys of places, and what neither of them does to the hash of a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from runner.config.identity import (
    LATER_KEYS,
    classify_key,
    find_drift,
    find_places,
    hash_config,
    hash_identity,
    replace_places,
)
from runner.config.schema import validate_config
from runner.launch.command_line import RunRequest
from runner.launch.compose import compose
from tests.config.test_config import DOCUMENT

# What a key of LATER_KEYS says when it says something.
CHANGED: dict[str, Any] = {
    "data.field": "text",
    "data.eval_path": "held_out",
    "data.columns": {"inputs": "x_train"},
    "data.labels": "numbers",
    "data.seq_len": 64,
    "data.vocab_size": 300,
    "data.delimiter": ";",
    "data.ignore_label": 255,
    "train.epochs": 3,
    "stop": {"metric": "eval/loss", "patience": 5, "min_improvement": 0.0},
    "stop.rules": {"mine": {"kind": "external", "target": "my:enough", "options": {}}},
    "train.parts": 8,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "program": {"kind": "external", "target": "my:Program", "options": {}},
    "data.tokenizer": "llama",
    "data.eos": False,
    "model.normalize": False,
    "model.head_dim": 16,
    "model.rotary_scaling": {"factor": 8.0},
    "model.window": 4096,
    "model.qkv_biases": True,
    "model.attn_out_biases": True,
    "model.ffn_biases": False,
    "model.qk_norm": True,
    "model.layernorm_epsilon": 1e-12,
    "tune": {"kind": "freeze", "train": ["head"]},
    "optim.groups": {"head": {"match": ["head"], "lr": 0.1, "weight_decay": None}},
}
# Further ways of saying what was done before.
AS_BEFORE: dict[str, list[Any]] = {
    "data.columns": [None, {}],
    "stop": [None, {}, {"metric": None, "patience": 5, "min_improvement": 0.0}, {"metric": None, "patience": 9}],
}


def of_today() -> dict[str, Any]:
    """A document as it was written before any later key existed."""
    document = copy.deepcopy(validate_config(DOCUMENT).document)
    for key in LATER_KEYS:
        *path, leaf = key.split(".")
        node = document
        for part in path:
            node = node.get(part, {})
        node.pop(leaf, None)
    return document


def with_key(key: str, value: Any) -> dict[str, Any]:
    document = of_today()
    *path, leaf = key.split(".")
    node = document
    for part in path:
        node = node.setdefault(part, {})
    node[leaf] = value
    return document


@pytest.mark.parametrize("key", LATER_KEYS)
def test_a_key_that_came_later_changes_no_hash_until_it_says_something(key: str) -> None:
    before = of_today()
    for value in AS_BEFORE.get(key, [LATER_KEYS[key]]):
        now = with_key(key, value)
        assert hash_config(now) == hash_config(before)
        assert hash_identity(now) == hash_identity(before)
        assert find_drift(before, now) == find_drift(now, before) == []
    now = with_key(key, CHANGED[key])
    assert hash_config(now) != hash_config(before)
    assert {change.key.split(".")[-1] for change in find_drift(before, now)} >= {
        "stop": {"metric", "patience"},
        "data.columns": {"inputs"},
        "stop.rules": {"target"},
        "program": {"kind", "target"},
        "model.rotary_scaling": {"factor"},
        "tune": {"train"},
        "optim.groups": {"match", "lr"},
    }.get(key, {key.split(".")[-1]})


def test_every_later_key_is_tried() -> None:
    assert CHANGED.keys() == LATER_KEYS.keys()


def test_a_value_of_another_type_is_not_what_was_done_before() -> None:
    for key, value in (("data.field", ""), ("train.epochs", 0), ("data.delimiter", False), ("stop", 0)):
        assert hash_config(with_key(key, value)) != hash_config(of_today())


def test_what_is_done_with_a_torn_example_is_in_no_hash() -> None:
    """Or the command with `data.on_bad=skip` would begin another run, and not go on with the one that fell."""
    hashes = {hash_config(of_today()), *(hash_config(with_key("data.on_bad", each)) for each in ("raise", "skip"))}
    assert len(hashes) == 1
    assert find_drift(of_today(), with_key("data.on_bad", "skip")) == []


def test_classes_of_the_new_keys() -> None:
    assert classify_key("data.path") == classify_key("data.eval_path") == "place"
    assert classify_key("stop.patience") == classify_key("train.epochs") == "resumable"
    assert (
        classify_key("data.target") == classify_key("data.columns.inputs") == classify_key("data.field") == "identity"
    )


def test_a_place_is_in_the_hash_that_finds_a_run_but_can_be_exchanged() -> None:
    here, there = with_key("data.path", "a"), with_key("data.path", "/b")
    assert hash_config(here) != hash_config(there)
    assert hash_identity(here) != hash_identity(there)
    assert find_places(here) == {"data.path": "a"}
    assert find_places(of_today()) == {}
    assert replace_places(there, find_places(here)) == here
    both = with_key("data.eval_path", "c")
    both["data"]["path"] = "a"
    assert hash_config(replace_places(both, {"data.path": "/b"})) == hash_config(there)
    assert both["data"] == {**of_today()["data"], "path": "a", "eval_path": "c"}


@pytest.mark.parametrize(
    ("words", "digest"),
    [
        ([], "a652bbac"),
        (["model=mlp", "data=digits"], "b5f8586e"),
        (["data=text", "data.path=x.txt"], "846864a5"),
        (["model=cnn", "data=images", "data.path=img"], "f9856c92"),
        (["model=external", "model.target=m:N", "data=external", "data.target=m:d"], "a2da196c"),
        (["experiment=digits_vae"], "daaa3def"),
    ],
)
def test_runs_of_earlier_versions_keep_their_directories(
    words: list[str], digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes as they were before any later key existed: a new field with a default belongs in LATER_KEYS."""
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a b c d e f")
    for name in "ab":
        Path("img", name).mkdir(parents=True)
        Path("img", name, "1.png").touch()
    Path("m.py").touch()
    request = compose(words)
    assert isinstance(request, RunRequest)
    assert hash_config(request.config.document) == digest
