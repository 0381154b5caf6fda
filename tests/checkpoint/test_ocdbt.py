"""What lies on disk is what TensorStore writes, key by key; TensorStore reads ours, and we read TensorStore's."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from runner.checkpoint import arrays, ocdbt
from runner.checkpoint.array_layout import FILE_BYTES
from runner.checkpoint.arrays import LeafPieces
from runner.checkpoint.ocdbt import Extent, Index
from tests.checkpoint.test_orbax_notes import read_database

DTYPES = ("bool", "int4", "int8", "uint16", "int32", "uint64", "float16", "bfloat16", "float32", "complex64")


def leaf(name: str, shape: tuple[int, ...], chunk: tuple[int, ...] | None = None) -> LeafPieces:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    values = np.random.default_rng(len(shape)).integers(0, 2 if name == "bool" else 7, shape).astype(dtype)
    return LeafPieces(shape, chunk or tuple(max(1, length) for length in shape), [((), values)])


def some_leaves() -> dict[str, LeafPieces]:
    shapes = {"scalar": (), "vector": (5,), "matrix": (4, 3), "nothing": (0, 3)}
    return {
        **{f"{dtype}.{name}": leaf(dtype, shape) for dtype in DTYPES for name, shape in shapes.items()},
        "divided": leaf("float32", (4, 6), (2, 3)),
        "uneven": leaf("int32", (5, 7), (2, 3)),
        "é/漢": leaf("int8", (3,)),
    }


def write_with_tensorstore(folder: Path, leaves: dict[str, LeafPieces], config: dict[str, Any]) -> None:
    """As this was done before; all in one transaction."""
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "config": config}
    transaction = ts.Transaction(atomic=True)
    for name, one in leaves.items():
        spec = {
            "driver": "zarr3",
            "kvstore": {**store, "path": f"{name}/"},
            "metadata": {
                "shape": one.shape,
                "data_type": ts.dtype(one.pieces[0][1].dtype).name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": one.chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "store_data_equal_to_fill_value": True,
        }
        opened = ts.open(spec, create=True, transaction=transaction).result()
        for index, values in one.pieces:
            opened[index or ()].write(values).result()
    transaction.commit_async().result()


def test_every_key_has_the_value_that_tensorstore_gives_it(tmp_path: Path) -> None:
    leaves = some_leaves()
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    arrays.write_leaves(tmp_path / "ours", leaves)
    write_with_tensorstore(tmp_path / "theirs", leaves, {"compression": None})
    ours, theirs = read_database(tmp_path / "ours"), read_database(tmp_path / "theirs")
    assert ours == theirs
    # And our own reader finds all of it in both.
    for name in ("ours", "theirs"):
        folder = tmp_path / name
        found = {
            key.decode(): place if isinstance(place, bytes) else ocdbt.read_extent(folder, place)
            for key, place in ocdbt.read_index(folder).items()
        }
        assert found == theirs
        assert list(found) == sorted(found, key=str.encode)


def test_pieces_make_one_array(tmp_path: Path) -> None:
    values = np.arange(48, dtype=np.float32).reshape(4, 12)
    halves = [(slice(0, 4), slice(0, 6)), (slice(0, 4), slice(6, 12))]
    arrays.write_leaves(tmp_path, {"w": LeafPieces((4, 12), (4, 6), [(index, values[index]) for index in halves])})
    assert arrays.read_leaves(tmp_path)["w"].tobytes() == values.tobytes()


def test_two_arrays_of_one_place_are_refused(tmp_path: Path) -> None:
    twice = [((slice(0, 2),), np.zeros(2)), ((slice(0, 2),), np.ones(2))]
    with pytest.raises(ValueError, match="two arrays are written as w/c/0"):
        arrays.write_leaves(tmp_path, {"w": LeafPieces((2,), (2,), twice)})


def test_a_large_state_is_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.checkpoint.array_layout.FILE_BYTES", 1000)
    assert FILE_BYTES > 1000
    leaves = {f"w{n}": leaf("float32", (100 + n,)) for n in range(9)}
    written = arrays.write_leaves(tmp_path, leaves)
    assert len(written) == 6  # two arrays of some 400 bytes each, and the manifest
    assert {name: (tmp_path / name).stat().st_size for name in written} == {n: f["bytes"] for n, f in written.items()}
    back = arrays.read_leaves(tmp_path)
    assert {name: values.tobytes() for name, values in back.items()} == {
        name: one.pieces[0][1].tobytes() for name, one in leaves.items()
    }


def test_a_tree_of_several_nodes_is_read_by_tensorstore_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of three keys each, and one above them."""
    monkeypatch.setattr(ocdbt, "KEYS_PER_NODE", 3)
    rng, data = random.Random(0), random.Random(1).randbytes(500)
    index: Index = {
        b"a.%d.%s" % (number % 7, rng.randbytes(4).hex().encode()): Extent("d/x", number, 200)
        if number % 3
        else data[: number % 90]
        for number in range(50)
    }
    nodes, encode_manifest = ocdbt.encode_index(index, "d/x", len(data), arrays._compute_crc32c)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x").write_bytes(data + nodes)
    (tmp_path / ocdbt.MANIFEST).write_bytes(encode_manifest(1))
    expected = {
        key.decode(): place if isinstance(place, bytes) else data[place.offset : place.offset + place.length]
        for key, place in index.items()
    }
    assert read_database(tmp_path) == expected
    assert ocdbt.read_index(tmp_path) == index


def test_an_empty_database_is_one(tmp_path: Path) -> None:
    arrays.write_leaves(tmp_path, {})
    assert read_database(tmp_path) == {}
    assert ocdbt.read_index(tmp_path) == {}


def test_what_is_compressed_is_left_to_tensorstore(tmp_path: Path) -> None:
    leaves = {"w": leaf("float32", (100,))}
    write_with_tensorstore(tmp_path, leaves, {"compression": {"id": "zstd"}})
    with pytest.raises(ocdbt.UnknownLayoutError, match="compressed"):
        ocdbt.read_index(tmp_path)
    assert arrays.read_leaf_specs(tmp_path) == {"w": arrays.LeafSpec((100,), "float32")}


@pytest.mark.parametrize("seed", range(20))
def test_damage_is_an_error_or_another_index_and_never_a_crash(tmp_path: Path, seed: int) -> None:
    """Whose checkpoint it is says its seal; a reader must only end, and not with an error of a kind of its own."""
    arrays.write_leaves(tmp_path, some_leaves())
    rng = random.Random(seed)
    contents = {path: path.read_bytes() for path in (tmp_path / ocdbt.MANIFEST, *(tmp_path / "d").iterdir())}
    for _ in range(50):
        path = rng.choice(list(contents))
        damaged = bytearray(contents[path])
        # The index is at the end.
        at = rng.randrange(max(0, len(damaged) - 4000), len(damaged))
        damaged[at : at + rng.randrange(1, 4)] = rng.randbytes(rng.randrange(4))
        path.write_bytes(damaged)
        with suppress(ValueError, OSError):
            ocdbt.read_index(tmp_path)
        path.write_bytes(contents[path])


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    for file in ("/etc/hostname", "../outside", "d/../../outside"):
        with pytest.raises(ValueError, match="lies outside"):
            ocdbt.read_extent(tmp_path, Extent(file, 0, 1))
