"""The copy that a thread writes stays as it is, and takes the memory of one state however often a run saves."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runner.checkpoint import held_state, store
from runner.checkpoint.checkpointer import copy_if_there_is_memory
from runner.checkpoint.held_state import (
    ALIGNMENT,
    HeldState,
    choose_replicas,
    copy_to_host,
    list_pieces,
    wait_for_copy,
)


def state(number: int) -> dict[str, Any]:
    return {
        "w": jnp.full((70, 3), number, jnp.float32),
        "half": jnp.arange(5).astype(jnp.bfloat16) * number,
        "key": jax.random.key(number),
        "step": jnp.int32(number),
        "nothing": jnp.zeros((0, 2)),
    }


def values(held: HeldState) -> list[bytes]:
    return [np.asarray(piece).tobytes() for pieces in held.pieces for _, piece in pieces]


def addresses(held: HeldState) -> list[int]:
    return [piece.ctypes.data for pieces in held.pieces for _, piece in pieces]


def test_a_copy_has_the_bits_of_the_state_in_memory_of_its_own() -> None:
    live = state(3)
    held = copy_to_host(live)
    assert values(held) == values(list_pieces(live))
    assert not set(addresses(held)) & {np.asarray(piece).ctypes.data for ((_, piece),) in list_pieces(live).pieces}
    assert all(address % ALIGNMENT == 0 for address in addresses(held))
    described = held.describe()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), described) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), live
    )


def test_a_copy_on_a_cpu_is_there_when_it_is_handed_over() -> None:
    assert not wait_for_copy(copy_to_host(state(1)))


def test_a_copy_that_is_under_way_is_waited_for() -> None:
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: y @ y / 300, x))
    held = list_pieces({"w": slow(jnp.ones((300, 300)))})
    wait_for_copy(held)
    ((_, value),) = held.pieces[0]
    assert value.is_ready()
    assert not wait_for_copy(held)


def test_a_buffer_is_used_again_once_nothing_refers_to_its_copy_and_not_before() -> None:
    first, second = copy_to_host(state(1)), copy_to_host(state(2))
    before = values(first)
    assert not set(addresses(first)) & set(addresses(second))
    freed = addresses(second)
    del second
    third = copy_to_host(state(3))
    assert addresses(third) == freed
    assert values(first) == before
    assert values(third) == values(list_pieces(state(3)))


def test_a_buffer_of_another_size_is_given_back() -> None:
    small = copy_to_host(state(1))
    del small
    large = copy_to_host({"w": jnp.ones((1000, 100))})
    assert values(large) == [np.ones((1000, 100), np.float32).tobytes()]
    del large
    # Not kept for what needs a hundredth of it.
    assert held_state._SPARE.take(64) is not None
    assert len(held_state._SPARE.take(64)) == 64


def test_no_memory_is_trouble_that_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(held_state, "_SPARE", held_state._SpareBuffer())
    monkeypatch.setattr(mmap, "mmap", refuse)
    held, trouble = copy_if_there_is_memory(copy_to_host, state(1))
    assert held is None
    assert isinstance(trouble, MemoryError)


def test_a_copy_is_written_as_the_state_itself(tmp_path: Path) -> None:
    live = state(4)
    written = [
        store.write_checkpoint(tmp_path / name, value, {}) for name, value in (("a", live), ("b", copy_to_host(live)))
    ]
    assert written[0].table == written[1].table
    # Of the same layout in one process, so that the same bytes have the same checksums.
    of_arrays = [{name: facts for name, facts in one.measured.items() if "/d/" in name} for one in written]
    assert of_arrays[0] == of_arrays[1] != {}


class Device:
    def __init__(self, process_index: int):
        self.process_index = process_index


class Divided:
    """A sharding as several processes see it: which part each device has, and whose it is."""

    is_fully_addressable = False

    def __init__(self, *parts_and_processes: tuple[int, int], count: int):
        self.parts_and_processes, self.count = parts_and_processes, count

    def shard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // self.count, *shape[1:])

    def devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, tuple[slice, ...]]:
        size = shape[0] // self.count
        return {Device(process): (slice(part * size, (part + 1) * size),) for part, process in self.parts_and_processes}


def test_what_every_process_has_is_written_by_all_of_them_in_equal_parts() -> None:
    """Each array by one; what is divided by those that have it."""
    whole = Divided((0, 0), (0, 1), (0, 2), count=1)
    halves = Divided((0, 0), (1, 1), count=2)
    # Both processes have both parts, twice on the devices of each.
    twice = Divided((0, 0), (1, 0), (0, 1), (1, 1), count=2)
    assert choose_replicas(tuple(((size,), 4, whole) for size in (4, 40, 30, 10, 20, 2))) == (1, 0, 1, 2, 2, 2)
    assert choose_replicas((((8,), 4, halves), ((100,), 4, halves))) == (0, 0)
    assert choose_replicas((((8,), 4, twice), ((8,), 4, twice), ((8,), 4, twice))) == (0, 1, 0)
    # What only one of them has counts for it.
    mine = Divided((0, 0), (0, 0), (0, 1), count=1)
    assert choose_replicas((((8,), 4, mine), ((8,), 4, mine), ((8,), 4, mine))) == (0, 2, 0)


def test_one_process_writes_the_first_copy_of_each() -> None:
    assert choose_replicas(tuple((leaf.shape, 4, leaf.sharding) for leaf in jax.tree.leaves(state(1)))) == (0,) * 5
