"""BYTES: the only file that imports orbax. A tree goes to disk in Orbax's own format and comes back as it was.

Orbax makes the directory, its metadata and the JSON item; the arrays go through a handler of ours, all of them in one
TensorStore transaction, where its own spends a millisecond of Python on each (arrays.py). Format: OCDBT (three files,
not thousands) and zarr3 without compression (half the time to durable and to restore, 8 % more disk on floats).
Writing is synchronous: who does not want to wait hands a held copy to a thread of his own, which costs training less
than Orbax's asynchronous path (0.2 ms for each array). Reading goes past Orbax as well.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from runner.checkpoint import arrays
from runner.checkpoint.arrays import LeafHandle, LeafPieces, LeafSpec, PendingRead
from runner.checkpoint.record import PROGRESS, STATE, ArrayTable
from runner.checkpoint.seal import WrittenArrays
from runner.checkpoint.trouble import short_reason
from runner.errors import ConfigError, HoldfastError, RefusedError, StorageError
from runner.types import JsonObject, Tree

Leaf = jax.Array | jax.ShapeDtypeStruct  # an array of a tree, or its abstract twin
Index = tuple[slice, ...]  # a part of an array, as jax names it
# Writes arrays by name, and notes about them, into the folder of a tree.
WriteArrays = Callable[[Path, Mapping[str, jax.Array]], None]
IndexKey = tuple[tuple[int | None, int | None], ...]  # a part of an array as the key of a dictionary

READS_IN_FLIGHT = 8  # arrays: enough to keep the disk busy; all at once would hold the state twice in host memory


def copy_to_host(state: Tree) -> Tree:
    """Return the tree with every array copied to host memory, so that the device may reuse its own. Does not wait."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), state)


def write_checkpoint(directory: Path, state: Tree, progress: JsonObject) -> WrittenArrays:
    """Write a tree of arrays and a JSON value as a checkpoint. Returns what the tree has, for the seal to compare.

    Raises StorageError; then nothing has that name.
    """
    # Before anything is written: two arrays of one name are refused here.
    listed = list_arrays(state)
    write_with_orbax(directory, state, progress, _write_arrays)
    return WrittenArrays(listed)


def write_with_orbax(directory: Path, tree: Tree, progress: JsonObject, write_arrays: WriteArrays) -> None:
    """Have Orbax make a checkpoint, in this process alone; `write_arrays` is called for its arrays, and their notes.

    Raises StorageError; then nothing has that name.
    """
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="alone"
    )
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _OneTransactionHandler(write_arrays)))
    options: Any = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False, "type_handler_registry": registry}
    items: Any = {
        STATE: ocp.PyTreeCheckpointHandler(**options, multiprocessing_options=alone),
        PROGRESS: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    together = ocp.CompositeOptions(multiprocessing_options=alone)
    _silence_echoes()
    try:
        arguments = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(tree), PROGRESS: ocp.args.JsonSave(progress)})
        handler = ocp.CompositeCheckpointHandler(composite_options=together, **items)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(directory.resolve(), args=arguments)
    # It says by itself what is wrong.
    except HoldfastError:
        raise
    # Whatever it is that Orbax raises, the state is not on disk.
    except Exception as error:
        raise StorageError(short_reason(error)) from error
    # The name is the proof: `save` returns nothing to go by.
    if not directory.is_dir():
        raise StorageError(f"Orbax wrote nothing at {directory}")


class _OneTransactionHandler(ocp.type_handlers.ArrayHandler):
    """Write all arrays at once in the place of Orbax's own handler, with the notes beside them that it would write.

    Orbax then finds no directory of this process to merge into the whole, which it allows
    (`merge_ocdbt_per_process_files`).
    """

    def __init__(self, write_arrays: WriteArrays):
        super().__init__()
        self._write_arrays = write_arrays

    async def serialize(self, values: Sequence[jax.Array], infos: Any, args: Any = None) -> Sequence[ocp.future.Future]:
        leaves = {info.name: leaf for info, leaf in zip(infos, values, strict=True)}

        async def write() -> None:
            # Once Orbax has made the directory.
            self._write_arrays(Path(infos[0].parent_dir), leaves)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="arrays")]


def _write_arrays(state: Path, leaves: Mapping[str, jax.Array]) -> None:
    """Write every array, and what Orbax notes beside them."""
    words = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in leaves.items()}
    chunks = {name: find_chunk(leaf) for name, leaf in words.items()}
    arrays.write_leaves(
        state, {name: LeafPieces(leaf.shape, chunks[name], [((), np.asarray(leaf))]) for name, leaf in words.items()}
    )
    write_notes(state, leaves, words)


def find_chunk(words: Leaf) -> tuple[int, ...]:
    """Return the shape of the chunks of an array on disk."""
    # What one device holds, so that each device reads whole chunks where the mesh is the same. An array of no numbers
    # has chunks of one all the same: zarr knows none of nothing.
    assert words.sharding is not None
    return tuple(max(1, length) for length in words.sharding.shard_shape(words.shape))


def write_notes(state: Path, leaves: Mapping[str, Leaf], words: Mapping[str, Leaf]) -> None:
    """Write what Orbax notes beside arrays; `words` are the same, random keys as their words."""
    # These two files are private notes of Orbax's: it writes them in its own handler of arrays, which is not called
    # here. Without the first, plain Orbax restores random keys as bare words; without the second it gives numpy arrays
    # to who does not say where each array goes. tests/checkpoint/test_store.py compares them with those that the
    # installed release writes.
    generators = {name: _generator_name(leaf.dtype) for name, leaf in leaves.items() if is_key(leaf)}
    chunks = {name: find_chunk(leaf) for name, leaf in words.items()}
    (state / "array_metadatas").mkdir()
    noted_shapes = {"array_metadatas": _note_shapes(words, chunks, generators)}
    (state / "array_metadatas/process_0").write_text(json.dumps(noted_shapes))
    (state / "_sharding").write_text(json.dumps(_note_shardings(words)))


def _note_shapes(
    words: Mapping[str, Leaf], chunks: Mapping[str, tuple[int, ...]], generators: Mapping[str, str]
) -> list[JsonObject]:
    """Return what Orbax notes of each array: the shape of its chunks, and what kind of random key its words are."""
    notes = []
    for name in words:
        is_key = name in generators
        note = {
            "param_name": name,
            "write_shape": chunks[name],
            "chunk_shape": chunks[name],
            "ext_metadata": {"random_key_impl": generators[name]} if is_key else None,
        }
        notes.append({"array_metadata": note})
    return notes


def _note_shardings(words: Mapping[str, Leaf]) -> dict[str, str]:
    """Return where each array lay, as Orbax notes it: for who restores without saying where to."""
    return {
        base64.b64encode(name.encode()).decode(): json.dumps(_note_sharding(leaf.sharding))
        for name, leaf in words.items()
    }


# A state has hundreds of leaves and one or two shardings.
@functools.cache
def _note_sharding(sharding: jax.sharding.Sharding) -> JsonObject:
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


def read_state(directory: Path, template: Tree) -> Tree:
    """Return the tree of a checkpoint: structure, shape, dtype, random generator and sharding as the template says.

    Raises RefusedError where what is on disk has another structure, shape, dtype or generator.
    """
    state = directory / STATE
    wanted = name_leaves(template)
    wanted_specs = {name: describe_leaf(leaf) for name, leaf in wanted.items()}
    if differing := compare_leaves(arrays.read_leaf_specs(state), wanted_specs):
        name, (old, new) = next(iter(differing.items()))
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise RefusedError(
            f"checkpoint {directory.name}: {name} is {old or 'absent'} on disk and {new or 'absent'} in this "
            f"configuration{more}; the model or the optimizer has changed since: start a new run, with "
            "init_from=RUN init_from.partial=true to keep the weights that fit"
        )
    reading = deque[tuple[dict[IndexKey, PendingRead], Leaf]]()
    loaded = []
    with arrays.open_leaves(state, wanted) as stores:
        # A window of reads: the next ones go on while the oldest is put on its devices.
        for name, leaf in wanted.items():
            reading.append((_start_reading(stores[name], leaf), leaf))
            if len(reading) == READS_IN_FLIGHT:
                loaded.append(_assemble_array(*reading.popleft()))
        loaded += [_assemble_array(*one) for one in reading]
    return jax.tree.unflatten(jax.tree.structure(template), loaded)


def find_differing_leaf(directory: Path, state: Tree) -> str | None:
    """Return the first leaf whose value on disk is not, bit for bit, the one in memory; None where all are."""
    named = name_leaves(state)
    with arrays.open_leaves(directory / STATE, named) as stores:
        # One at a time, in order not to hold the state twice.
        for name, leaf in named.items():
            live = np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
            saved = np.asarray(stores[name].read().result())
            # Bytes, not values: NaN differs from itself, and -0.0 is 0.0.
            if (live.shape, live.dtype, live.tobytes()) != (saved.shape, saved.dtype, saved.tobytes()):
                return name
    return None


def compare_leaves(
    saved: dict[str, LeafSpec], wanted: dict[str, LeafSpec]
) -> dict[str, tuple[LeafSpec | None, LeafSpec | None]]:
    """Return, by name, what is on disk and what is wanted, where they are not the same; None where it is absent."""
    names = sorted(saved.keys() | wanted.keys())
    return {name: (saved.get(name), wanted.get(name)) for name in names if saved.get(name) != wanted.get(name)}


def describe_leaf(leaf: Leaf) -> LeafSpec:
    """Return how an array, or an abstract one, would lie on disk: a random key as its words."""
    if is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, leaf)
        return LeafSpec(tuple(words.shape), str(words.dtype), _generator_name(leaf.dtype))
    return LeafSpec(tuple(leaf.shape), str(leaf.dtype))


def list_arrays(tree: Tree) -> ArrayTable:
    """Return type and shape of every array of a tree, by its name on disk. Raises StorageError as `name_leaves`."""
    leaves, structure = jax.tree.flatten(tree)
    return dict(_list_arrays(structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)))


# A run saves the same structure each time.
@functools.lru_cache(maxsize=4)
def _list_arrays(structure: Any, kinds: tuple[tuple[tuple[int, ...], Any], ...]) -> ArrayTable:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in kinds]
    named = name_leaves(jax.tree.unflatten(structure, leaves))
    return {name: str(describe_leaf(leaf)) for name, leaf in named.items()}


def name_leaves(tree: Tree) -> dict[str, jax.Array]:
    """Return the leaves of a tree under the names they have on disk, in the order of the tree.

    Raises StorageError where two have the same: on disk the second would take the place of the first.
    """
    named: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _join_path(path)
        if name in named:
            raise StorageError(f"two arrays of the state are called {name}; rename one (a dot in a name joins a path)")
        named[name] = leaf
    return named


def _start_reading(store: LeafHandle, leaf: Leaf) -> dict[IndexKey, PendingRead]:
    """Start to read the parts of an array that the devices of this process need: each once, however many need it."""
    words = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    wanted = words_sharding(leaf, words).addressable_devices_indices_map(tuple(words.shape)).values()
    return {_hashable(index): store[index or ()].read() for index in wanted}


def _assemble_array(pieces: Mapping[IndexKey, PendingRead], leaf: Leaf) -> jax.Array:
    """Wait for the parts of an array, and put each on the devices that need it."""
    words = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    made = jax.make_array_from_callback(
        tuple(words.shape), words_sharding(leaf, words), lambda index: pieces[_hashable(index)].result()
    )
    return jax.random.wrap_key_data(made, impl=_generator_name(leaf.dtype)) if is_key(leaf) else made


def words_sharding(leaf: Leaf, words: Leaf) -> jax.sharding.Sharding:
    """Return where an array goes; the words of a key have one dimension more, which is never divided."""
    sharding = leaf.sharding
    if leaf is words or sharding.is_fully_replicated:
        return sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    spec = jax.sharding.PartitionSpec(*sharding.spec, *[None] * (words.ndim - leaf.ndim))
    return jax.sharding.NamedSharding(sharding.mesh, spec)


def _hashable(index: Index | None) -> IndexKey:
    """Return a dictionary key for a part of an array; slices cannot be hashed before Python 3.12."""
    return tuple((part.start, part.stop) for part in index or ())


def is_key(leaf: Leaf) -> bool:
    """Tell whether an array holds random keys."""
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


@functools.cache
def _generator_name(dtype: np.dtype) -> str:
    """Return the name of a random key's implementation, as Orbax notes it. Raises ConfigError for any other."""
    # By its type, for the leaf may be abstract: `jax.random.key_impl` wants an array.
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(functools.partial(jax.random.key, 0, impl=name)).dtype == dtype:
            return name
    raise ConfigError(f"random keys of type {dtype.name} cannot be saved; use threefry2x32, rbg or unsafe_rbg")


def _join_path(path: tuple[object, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


@functools.cache
def _silence_echoes() -> None:
    """Keep a failed save from filling a screen: what Orbax raises it also prints, many times over, with tracebacks.

    On 0.12.8 its threads log it, asyncio logs it again for each array, and TensorStore calls back into an event loop
    that is gone by then; what was never begun warns that nobody waited for it. Cached, so that the filters are
    installed once in a process.
    """
    echoes = ("_SignalingThread.run() raised an exception", "exception was never retrieved", "Skipping merge of OCDBT")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not any(echo in str(record.msg) for echo in echoes))
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    previous_hook = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        # The second: of a loop that was never begun, for want of open files.
        said = str(unraisable.exc_value)
        if said != "Event loop is closed" and "has no attribute '_ssock'" not in said:
            previous_hook(unraisable)

    sys.unraisablehook = hook
