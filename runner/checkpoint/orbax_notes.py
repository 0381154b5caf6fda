"""Write what Orbax writes beside the arrays of a checkpoint, so that plain Orbax reads it as one of its own.

These files are private notes of Orbax's. Made here they cost a millisecond; Orbax's own handlers take 0.1 ms of Python
for each array at every save, and their import 0.1 s of every start. tests/checkpoint/test_orbax_notes.py compares each
of them with what the installed release writes, and has plain Orbax restore from them.
"""

from __future__ import annotations

import base64
import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runner.checkpoint.record import PROGRESS, STATE
from runner.errors import StorageError
from runner.types import JsonObject, Tree

COMMIT_SUCCESS = "commit_success.txt"
_HANDLERS = "orbax.checkpoint._src.handlers"
_ITEM_HANDLERS = {
    PROGRESS: f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler",
    STATE: f"{_HANDLERS}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
}
# How Orbax names the kinds of keys.
_SEQUENCE, _MAPPING = 1, 2


def note_checkpoint(directory: Path, progress: JsonObject, began_nanoseconds: int) -> None:
    """Write the notes of a whole checkpoint, and its JSON value, beside a tree of arrays that lies there.

    `began_nanoseconds` since 1970 is when it was begun. Raises OSError; UnicodeEncodeError for a path that is no text.
    """
    (directory / PROGRESS).mkdir()
    # As the content of a file, not of a name: it need not be where it says by the time it is read.
    for folder in (directory / STATE, directory / PROGRESS, directory):
        (folder / COMMIT_SUCCESS).write_bytes(f"Checkpoint commit was successful to {folder.resolve()}".encode())
    (directory / PROGRESS / "metadata").write_text(json.dumps(progress))
    step = {
        "item_handlers": _ITEM_HANDLERS,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": began_nanoseconds,
        "commit_timestamp_nsecs": time.time_ns(),
        "custom_metadata": {},
    }
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(step))


@dataclass(frozen=True)
class NotedArray:
    """Describe one array as it lies on disk.

    Attributes:
        name: its name on disk.
        chunk: the shape of its chunks.
        generator: for a random key, the implementation whose words these are.
        sharding: where it lay.
    """

    name: str
    chunk: tuple[int, ...]
    generator: str | None
    sharding: jax.sharding.Sharding


def encode_tree_notes(tree: Tree, arrays: Sequence[NotedArray]) -> dict[str, bytes]:
    """Return the files that Orbax writes beside the arrays of a tree; `arrays` are its leaves, in order.

    Raises StorageError for a tree that Orbax does not know: one with keys of a kind of its own.
    """
    metadata = {
        "tree_metadata": _note_nodes(tree, arrays),
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    shapes = [
        {
            "array_metadata": {
                "param_name": array.name,
                "write_shape": array.chunk,
                "chunk_shape": array.chunk,
                "ext_metadata": {"random_key_impl": array.generator} if array.generator else None,
            }
        }
        for array in arrays
    ]
    # Without the second, plain Orbax restores random keys as bare words; without the third it gives numpy arrays to who
    # does not say where each array goes.
    shardings = {
        base64.b64encode(array.name.encode()).decode(): json.dumps(_note_sharding(array.sharding)) for array in arrays
    }
    files = {
        "_METADATA": metadata,
        "array_metadatas/process_0": {"array_metadatas": shapes},
        "_sharding": shardings,
    }
    return {name: json.dumps(content).encode() for name, content in files.items()}


def _note_nodes(tree: Tree, arrays: Sequence[NotedArray]) -> JsonObject:
    """Return what Orbax notes of each array, and of each node without any: the keys that lead there, and what it is."""
    noted, following = {}, iter(arrays)
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_empty):
        keys = [_note_key(key) for key in path]
        if _is_empty(node):
            value: JsonObject = {"value_type": _name_empty(node), "skip_deserialize": True}
        else:
            chunk = list(next(following).chunk)
            value = {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": chunk}
        noted[str(tuple(key["key"] for key in keys))] = {"key_metadata": keys, "value_metadata": value}
    return noted


def _is_empty(node: Any) -> bool:
    """Tell whether a node of a tree is one without any below it: None, or an empty container."""
    return not jax.tree_util.tree_leaves(node, is_leaf=lambda below: below is not node)


def _name_empty(node: Any) -> str:
    """Return how Orbax names an empty node."""
    # A named tuple is None to it.
    if isinstance(node, tuple) and not hasattr(node, "_fields"):
        return "Tuple"
    return "List" if isinstance(node, list) else "Dict" if isinstance(node, Mapping) else "None"


def _note_key(key: Any) -> JsonObject:
    match key:
        case jax.tree_util.DictKey():
            return {"key": str(key.key), "key_type": _MAPPING}
        case jax.tree_util.GetAttrKey():
            return {"key": str(key.name), "key_type": _MAPPING}
        case jax.tree_util.SequenceKey():
            return {"key": str(key.idx), "key_type": _SEQUENCE}
        case jax.tree_util.FlattenedIndexKey():
            return {"key": str(key.key), "key_type": _SEQUENCE}
    raise StorageError(f"the state has a key of type {type(key).__name__}, and Orbax has no name for that: {key}")


# A state has hundreds of leaves and one or two shardings.
@functools.cache
def _note_sharding(sharding: jax.sharding.Sharding) -> JsonObject:
    """Return where an array lay, as Orbax notes it: for who restores without saying where to."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        device: Any = next(iter(sharding.device_set))
        return {"sharding_type": "SingleDeviceSharding", "device_str": f"{device.platform}:{device.id}"}
    mesh = sharding.mesh
    ids = np.vectorize(lambda device: {"id": device.id}, otypes=[object])(mesh.devices).tolist()
    return {
        "sharding_type": "NamedSharding",
        "shape": list(mesh.devices.shape),
        "axis_names": list(mesh.axis_names),
        "axis_types": [f"AxisType.{kind.name}" for kind in mesh.axis_types],
        "partition_spec": [list(part) if isinstance(part, tuple) else part for part in sharding.spec],
        "device_mesh": {"mesh": ids},
    }
