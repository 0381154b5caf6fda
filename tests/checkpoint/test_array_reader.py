"""Arrays that lie side by side are read at once, whatever else is in between; a file that ends early is trouble."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from runner.checkpoint import array_layout, array_reader, arrays, store, writeback
from runner.checkpoint.array_reader import MISALIGNMENT, SavedPart, iter_parts
from runner.checkpoint.arrays import LeafPieces
from runner.checkpoint.ocdbt import Extent
from runner.checkpoint.seal import measure_files


def written(folder: Path, count: int, length: int) -> list[np.ndarray]:
    values = [np.random.default_rng(number).standard_normal(length) for number in range(count)]
    arrays.write_leaves(
        folder, {f"w{n:03}": LeafPieces((length,), (length,), [((), one)]) for n, one in enumerate(values)}
    )
    return values


def parts_of(folder: Path) -> list[SavedPart]:
    tree = arrays.read_tree(folder)
    found = [grid.locate(tree.index, name, ()) for name, grid in tree.grids.items()]
    return [part for part in found if part is not None]


def read_all(folder: Path, parts: list[SavedPart]) -> list[bytes]:
    found: dict[int, bytes] = {}
    for some in iter_parts(folder, parts):
        # They are good until more is asked for.
        found |= {number: values.tobytes() for number, values in some.items()}
    return [found[number] for number in sorted(found)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each read."""
    sizes, real = list[int](), os.preadv

    def count(handle: int, buffers: Any, offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    return sizes


def test_many_small_arrays_are_one_read(tmp_path: Path, reads: list[int]) -> None:
    values = written(tmp_path, 300, 10)
    assert read_all(tmp_path, parts_of(tmp_path)) == [one.tobytes() for one in values]
    assert reads == [300 * 128 - 48]  # 80 bytes each, at multiples of 64


def test_a_read_has_a_limit_and_an_array_may_be_larger(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_reader, "RUN_BYTES", 1000)
    values = written(tmp_path, 9, 50)
    assert read_all(tmp_path, parts_of(tmp_path)) == [one.tobytes() for one in values]
    assert reads == [848] * 4 + [400]
    reads.clear()
    monkeypatch.setattr(array_reader, "RUN_BYTES", 100)
    assert read_all(tmp_path, parts_of(tmp_path)) == [one.tobytes() for one in values]
    assert reads == [400] * 9


def test_what_is_far_apart_is_not_read_along(tmp_path: Path, reads: list[int]) -> None:
    values = written(tmp_path, 9, 1000)
    parts = parts_of(tmp_path)
    assert read_all(tmp_path, [parts[0], parts[8], parts[4]]) == [values[n].tobytes() for n in (0, 8, 4)]
    assert reads == [8000] * 3


def test_arrays_are_read_in_the_order_of_the_file(tmp_path: Path, reads: list[int]) -> None:
    values = written(tmp_path, 9, 1000)
    parts = parts_of(tmp_path)
    assert read_all(tmp_path, parts[::-1]) == [one.tobytes() for one in values[::-1]]
    assert reads == [9 * 8000]


@pytest.mark.parametrize("most", [100, 1 << 20])
@pytest.mark.parametrize("chosen", [slice(None), slice(None, None, -1), slice(2, 7, 3)])
def test_the_checksum_of_a_file_is_taken_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: slice, most: int
) -> None:
    """Of all of it, whatever is read of it, whether an array is longer than a slice, and where two share their bytes."""
    monkeypatch.setattr(array_reader, "RUN_BYTES", most)
    monkeypatch.setattr(array_reader, "SLICE_BYTES", 3000)
    values = written(tmp_path, 9, 1000)
    parts = [part for part in parts_of(tmp_path)[chosen] for _ in range(2)]
    found, measured = dict[int, bytes](), dict[str, Any]()
    for some in iter_parts(tmp_path, parts, measured):
        found |= {number: one.tobytes() for number, one in some.items()}
    assert [found[number] for number in range(len(parts))] == [one.tobytes() for one in values[chosen] for _ in "ab"]
    (data,) = (tmp_path / "d").iterdir()
    assert measured == measure_files(tmp_path, [f"d/{data.name}"], checksums=True)


def test_no_array_of_ours_is_copied_twice(tmp_path: Path) -> None:
    """It lies where jax copies it, and in what was read into."""
    written(tmp_path, 5, 1000)
    for some in iter_parts(tmp_path, parts_of(tmp_path)):
        assert {values.ctypes.data % 64 for values in some.values()} == {MISALIGNMENT}
        assert not any(values.flags.owndata for values in some.values())


def test_what_was_read_into_is_used_again_and_no_array_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where arrays lie in a file is their writer's business: as older code had it, one after the other, anywhere."""
    monkeypatch.setattr(array_layout, "ALIGNMENT", 1)
    monkeypatch.setattr(array_reader, "RUN_BYTES", 400)
    kinds = [(np.float32, 12), (np.uint8, 7), (np.int32, 16), (np.float64, 5), (np.float32, 20)]
    state = {
        f"w{number:03}": jnp.asarray(np.arange(number, number + length).astype(dtype))
        for number, (dtype, length) in enumerate(kinds * 60)
    }
    arrays._plan_layout.cache_clear()
    store.write_checkpoint(tmp_path / "1", state, {})
    index = arrays.read_tree(tmp_path / "1/state").index
    offsets = [place.offset % 64 for key, place in index.items() if b"/c/" in key and isinstance(place, Extent)]
    # Wherever a buffer begins, some arrays lie where jax would use them in place.
    assert set(offsets) >= set(range(0, 64, 4))
    restored = store.read_state(tmp_path / "1", state)
    assert [name for name in state if restored[name].tobytes() != state[name].tobytes()] == []


def test_a_part_that_is_no_chunk_is_left_to_tensorstore(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays.write_leaves(tmp_path, {"w": LeafPieces((4, 6), (2, 6), [((), values)])})
    tree = arrays.read_tree(tmp_path)
    grid = tree.grids["w"]
    assert grid.locate(tree.index, "w", ()) is None
    assert grid.locate(tree.index, "w", (slice(1, 3), slice(0, 6))) is None
    below = grid.locate(tree.index, "w", (slice(2, 4), slice(0, 6)))
    assert below is not None
    assert read_all(tmp_path, [below]) == [values[2:].tobytes()]


def test_a_file_that_ends_early_is_trouble(tmp_path: Path) -> None:
    written(tmp_path, 2, 1000)
    parts = parts_of(tmp_path)
    (data,) = (tmp_path / "d").iterdir()
    data.write_bytes(data.read_bytes()[:9000])
    with pytest.raises(OSError, match="ends too early"):
        read_all(tmp_path, parts)


# --- and written ---


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_a_write_that_takes_a_part_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = os.writev

    def take(handle: int, buffers: list[Any]) -> int:
        return real(handle, [buffers[0][:most]])

    monkeypatch.setattr(os, "writev", take)
    buffers = [memoryview(os.urandom(length)) for length in (0, 3, 2000, 1, 64)]
    found = writeback.write_buffers(tmp_path / "file", buffers)
    assert (tmp_path / "file").read_bytes() == b"".join(buffers)
    assert found == measure_files(tmp_path, ["file"], checksums=True)["file"]


def test_large_buffers_are_written_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "SLICE_BYTES", 1000)
    monkeypatch.setattr(writeback, "PARALLEL_BYTES", 1000)
    buffers = [memoryview(os.urandom(length)) for length in (999, 2, 5000, 0, 1)]
    found = writeback.write_buffers(tmp_path / "file", buffers)
    assert (tmp_path / "file").read_bytes() == b"".join(buffers)
    assert found == measure_files(tmp_path, ["file"], checksums=True)["file"]


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"other")
    with pytest.raises(FileExistsError):
        writeback.write_buffers(tmp_path / "file", [memoryview(b"new")])
    assert (tmp_path / "file").read_bytes() == b"other"
