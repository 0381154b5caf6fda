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
from runner.checkpoint.held_state import ALIGNMENT, HeldState, copy_to_host, list_pieces, wait_for_copy


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
