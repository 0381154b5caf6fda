"""The arrays of a checkpoint as numpy sees them: no model, no jax, no Orbax. What Orbax wrote is read by TensorStore.

A leaf's name is its path joined by dots: `params.blocks.attention.qkv.kernel`. Reading many small leaves this way
takes a tenth of the time that Orbax's own restore does (measured on 0.12.8: 2,000 leaves, 0.2 s against 1.7 s).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore as ts

# Nothing is read twice, so nothing is cached; copies run on as many cores as there are.
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": 0}})


@dataclass(frozen=True)
class Leaf:
    """One array on disk. `generator` names the implementation of a random key, whose words these are."""

    shape: tuple[int, ...]
    dtype: str
    generator: str | None = None

    @property
    def num_bytes(self) -> int:
        size = ts.dtype(self.dtype).numpy_dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def __str__(self) -> str:
        key = f" key<{self.generator}>" if self.generator else ""
        return f"{self.dtype}{list(self.shape)}{key}"


def opened(state: Path, names: Iterable[str] | None = None) -> dict[str, ts.TensorStore]:
    """Handles of the leaves of a saved tree, all of them or those named. Raises ValueError where one cannot be."""
    base = {"driver": "ocdbt", "base": f"file://{state.resolve()}/"}
    if names is None:
        listing = ts.KvStore.open(base, context=_CONTEXT).result().list().result()
        names = sorted(key.decode().removesuffix("/zarr.json") for key in listing if key.endswith(b"/zarr.json"))
    pending = {
        name: ts.open({"driver": "zarr3", "kvstore": {**base, "path": f"{name}/"}}, context=_CONTEXT, read=True)
        for name in names
    }
    return {name: future.result() for name, future in pending.items()}


def leaves(state: Path) -> dict[str, Leaf]:
    """Name, shape, dtype and kind of every leaf of a saved tree, in order of their names."""
    generators = _generators(state)
    return {
        name: Leaf(tuple(store.shape), store.dtype.name, generators.get(name)) for name, store in opened(state).items()
    }


def read(state: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The values of leaves as numpy arrays; a random key as its words."""
    pending = {name: store.read() for name, store in opened(state, names).items()}
    return {name: future.result() for name, future in pending.items()}


def logical_digest(state: Path, progress: Any) -> str:
    """One SHA-256 of what a checkpoint means: names, shapes, dtypes, values; not how or when it was written."""
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode())
    kinds = leaves(state)
    for name, leaf in kinds.items():  # one at a time: a checkpoint may be larger than memory
        digest.update(f"\n{name} {leaf}\n".encode())
        digest.update(read(state, [name])[name].tobytes())
    return digest.hexdigest()


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": x}` as `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def _generators(state: Path) -> dict[str, str]:
    """The implementation of each random key, from what Orbax notes beside the arrays."""
    found = {}
    for path in sorted((state / "array_metadatas").glob("process_*")):
        for entry in json.loads(path.read_bytes())["array_metadatas"]:
            noted = entry["array_metadata"]
            if implementation := (noted.get("ext_metadata") or {}).get("random_key_impl"):
                found[noted["param_name"]] = implementation
    return found
