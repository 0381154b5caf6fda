"""What is restored is proven by the bytes that were read: no file of arrays is read again for its checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from runner.checkpoint import array_reader, proving_reader, store
from runner.checkpoint.ocdbt import Extent
from runner.checkpoint.proving_reader import ProvingReader
from runner.checkpoint.record import FileTable, Record
from runner.checkpoint.restore import restore_newest
from runner.checkpoint.seal import measure_files, seal_checkpoint

TREE = {name: jnp.arange(50_000.0) + number for number, name in enumerate("abc")}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1, 2):
        written = store.write_checkpoint(folder / str(step), TREE, {})
        seal_checkpoint(folder / str(step), Record(step, "test", {}, 0.0), written)
    return folder


def restore(checkpoints: Path, said: list[str]) -> Any:
    reader = ProvingReader(lambda path, measured: store.read_state(path, TREE, measured), checksums=True)
    found = restore_newest(checkpoints, checkpoints.parent / "q", reader.read, said.append, measure=reader.measure)
    assert found is not None
    assert {name: value.tobytes() for name, value in found[1].items()} == {
        name: value.tobytes() for name, value in TREE.items()
    }
    return found[0].step


def test_the_files_of_arrays_are_read_once(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = list[str]()

    def measure(directory: Path, names: list[str], *, checksums: bool) -> FileTable:
        again.extend(names)
        return measure_files(directory, names, checksums=checksums)

    monkeypatch.setattr(proving_reader, "measure_files", measure)
    assert restore(checkpoints, []) == 2
    assert "state/manifest.ocdbt" in again
    assert not [name for name in again if name.startswith("state/d/")]


@pytest.mark.parametrize("where", ["first", "an array", "between arrays", "last"])
def test_a_flipped_bit_anywhere_in_a_file_is_found(checkpoints: Path, where: str) -> None:
    """In what no array takes as well; the checkpoint before is gone on from."""
    (data,) = (checkpoints / "2/state/d").iterdir()
    content = bytearray(data.read_bytes())
    at = {"first": 0, "an array": 300_000, "between arrays": 200_001, "last": len(content) - 1}[where]
    if where == "between arrays":
        index = store.arrays.read_tree(checkpoints / "2/state").index
        ends = sorted(place.offset + place.length for key, place in index.items() if isinstance(place, Extent))
        at = next(end for end in ends if end % 64)
    content[at] ^= 1
    data.write_bytes(content)
    said = list[str]()
    assert restore(checkpoints, said) == 1
    assert len(said) == 1
    assert "checkpoint 2 is not good" in said[0]


def test_bytes_that_only_the_read_saw_are_found(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk gives other bytes while arrays are read, and good ones ever after: what was read is not used."""
    real = array_reader._read_fully

    def read(handle: int, into: memoryview, offset: int) -> None:
        real(handle, into, offset)
        monkeypatch.setattr(array_reader, "_read_fully", real)
        into[8] ^= 1

    monkeypatch.setattr(array_reader, "_read_fully", read)
    assert restore(checkpoints, said := []) == 1
    assert "its checksum differs" in said[0]


def test_what_was_read_before_proves_nothing_of_another_one(checkpoints: Path) -> None:
    reader = ProvingReader(lambda path, measured: store.read_state(path, TREE, measured), checksums=True)
    reader.read(checkpoints / "2")
    names = [path.relative_to(checkpoints / "1").as_posix() for path in (checkpoints / "1").rglob("*/d/*")]
    assert reader.measure(checkpoints / "1", names) == measure_files(checkpoints / "1", names, checksums=True)


def test_nothing_is_proven_where_nothing_is_asked_for(checkpoints: Path) -> None:
    asked = list[FileTable | None]()
    reader = ProvingReader(lambda path, measured: asked.append(measured), checksums=False)
    reader.read(checkpoints / "2")
    assert asked == [None]
