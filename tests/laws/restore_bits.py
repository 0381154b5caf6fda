"""Restore a checkpoint onto the devices of one or several processes, and print a digest of every bit of the state.

python -m tests.laws.restore_bits CHECKPOINT ADDRESS COUNT INDEX words…
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from runner.checkpoint import store
from runner.train.build import build, read_train_state
from tests.conftest import composed


def main(checkpoint: str, address: str, count: str, index: str, *words: str) -> None:
    """Join the others, restore, gather, and print the digest from process 0."""
    if int(count) > 1:
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(address, int(count), int(index), cluster_detection_method="deactivate")
    state = read_train_state(build(composed(*words)), Path(checkpoint))
    values = {}
    for name, leaf in store.name_leaves(state).items():
        words_of = jax.random.key_data(leaf) if store.is_key(leaf) else leaf
        is_here = words_of.is_fully_addressable or words_of.is_fully_replicated
        values[name] = np.asarray(words_of if is_here else multihost_utils.process_allgather(words_of, tiled=True))
    if index == "0":
        print(digest_values(values))


def digest_values(values: dict[str, np.ndarray]) -> str:
    """Return one digest over names, types, shapes and bits."""
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(f"{name} {value.dtype} {value.shape}".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(*sys.argv[1:])
