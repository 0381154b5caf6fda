"""What makes two configurations the same run: which keys may change when one is continued, and the hash of the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Where a run lives, what it prints and when it gives up: not part of what it computes or of the files it leaves.
UNHASHED_KEYS = (
    *("name", "root", "dir", "step", "resume", "overwrite", "log", "preempt", "compile_cache"),
    *("data.workers", "data.prefetch"),
    *("train.hang_seconds", "train.max_crashes", "train.max_rollbacks", "train.dollars_per_hour"),
)
# May change when a run is continued with dir=: silently recorded, or with a warning. Every other key is identity.
FREE_KEYS = (
    *(*UNHASHED_KEYS, "train.log_steps", "train.eval_steps", "train.eval_batches", "train.final"),
    *("ckpt", "retention", "score", "mesh", "remat", "model.loss_chunks", "model.attention", "eval"),
)
# They change the numbers that come, by more than rounding, but not what is in a state: precision rounds otherwise,
# microbatches draw other dropout masks and other batch statistics.
RESUMABLE_KEYS = ("train.steps", "optim", "schedule", "train.microbatches", "train.precision")
IDENTITY_WITHIN = ("optim.kind", "optim.ema")  # the state has another shape

KeyClass = Literal["free", "resumable", "identity"]


@dataclass(frozen=True)
class Drift:
    """One key that differs between the configuration a run was started with and the one it is continued with."""

    key: str
    old: Any
    new: Any

    @property
    def kind(self) -> KeyClass:
        return classify_key(self.key)

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} → {json.dumps(self.new)}"


def classify_key(key: str) -> KeyClass:
    """Whether a key may change in a continued run."""
    if _within(key, IDENTITY_WITHIN):
        return "identity"
    if _within(key, FREE_KEYS):
        return "free"
    return "resumable" if _within(key, RESUMABLE_KEYS) else "identity"


def find_drift(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Drift]:
    """What differs between two documents, key by key; where a run lives and what it prints is left out."""
    before, after = select_result_keys(old), select_result_keys(new)
    return [
        Drift(key, before.get(key), after.get(key)) for key in {**before, **after} if before.get(key) != after.get(key)
    ]


def select_result_keys(document: Mapping[str, Any]) -> dict[str, Any]:
    """Every key that can change the result or the files of a run, as `optim.lr`, with its value."""
    return {key: value for key, value in _leaves(document) if not _within(key, UNHASHED_KEYS)}


def hash_config(document: Mapping[str, Any]) -> str:
    """Eight hex digits over every key that can change the result or the files of a run, in no order."""
    return _hash(select_result_keys(document))


def hash_identity(document: Mapping[str, Any]) -> str:
    """Eight hex digits over the identity keys only: equal where one run could be continued as the other."""
    return _hash({key: value for key, value in _leaves(document) if classify_key(key) == "identity"})


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
