"""BYTES: the only file that imports orbax. A tree goes to disk in Orbax's own format and comes back as it was.

Settings and their reasons (measured on orbax 0.12.8): OCDBT (13 files instead of thousands) and zarr3 without
compression (half the time to durable, half the time to restore, 8 % more disk on floats). Writing is synchronous: who
does not want to wait hands a held copy to a thread of his own, which costs training less than Orbax's asynchronous
path (0.2 ms for each array, in Python). Reading goes past Orbax, to TensorStore below it, see arrays.py.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from runner.checkpoint import arrays
from runner.checkpoint.arrays import Leaf
from runner.checkpoint.record import PROGRESS, STATE
from runner.errors import ConfigError, RefusedError, StorageError

Tree = Any


def hold(state: Tree) -> Tree:
    """The tree with every array copied to host memory: the device is free to reuse its own. Returns at once."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), state)


def write(directory: Path, state: Tree, progress: Any) -> None:
    """Write a tree of arrays and a JSON value as a checkpoint. Raises StorageError; then nothing has that name."""
    arguments = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(state)}, **{PROGRESS: ocp.args.JsonSave(progress)})
    handler = ocp.CompositeCheckpointHandler(
        **{STATE: ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)},
        **{PROGRESS: ocp.JsonCheckpointHandler()},
    )
    _hush()
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory.resolve(), args=arguments)
    except Exception as error:  # whatever Orbax raises, the state is not on disk
        raise StorageError(_reason(error)) from error
    if not directory.is_dir():
        raise StorageError(f"Orbax wrote nothing at {directory}")


def read(directory: Path, template: Tree) -> Tree:
    """The tree of a checkpoint: structure, shape, dtype, random generator and sharding as the template says.

    Raises RefusedError where what is on disk has another structure, shape, dtype or generator.
    """
    state = directory / STATE
    wanted = by_name(template)
    if differing := differences(arrays.leaves(state), {name: as_leaf(leaf) for name, leaf in wanted.items()}):
        name, (old, new) = next(iter(differing.items()))
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise RefusedError(
            f"checkpoint {directory.name}: {name} is {old or 'absent'} on disk and {new or 'absent'} in this "
            f"configuration{more}; the model or the optimizer has changed since: start a new run, with "
            "init_from=RUN init_from.partial=true to keep the weights that fit"
        )
    stores = arrays.opened(state, wanted)
    pending = {name: _pieces(stores[name], leaf) for name, leaf in wanted.items()}
    loaded = {name: _assembled(pieces, wanted[name]) for name, pieces in pending.items()}
    return jax.tree.unflatten(jax.tree.structure(template), [loaded[name] for name in wanted])


def differing_leaf(directory: Path, state: Tree) -> str | None:
    """The first leaf whose value on disk is not, bit for bit, the one in memory; None where all are."""
    named = by_name(state)
    stores = arrays.opened(directory / STATE, named)
    for name, leaf in named.items():  # one at a time, in order not to hold the state twice
        live = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        saved = np.asarray(stores[name].read().result())
        if (live.shape, live.dtype, live.tobytes()) != (saved.shape, saved.dtype, saved.tobytes()):
            return name
    return None


def differences(saved: dict[str, Leaf], wanted: dict[str, Leaf]) -> dict[str, tuple[Leaf | None, Leaf | None]]:
    """By name, what is on disk and what is wanted, where they are not the same."""
    names = sorted(saved.keys() | wanted.keys())
    return {name: (saved.get(name), wanted.get(name)) for name in names if saved.get(name) != wanted.get(name)}


def as_leaf(leaf: Any) -> Leaf:
    """How an array, or its shape, would lie on disk: a random key as its words."""
    if _is_key(leaf):
        words = jax.eval_shape(jax.random.key_data, leaf)
        return Leaf(tuple(words.shape), str(words.dtype), _generator(leaf.dtype))
    return Leaf(tuple(leaf.shape), str(leaf.dtype))


def by_name(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree under the names they have on disk, in the order of the tree."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _pieces(store: Any, leaf: Any) -> dict[Any, Any]:
    """The parts of an array that the devices of this process need, being read: each once, however many need it."""
    words = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    wanted = _placed(leaf, words).addressable_devices_indices_map(tuple(words.shape)).values()
    return {_plain(index): store[index or ()].read() for index in wanted}


def _assembled(pieces: dict[Any, Any], leaf: Any) -> jax.Array:
    words = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    made = jax.make_array_from_callback(
        tuple(words.shape), _placed(leaf, words), lambda index: pieces[_plain(index)].result()
    )
    return jax.random.wrap_key_data(made, impl=_generator(leaf.dtype)) if _is_key(leaf) else made


def _placed(leaf: Any, words: Any) -> jax.sharding.Sharding:
    """Where an array goes; the words of a key have one dimension more, which is never divided."""
    if leaf is words or leaf.sharding.is_fully_replicated:
        return leaf.sharding
    return jax.sharding.NamedSharding(
        leaf.sharding.mesh, jax.sharding.PartitionSpec(*leaf.sharding.spec, *[None] * (words.ndim - leaf.ndim))
    )


def _plain(index: tuple[slice, ...] | None) -> tuple[tuple[int | None, int | None], ...]:
    """A key for a part of an array; slices are no keys before Python 3.12."""
    return tuple((part.start, part.stop) for part in index or ())


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


@functools.cache
def _generator(dtype: Any) -> str:
    """The name of a random key's implementation, as Orbax notes it."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(functools.partial(jax.random.key, 0, impl=name)).dtype == dtype:
            return name
    raise ConfigError(f"random keys of type {dtype.name} cannot be saved; use threefry2x32, rbg or unsafe_rbg")


def _path(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _reason(error: Exception) -> str:
    """What the operating system said, where it did: TensorStore wraps that in three lines of its own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text.splitlines()[0] if text else type(error).__name__


@functools.cache
def _hush() -> None:
    """Keep a failed save from filling a screen: what Orbax raises it also prints, many times over, with tracebacks.

    (0.12.8: its threads log it, asyncio logs it again for each array, and TensorStore calls back into an event loop
    that is gone by then.)
    """
    echoes = ("_SignalingThread.run() raised an exception", "exception was never retrieved")
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not any(echo in str(record.msg) for echo in echoes))
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
