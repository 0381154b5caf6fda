"""Whether two configurations are the same run: which keys may change when one is continued, and hashes of the others.

Every key is free (accepted), resumable (accepted with a warning), a place (accepted, for the content of what lies there
is compared) or identity (refused). A key of tomorrow that nobody has put in a class is identity: it is safer to refuse
a change than to go on with another model.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.types import Document

# Where a run lives, what it prints, how fast its batches come and when it gives up: not part of what it computes or of
# the files it leaves, so they are in no hash and in no list of differences.
UNHASHED_KEYS = (
    "name",
    "root",
    "dir",
    "step",
    "resume",
    "overwrite",
    "log",
    "preempt",
    "hosts",
    "remote",
    "profile",
    "compile_cache",
    "data.workers",
    "data.prefetch",
    "data.on_bad",
    "train.hang_seconds",
    "train.max_crashes",
    "train.max_rollbacks",
    "train.dollars_per_hour",
    "train.peak_flops",
)
# How often a run looks and saves, what it keeps, and where and how it computes: the numbers that come are the same, up
# to rounding.
FREE_KEYS = (
    *UNHASHED_KEYS,
    "train.log_steps",
    "train.eval_steps",
    "train.eval_batches",
    "train.final",
    "ckpt",
    "retention",
    "score",
    "mesh",
    "remat",
    "model.loss_chunks",
    "model.attention",
    "eval",
)
# They change the numbers that come by more than rounding, but not what is in a state: a precision rounds otherwise,
# microbatches draw other dropout masks and other batch statistics.
RESUMABLE_KEYS = ("train.steps", "train.epochs", "optim", "schedule", "train.microbatches", "train.precision", "stop")
# Exceptions within the resumable keys: with these the state has another shape.
IDENTITY_KEYS_WITHIN = ("optim.kind", "optim.ema", "optim.target", "optim.options", "optim.groups")
# Where data lies on a machine. Another machine has it elsewhere: what a run was trained on is the content, of which
# data.json has the fingerprint.
PLACE_KEYS = ("data.path", "data.eval_path", "data.tokenizer", "data.template")
# Keys that came when there were runs already, each with the value that means what was done before: at that value it is
# in no hash and in no list of differences, so that a run which was begun without it keeps its directory. Of a key with
# keys below it, a mapping names those that say so for all of them; null and an empty mapping always do.
LATER_KEYS: Mapping[str, Any] = {
    "data.field": None,
    "data.eval_path": None,
    "data.columns": {},
    "data.labels": None,
    "data.seq_len": None,
    "data.vocab_size": None,
    "data.delimiter": None,
    "data.tokenizer": None,
    "data.eos": True,
    "data.ignore_label": -100,
    "train.epochs": None,
    "stop": {"metric": None, "rules": {}},
    "stop.rules": {},
    "program": {"kind": "none"},
    "train.parts": None,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "model.normalize": True,
    "model.head_dim": None,
    "model.rotary_scaling": None,
    "model.window": None,
    "model.qkv_biases": None,
    "model.attn_out_biases": None,
    "model.ffn_biases": None,
    "model.qk_norm": False,
    "model.layernorm_epsilon": 1e-6,
    "tune": {"kind": "none"},
    "optim.groups": {},
}

# What a run writes down of what other keys name: it is compared when the run goes on, and in no hash, for where a run
# lives is found without looking into a folder that may be gone.
DERIVED_KEYS = ("model.shape",)

KeyClass = Literal["free", "resumable", "place", "identity"]


@dataclass(frozen=True)
class Drift:
    """One key that differs between the configuration a run was started with and the one it is continued with."""

    key: str
    old: Any
    new: Any

    @property
    def kind(self) -> KeyClass:
        """Return whether the key may change in a continued run."""
        return classify_key(self.key)

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} → {json.dumps(self.new)}"


def classify_key(key: str) -> KeyClass:
    """Return whether a key, such as `optim.lr`, may change in a continued run."""
    if _is_within(key, IDENTITY_KEYS_WITHIN):
        return "identity"
    if key in PLACE_KEYS:
        return "place"
    if _is_within(key, FREE_KEYS):
        return "free"
    return "resumable" if _is_within(key, RESUMABLE_KEYS) else "identity"


def find_drift(old: Document, new: Document) -> list[Drift]:
    """Return the keys in which two documents differ, except those of where a run lives and what it prints."""
    before, after = select_result_keys(old), select_result_keys(new)
    # In the order of the old document, new keys last; a key that only one of them has is None in the other.
    keys = {**before, **after}
    return [Drift(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def select_result_keys(document: Document) -> dict[str, Any]:
    """Return every key that can change the result or the files of a run, as `optim.lr`, with its value."""
    return {key: value for key, value in _iter_leaves(document) if not _is_within(key, UNHASHED_KEYS)}


def hash_config(document: Document) -> str:
    """Return eight hex digits over every key that can change the result or the files of a run, in whatever order."""
    return _hash(
        {key: value for key, value in select_result_keys(document).items() if not _is_within(key, DERIVED_KEYS)}
    )


def hash_identity(document: Document) -> str:
    """Return eight hex digits over what a run cannot change: equal where one run could be continued as the other.

    Places are among it: a document alone does not say that two of them hold the same.
    """
    kept = ("place", "identity")
    leaves = {key: value for key, value in _iter_leaves(document) if not _is_within(key, DERIVED_KEYS)}
    return _hash({key: value for key, value in leaves.items() if classify_key(key) in kept})


def find_places(document: Document) -> dict[str, Any]:
    """Return where a document says that its data lies: `{"data.path": "corpus.txt"}`; empty where it names no place."""
    return {key: value for key, value in _iter_leaves(document) if key in PLACE_KEYS and value is not None}


def replace_places(document: Document, places: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document that has its data at other places; of a place that is not among them nothing is said."""
    data = dict(document["data"])
    for key in PLACE_KEYS:
        name = key.removeprefix("data.")
        if key in places or name in data:
            data[name] = places.get(key)
    return {**document, "data": data}


def _iter_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf. An empty mapping is a leaf: `notices: {}` says something."""
    if prefix in LATER_KEYS and _is_as_before(node, LATER_KEYS[prefix]):
        return
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from _iter_leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _is_as_before(node: Any, before: Any) -> bool:
    """Return whether a value means what was done before its key existed (LATER_KEYS)."""
    if not isinstance(before, Mapping):
        return type(node) is type(before) and bool(node == before)
    if not node:
        return node is None or isinstance(node, Mapping)
    # Without an entry of its own, an option that is on may have the same values.
    if not before or not isinstance(node, Mapping):
        return False
    # A key that is not there, in a document that is older than it, is as good as an empty mapping.
    return all(node.get(key, {} if value == {} else ...) == value for key, value in before.items())


# The runs of a sweep or a report have the same keys, and each is asked for several times.
@functools.lru_cache(maxsize=4096)
def _is_within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
