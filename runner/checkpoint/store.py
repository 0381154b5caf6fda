"""BYTES: a tree goes to disk in Orbax's own format, readable without a line of ours, and comes back as it was.

Orbax itself is not asked: it spends a millisecond of Python on each array, either way. The arrays are written as the
bytes that they are (arrays.py), and beside them the notes that Orbax would write (orbax_notes.py). Format: OCDBT and
zarr3 without compression (half the time to durable and to restore, 8 % more disk on floats). Writing is synchronous:
who does not want to wait hands a held copy (held_state.py) to a thread of his own.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runner import files
from runner.checkpoint import arrays
from runner.checkpoint.array_reader import SavedPart, iter_parts
from runner.checkpoint.arrays import LeafHandle, LeafPieces, LeafSpec, PendingRead
from runner.checkpoint.held_state import HeldState, Index, list_pieces

# A store copies as well as it writes and reads.
from runner.checkpoint.held_state import copy_to_host as copy_to_host
from runner.checkpoint.held_state import wait_for_copy as wait_for_copy
from runner.checkpoint.orbax_notes import NotedArray, encode_tree_notes, note_checkpoint
from runner.checkpoint.record import STATE, ArrayTable, FileTable
from runner.checkpoint.seal import WrittenArrays, measure_files
from runner.checkpoint.trouble import short_reason
from runner.errors import ConfigError, HoldfastError, RefusedError, StorageError
from runner.types import JsonObject, Tree

Leaf = jax.Array | jax.ShapeDtypeStruct  # an array of a tree, or its abstract twin
# Writes arrays into the folder of a tree; returns the files that it has taken the checksums of.
WriteArrays = Callable[[Path], FileTable]
IndexKey = tuple[tuple[int | None, int | None], ...]  # a part of an array as the key of a dictionary

READS_IN_FLIGHT = 8  # arrays: enough to keep the disk busy; all at once would hold the state twice in host memory


@dataclass(frozen=True)
class DescribedTree:
    """Say how a tree lies on disk.

    Attributes:
        names: of its arrays, in order.
        words: shape, type and sharding of each; of a random key, those of its words.
        chunks: the shape of the chunks of each.
        table: type and shape of each, by its name.
        notes: what Orbax writes beside them: files by name, relative to the folder of the tree.
    """

    names: tuple[str, ...]
    words: tuple[Leaf, ...]
    chunks: tuple[tuple[int, ...], ...]
    table: ArrayTable
    notes: Mapping[str, bytes]


def describe_tree(held: HeldState) -> DescribedTree:
    """Return how a tree lies on disk. Raises StorageError where two arrays have the same name there."""
    return _describe_tree(held.structure, tuple((aval.shape, aval.dtype, sharding) for aval, sharding in held.kinds))


# A run saves the same structure each time.
@functools.lru_cache(maxsize=4)
def _describe_tree(structure: Any, kinds: tuple[tuple[tuple[int, ...], Any, Any], ...]) -> DescribedTree:
    leaves = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in kinds]
    tree = jax.tree.unflatten(structure, leaves)
    named = name_leaves(tree)
    words = tuple(_describe_words(leaf) for leaf in leaves)
    chunks = tuple(map(find_chunk, words))
    noted = [
        NotedArray(name, chunk, _generator_name(leaf.dtype) if is_key(leaf) else None, word.sharding)
        for name, leaf, word, chunk in zip(named, leaves, words, chunks, strict=True)
    ]
    table = {name: str(describe_leaf(leaf)) for name, leaf in named.items()}
    return DescribedTree(tuple(named), words, chunks, table, encode_tree_notes(tree, noted))


def _describe_words(leaf: Leaf) -> Leaf:
    """Return an array, or of a random key what its words are."""
    if not is_key(leaf):
        return leaf
    words = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=words_sharding(leaf, words))


def write_checkpoint(directory: Path, state: Tree, progress: JsonObject) -> WrittenArrays:
    """Write a tree of arrays, or a copy of one, and a JSON value as a checkpoint; return what the tree has.

    Raises StorageError; then nothing has that name.
    """
    held = state if isinstance(state, HeldState) else list_pieces(state)
    # Before anything is written: two arrays of one name are refused here.
    tree = describe_tree(held)

    def write_arrays(folder: Path) -> FileTable:
        return arrays.write_leaves(folder, list_leaves(held, tree))

    return write_tree(directory, tree, progress, write_arrays)


def write_tree(directory: Path, tree: DescribedTree, progress: JsonObject, write_arrays: WriteArrays) -> WrittenArrays:
    """Make a checkpoint as Orbax makes it; `write_arrays` writes its arrays into the folder of the tree.

    Returns what the tree has, and the files that `write_arrays` has taken the checksums of. Raises StorageError; then
    nothing has that name.
    """
    began = time.time_ns()
    try:
        directory.mkdir()
        try:
            (directory / STATE / "array_metadatas").mkdir(parents=True)
            measured = write_arrays(directory / STATE)
            for name, content in tree.notes.items():
                (directory / STATE / name).write_bytes(content)
            note_checkpoint(directory, progress, began)
        except BaseException:
            files.remove_tree(directory)
            raise
    # It says by itself what is wrong.
    except HoldfastError:
        raise
    # TensorStore and jax say everything with errors of their own, also what the operating system had told them.
    except Exception as error:
        raise StorageError(short_reason(error)) from error
    return WrittenArrays(tree.table, {f"{STATE}/{name}": facts for name, facts in (measured or {}).items()})


def list_leaves(held: HeldState, tree: DescribedTree) -> dict[str, LeafPieces]:
    """Return what this process is to write of each array, by its name; waits until it is in host memory."""
    return {
        name: LeafPieces(words.shape, chunk, [(index, np.asarray(values)) for index, values in pieces])
        for name, words, chunk, pieces in zip(tree.names, tree.words, tree.chunks, held.pieces, strict=True)
        if pieces
    }


def find_chunk(words: Leaf) -> tuple[int, ...]:
    """Return the shape of the chunks of an array on disk."""
    # What one device holds, so that each device reads whole chunks where the mesh is the same. An array of no numbers
    # has chunks of one all the same: zarr knows none of nothing.
    assert words.sharding is not None
    return tuple(max(1, length) for length in words.sharding.shard_shape(words.shape))


def read_state(directory: Path, template: Tree, measured: FileTable | None = None) -> Tree:
    """Return the tree of a checkpoint: structure, shape, dtype, random generator and sharding as the template says.

    Where `measured` is given it takes the sizes and checksums of the files that were read, by their names. Raises
    RefusedError where what is on disk has another structure, shape, dtype or generator.
    """
    state = directory / STATE
    wanted = name_leaves(template)
    saved = arrays.read_tree(state)
    wanted_specs = {name: describe_leaf(leaf) for name, leaf in wanted.items()}
    if differing := compare_leaves(saved.specs, wanted_specs):
        name, (old, new) = next(iter(differing.items()))
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise RefusedError(
            f"checkpoint {directory.name}: {name} is {old or 'absent'} on disk and {new or 'absent'} in this "
            f"configuration{more}; the model or the optimizer has changed since: start a new run, with "
            "init_from=RUN init_from.partial=true to keep the weights that fit"
        )
    words = {name: _describe_words(leaf) for name, leaf in wanted.items()}
    # What goes to one device is mostly one chunk, as it came from one. TensorStore puts the rest together.
    parts = {
        name: saved.grids[name].locate(saved.index, name, ())
        for name, leaf in words.items()
        if _is_alone(leaf.sharding)
    }
    direct = {name: part for name, part in parts.items() if part is not None}
    found: FileTable | None = None if measured is None else {}
    loaded = dict(_iter_direct(state, words, direct, found))
    with ThreadPoolExecutor(1) as pool:
        divided = {name: leaf for name, leaf in words.items() if name not in direct}
        if divided and found is not None:
            # TensorStore reads these files, and shows nobody their bytes: they are measured beside it.
            pool.submit(_measure_others, state, found)
        loaded |= _read_divided(state, divided)
    if measured is not None and found is not None:
        measured |= {f"{STATE}/{name}": facts for name, facts in found.items()}
    leaves = [
        jax.random.wrap_key_data(loaded[name], impl=_generator_name(leaf.dtype)) if is_key(leaf) else loaded[name]
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


# A state has hundreds of leaves and one or two shardings.
@functools.lru_cache(maxsize=64)
def _is_alone(sharding: jax.sharding.Sharding) -> bool:
    """Tell whether an array is on one device, of this process, as a whole."""
    return len(sharding.device_set) == 1 and sharding.is_fully_addressable


def _iter_direct(
    state: Path, words: Mapping[str, Leaf], parts: Mapping[str, SavedPart], measured: FileTable | None
) -> Iterator[tuple[str, jax.Array]]:
    """Yield arrays of which each goes to one device as it lies on disk, with their names."""
    names = list(parts)
    for values in iter_parts(state, list(parts.values()), measured):
        fresh = [_put_array(value, words[names[number]].sharding) for number, value in values.items()]
        # What was read is in memory that is used again.
        jax.block_until_ready(fresh)
        yield from zip((names[number] for number in values), fresh, strict=True)


def _put_array(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return an array on its one device. Half the work of `jax.device_put` (2,000 arrays: 22 ms against 45)."""
    return jax.make_array_from_callback(value.shape, sharding, lambda _: value)


def _measure_others(state: Path, found: FileTable) -> None:
    """Measure the files of arrays that are not measured yet. What cannot be read is left to whoever asks for it."""
    with suppress(OSError):
        names = sorted(f"d/{path.name}" for path in (state / "d").iterdir())
        found |= measure_files(state, [name for name in names if name not in found], checksums=True)


def _read_divided(state: Path, words: Mapping[str, Leaf]) -> dict[str, jax.Array]:
    """Return arrays of which each device needs a part of its own."""
    reading = deque[tuple[str, dict[IndexKey, PendingRead]]]()
    loaded = {}
    if not words:
        return {}
    with arrays.open_leaves(state, words) as stores:

        def finish() -> None:
            name, pieces = reading.popleft()
            loaded[name] = _assemble_array(pieces, words[name])

        # A window of reads: the next ones go on while the oldest is put on its devices.
        for name, leaf in words.items():
            reading.append((name, _start_reading(stores[name], leaf)))
            if len(reading) == READS_IN_FLIGHT:
                finish()
        while reading:
            finish()
    return loaded


def find_differing_leaf(directory: Path, state: Tree) -> str | None:
    """Return the first leaf whose value on disk is not, bit for bit, the one in memory; None where all are."""
    held = state if isinstance(state, HeldState) else list_pieces(state)
    return find_differing_part(directory / STATE, list_leaves(held, describe_tree(held)))


def find_differing_part(folder: Path, leaves: Mapping[str, LeafPieces]) -> str | None:
    """Return an array of which a part on disk is not, bit for bit, the one in memory; None where all are."""
    with arrays.open_leaves(folder, leaves) as opened:
        # One at a time, in order not to hold the state twice.
        for name, leaf in leaves.items():
            for index, live in leaf.pieces:
                saved = np.asarray(opened[name][index or ()].read().result())
                # Bytes, not values: NaN differs from itself, and -0.0 is 0.0.
                if (live.shape, live.dtype, live.tobytes()) != (saved.shape, saved.dtype, saved.tobytes()):
                    return name
    return None


# numpy puts the name of a type together each time.
_name_dtype = functools.cache(str)


def compare_leaves(
    saved: Mapping[str, LeafSpec], wanted: Mapping[str, LeafSpec]
) -> dict[str, tuple[LeafSpec | None, LeafSpec | None]]:
    """Return, by name, what is on disk and what is wanted, where they are not the same; None where it is absent."""
    names = sorted(saved.keys() | wanted.keys())
    return {name: (saved.get(name), wanted.get(name)) for name in names if saved.get(name) != wanted.get(name)}


def describe_leaf(leaf: Leaf) -> LeafSpec:
    """Return how an array, or an abstract one, would lie on disk: a random key as its words."""
    if is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, leaf)
        return LeafSpec(tuple(words.shape), str(words.dtype), _generator_name(leaf.dtype))
    return LeafSpec(tuple(leaf.shape), _name_dtype(leaf.dtype))


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
    wanted = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    return {_hashable(index): store[index or ()].read() for index in wanted}


def _assemble_array(pieces: Mapping[IndexKey, PendingRead], leaf: Leaf) -> jax.Array:
    """Wait for the parts of an array, and put each on the devices that need it."""
    return jax.make_array_from_callback(
        tuple(leaf.shape), leaf.sharding, lambda index: pieces[_hashable(index)].result()
    )


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
    return _is_key_type(leaf.dtype)


@functools.cache
def _is_key_type(dtype: Any) -> bool:
    return bool(jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key))


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
