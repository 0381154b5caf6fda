"""What is written beside the arrays is what the installed Orbax writes, note by note, and plain Orbax goes by it."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from runner.checkpoint import store
from runner.checkpoint.record import PROGRESS, STATE
from runner.errors import StorageError

Point = collections.namedtuple("Point", ["x", "y"])
PROGRESS_VALUE = {"position": {"next_index": 3}, "best": None}


@jax.tree_util.register_pytree_node_class
class Box:
    """A node whose children have numbers for names."""

    def __init__(self, *inside: Any):
        self.inside = inside

    def tree_flatten(self) -> tuple[tuple[Any, ...], None]:
        return self.inside, None

    @classmethod
    def tree_unflatten(cls, _: None, inside: tuple[Any, ...]) -> Box:
        return cls(*inside)


def tree() -> dict[str, Any]:
    """Every kind of node that a state of a program may have, and of number that jax has."""
    return {
        "empty": {"named": optax.EmptyState(), "none": None, "tuple": (), "list": [], "dict": {}},
        "nested": {"list": [jnp.ones(3), (jnp.ones((2, 2)), None)], "numbers": {1: jnp.ones(2)}},
        "point": Point(jnp.zeros(()), jnp.ones(1)),
        "opt": optax.adam(1e-3).init({"w": jnp.ones((2, 2))}),
        "box": Box(jnp.ones(1)),
        "keys": {"one": jax.random.key(0), "many": jax.random.split(jax.random.key(1, impl="rbg"), 3)},
        "dtypes": [jnp.arange(6).astype(name).reshape(2, 3) for name in ("bool", "int8", "uint16", "float16")],
        "narrow": [jnp.arange(6).astype(name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4")],
        "complex": jnp.ones(2, "complex64") * 1j,
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same checkpoint by us, and by Orbax."""
    root = tmp_path_factory.mktemp("both")
    store.write_checkpoint(root / "ours", tree(), PROGRESS_VALUE)
    handlers: Any = {
        STATE: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False),
        PROGRESS: ocp.JsonCheckpointHandler(),
    }
    arguments = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree()), PROGRESS: ocp.args.JsonSave(PROGRESS_VALUE)})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as plain:
        plain.save(root / "orbax", args=arguments)
    return root / "ours", root / "orbax"


@pytest.mark.parametrize(
    "name", ["state/_METADATA", "state/_sharding", "state/array_metadatas/process_0", "progress/metadata"]
)
def test_a_note_is_what_orbax_writes(both: tuple[Path, Path], name: str) -> None:
    ours, theirs = (json.loads((directory / name).read_bytes()) for directory in both)
    assert ours == theirs


def test_the_notes_of_the_whole_differ_in_the_time_alone(both: tuple[Path, Path]) -> None:
    ours, theirs = (json.loads((directory / "_CHECKPOINT_METADATA").read_bytes()) for directory in both)
    for times in (ours, theirs):
        assert times.pop("init_timestamp_nsecs") <= times.pop("commit_timestamp_nsecs")
    assert ours == theirs


def test_the_same_files_are_there(both: tuple[Path, Path]) -> None:
    """But for the data: Orbax merges the folder of each process into the whole."""

    def names(directory: Path) -> set[str]:
        below = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
        return {name for name in below if "/d/" not in name and "ocdbt.process_" not in name}

    ours, theirs = map(names, both)
    assert ours == theirs
    for name in (name for name in ours if name.endswith("commit_success.txt")):
        assert (both[0] / name).read_text().startswith("Checkpoint commit was successful to /")


def read_database(folder: Path) -> dict[str, bytes]:
    """Every key of a database with its value, as TensorStore reads it."""
    database = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}).result()
    return {key.decode(): database.read(key).result().value for key in database.list().result()}


def test_the_keys_are_those_of_orbax(both: tuple[Path, Path]) -> None:
    ours, theirs = (read_database(directory / STATE) for directory in both)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * len(jax.tree.leaves(tree()))
    # Orbax puts each chunk into a shard of its own, so that only the kind of an array is the same.
    for key in (key for key in ours if key.endswith("zarr.json")):
        mine, other = json.loads(ours[key]), json.loads(theirs[key])
        assert [mine[name] for name in KIND] == [other[name] for name in KIND]


KIND = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "node_type", "zarr_format")


def test_plain_orbax_restores_it_as_it_restores_its_own(both: tuple[Path, Path]) -> None:
    for restore in (
        lambda path: ocp.PyTreeCheckpointer().restore(path / STATE),
        lambda path: ocp.StandardCheckpointer().restore(path / STATE, abstract()),
    ):
        ours, theirs = (restore(directory) for directory in both)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert (mine.dtype, mine.shape, mine.sharding) == (other.dtype, other.shape, other.sharding)
            assert raw(mine) == raw(other)


def abstract() -> Any:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree())


def raw(leaf: Any) -> bytes:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


def test_a_key_that_orbax_has_no_name_for_is_refused(tmp_path: Path) -> None:
    class Odd:
        pass

    jax.tree_util.register_pytree_with_keys(
        Odd, lambda odd: (((("own", 1), jnp.ones(1)),), None), lambda _, children: Odd()
    )
    with pytest.raises(StorageError, match="has a key of type tuple, and Orbax has no name for that"):
        store.write_checkpoint(tmp_path / "1", {"odd": Odd()}, {})
    assert not (tmp_path / "1").exists()
