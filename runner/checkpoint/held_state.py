"""Copy a state to host memory, for a thread to write while training goes on: all that training waits for.

Where the devices are CPUs their memory is host memory: the arrays are copied side by side into one buffer. The next
save uses the same one again: to touch fresh memory page by page takes several times as long as the copy itself (100 MB:
35 ms against 5), and the memory that a save needs must be there at the next one as well. Everywhere else one transfer
brings all arrays to pinned memory, and does not wait; the next step does, where it is given the same arrays to reuse.
No computation of the devices takes part, so that processes that hold a state among them copy each its own.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from runner.checkpoint.array_layout import ALIGNMENT
from runner.checkpoint.buffers import allocate_buffer
from runner.types import Tree

Index = tuple[slice, ...]  # a part of an array, as jax names it


@dataclass(frozen=True)
class HeldState:
    """Hold a copy of what this process is to write of a state.

    Attributes:
        structure: the structure of the whole tree.
        kinds: shape, type and sharding of each of its arrays, in order.
        pieces: for each array the parts that no other process writes: where each lies in it (`()` for all of it), and
            its values; of a random key, its words. They are good for as long as something refers to this.
    """

    structure: Any
    kinds: Sequence[tuple[Any, jax.sharding.Sharding]]
    pieces: Sequence[Sequence[tuple[Index, Any]]]

    def describe(self) -> Tree:
        """Return the whole tree, with `jax.ShapeDtypeStruct`s in the place of its arrays."""
        leaves = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval, sharding in self.kinds]
        return jax.tree.unflatten(self.structure, leaves)


def list_pieces(state: Tree) -> HeldState:
    """Return what this process is to write of a state, where it lies: nothing is copied."""
    leaves, structure = jax.tree.flatten(state)
    # A state has hundreds of leaves and one or two shardings.
    alone: dict[jax.sharding.Sharding, bool] = {}
    pieces = []
    replicas = choose_replicas(tuple((leaf.shape, leaf.dtype.itemsize, leaf.sharding) for leaf in leaves))
    for leaf, replica in zip(leaves, replicas, strict=True):
        sharding = leaf.sharding
        if sharding not in alone:
            alone[sharding] = len(sharding.device_set) == 1 and sharding.is_fully_addressable
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        if alone[sharding]:
            pieces.append([((), jax.random.key_data(leaf) if is_key else leaf)])
            continue
        # Of parts that lie on several devices, one device's copy is written.
        own = [shard for shard in leaf.addressable_shards if shard.replica_id == replica]
        pieces.append([(shard.index, jax.random.key_data(shard.data) if is_key else shard.data) for shard in own])
    return HeldState(structure, [(leaf.aval, leaf.sharding) for leaf in leaves], pieces)


# A run saves the same structure each time.
@functools.lru_cache(maxsize=4)
def choose_replicas(kinds: tuple[tuple[tuple[int, ...], int, jax.sharding.Sharding], ...]) -> tuple[int, ...]:
    """Return which copy of each array is written, so that every process writes about as much as any other.

    Every process comes to the same answer. Where all devices belong to one process it is the first copy, as jax counts
    them (`Shard.replica_id`).

    Args:
        kinds: of each array its shape, the bytes of an element, and how it is divided.
    """
    chosen = [0] * len(kinds)
    sizes = [math.prod(shape) * itemsize for shape, itemsize, _ in kinds]
    written: Counter[int] = Counter()
    # The largest first: what is small fills up what is left.
    for number in sorted(range(len(kinds)), key=lambda number: -sizes[number]):
        shape, itemsize, sharding = kinds[number]
        if sharding.is_fully_addressable:
            continue
        part = math.prod(sharding.shard_shape(shape)) * itemsize
        copies = _list_copies(sharding, shape)
        # The one that leaves the process which writes most with the least.
        chosen[number] = min(
            range(len(copies)), key=lambda copy: max(written[process] for process in copies[copy].elements())
        )
        for process, count in copies[chosen[number]].items():
            written[process] += count * part
    return tuple(chosen)


@functools.lru_cache(maxsize=1024)
def _list_copies(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[Counter[int], ...]:
    """Return for each copy of an array how many of its parts each process has."""
    # As jax counts them: the devices in order, each has the next copy of its part.
    seen, copies = Counter[Hashable](), list[Counter[int]]()
    devices: Mapping[Any, Index] = sharding.devices_indices_map(shape)
    for device, index in devices.items():
        key = tuple((part.start, part.stop) for part in index)
        if seen[key] == len(copies):
            copies.append(Counter())
        copies[seen[key]][device.process_index] += 1
        seen[key] += 1
    return tuple(copies)


def copy_to_host(state: Tree) -> HeldState:
    """Return a copy of what this process is to write of a state, in host memory.

    Raises MemoryError, RuntimeError where there is no memory for it.
    """
    listed = list_pieces(state)
    values = [piece for pieces in listed.pieces for _, piece in pieces]
    buffer = None
    if all(device.platform == "cpu" for value in values for device in _list_devices(value.sharding)):
        copied, buffer = _copy_arrays([np.asarray(value) for value in values])
    else:
        pinned = [value.sharding.with_memory_kind("pinned_host") for value in values]
        copied = jax.device_put(values, pinned)
    copies = iter(copied)
    pieces = [[(index, next(copies)) for index, _ in pieces] for pieces in listed.pieces]
    held = HeldState(listed.structure, listed.kinds, pieces)
    if buffer is not None:
        weakref.finalize(held, _SPARE.put, buffer).atexit = False
    return held


def wait_for_copy(held: HeldState) -> bool:
    """Wait until a copy is complete; return whether it was not, by now. Raises RuntimeError where it has failed."""
    values = [value for pieces in held.pieces for _, value in pieces if isinstance(value, jax.Array)]
    under_way = [value for value in values if not value.is_ready()]  # type: ignore[attr-defined]
    jax.block_until_ready(under_way)
    return bool(under_way)


# A state has hundreds of leaves and one or two shardings.
@functools.lru_cache(maxsize=64)
def _list_devices(sharding: jax.sharding.Sharding) -> tuple[jax.Device, ...]:
    return tuple(sharding.device_set)


class _SpareBuffer:
    """Keep the buffer of a copy that nothing refers to any more: one, the newest."""

    def __init__(self) -> None:
        self._lock, self._buffer = threading.Lock(), None

    def put(self, buffer: Any) -> None:
        """Keep a buffer in the place of the one that was kept."""
        with self._lock:
            self._buffer = buffer

    def take(self, size: int) -> Any:
        """Return a buffer of at least so many bytes. Raises MemoryError."""
        with self._lock:
            kept, self._buffer = self._buffer, None
        # Twice as large is too large to be kept in the place of what is needed.
        if kept is not None and size <= len(kept) <= 2 * size:
            return kept
        # Given back before another is asked for.
        del kept
        return allocate_buffer(size)


_SPARE = _SpareBuffer()


def _copy_arrays(arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Any]:
    """Return copies of arrays, each at a multiple of ALIGNMENT in one buffer, and the buffer."""
    offsets, size = [], 0
    for array in arrays:
        offsets.append(size)
        size += array.nbytes + -array.nbytes % ALIGNMENT
    buffer = _SPARE.take(size)
    copies = [
        np.ndarray(array.shape, array.dtype, buffer, offset) for array, offset in zip(arrays, offsets, strict=True)
    ]
    # One thread has all of the memory's bandwidth: two take longer (measured).
    for copy, array in zip(copies, arrays, strict=True):
        np.copyto(copy, array)
    return copies, buffer
