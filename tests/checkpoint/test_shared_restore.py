"""Several processes restore one checkpoint: each its part, all bytes proven, and process 0 judges. As threads."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runner import hosts
from runner.checkpoint import shared_restore
from runner.checkpoint.record import FileTable, Record
from runner.checkpoint.restore import restore_newest
from runner.checkpoint.seal import seal_checkpoint
from runner.checkpoint.shared_restore import CHANNEL, SharedReader, follow_reading
from runner.errors import RefusedError, StorageError
from runner.hosts.group import Several
from tests.hosts.test_group import World

COUNT = 3


class GroupOfThread:
    """Answers for the process that a thread stands for."""

    def __init__(self) -> None:
        self.mine = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["mine"].group, name)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[GroupOfThread, list[Several]]]:
    world, chosen = World(COUNT), GroupOfThread()
    monkeypatch.setattr(hosts, "_group", chosen)
    yield chosen, world.add_all()
    world.close()


def make_checkpoints(folder: Path) -> Path:
    checkpoints = folder / "checkpoints"
    for step in (10, 20):
        directory = checkpoints / str(step)
        (directory / "state").mkdir(parents=True)
        for part in range(7):
            (directory / f"state/part{part}").write_bytes(bytes([step, part]) * 5000)
        seal_checkpoint(directory, Record(step, "test", {}, 1.0))
    return checkpoints


def restore(
    groups: tuple[GroupOfThread, list[Several]], folder: Path, read: Callable[[int, Path], Any]
) -> tuple[Any, list[Any], list[str]]:
    """Return what process 0 has restored, or its error; what the others have; and what was said."""
    chosen, processes = groups
    said: list[str] = []

    def lead() -> Any:
        chosen.mine.group = processes[0]
        reader = SharedReader(lambda directory: read(0, directory), checksums=True)

        def read_and_prove(directory: Path) -> Any:
            return reader.read(directory)

        def measure(directory: Path, names: Any) -> Any:
            # In a thread of its own, which stands for the same process.
            chosen.mine.group = processes[0]
            return reader.measure(directory, names)

        try:
            found = restore_newest(
                folder / "checkpoints", folder / "quarantine", read_and_prove, said.append, measure=measure
            )
        except Exception as error:
            hosts.agree(CHANNEL, {"step": 0})
            return error
        assert found is not None
        hosts.agree(CHANNEL, {"step": found[0].step})
        return found[0].step, found[1]

    def follow(index: int) -> Any:
        chosen.mine.group = processes[index]
        word, value = follow_reading(lambda directory: read(index, directory))
        return word["step"], value

    with ThreadPoolExecutor(COUNT) as pool:
        leading = pool.submit(lead)
        following = [pool.submit(follow, index) for index in range(1, COUNT)]
        return leading.result(60), [one.result(60) for one in following], said


def read_part(index: int, directory: Path) -> str:
    return f"part {index} of {directory.name}"


def test_each_process_has_its_part_of_the_newest(groups: Any, tmp_path: Path) -> None:
    make_checkpoints(tmp_path)
    led, followed, said = restore(groups, tmp_path, read_part)
    assert led == (20, "part 0 of 20")
    assert followed == [(20, "part 1 of 20"), (20, "part 2 of 20")]
    assert said == []


@pytest.mark.parametrize("part", range(7))
def test_a_flipped_bit_is_found_whoever_reads_it(part: int, groups: Any, tmp_path: Path) -> None:
    path = make_checkpoints(tmp_path) / f"20/state/part{part}"
    content = bytearray(path.read_bytes())
    content[1234] ^= 4
    path.write_bytes(content)
    led, followed, said = restore(groups, tmp_path, read_part)
    assert led == (10, "part 0 of 10")
    assert followed == [(10, "part 1 of 10"), (10, "part 2 of 10")]
    assert f"part{part} is not what was written" in said[0]
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOENT])
def test_trouble_of_one_machine_is_no_damage(
    number: int, groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that is behind, or out of order, on one machine alone: nothing is moved."""
    monkeypatch.setattr("runner.checkpoint.restore.RETRY_SECONDS", (0.0,))

    def read(index: int, directory: Path) -> str:
        if index == 2:
            raise OSError(number, "trouble")
        return read_part(index, directory)

    checkpoints = make_checkpoints(tmp_path)
    led, _, _ = restore(groups, tmp_path, read)
    assert isinstance(led, StorageError)
    assert "cannot be read now" in str(led)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["10", "20"]
    assert not (tmp_path / "quarantine").exists()


def test_trouble_that_passes_is_tried_again(groups: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.checkpoint.restore.RETRY_SECONDS", (0.0,))
    tries: list[int] = []

    def read(index: int, directory: Path) -> str:
        if index == 1 and not tries:
            tries.append(index)
            raise OSError(errno.EIO, "trouble")
        return read_part(index, directory)

    make_checkpoints(tmp_path)
    led, followed, _ = restore(groups, tmp_path, read)
    assert led == (20, "part 0 of 20")
    assert followed[0] == (20, "part 1 of 20")


def test_what_one_process_refuses_is_refused(groups: Any, tmp_path: Path) -> None:
    def read(index: int, directory: Path) -> str:
        if index == 1:
            raise RefusedError("another model")
        return read_part(index, directory)

    make_checkpoints(tmp_path)
    led, _, _ = restore(groups, tmp_path, read)
    assert isinstance(led, RefusedError)
    assert "process 1: another model" in str(led)


def test_what_was_measured_of_another_checkpoint_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that turned out to be no good by its names leaves what was measured of it unread."""

    def measure(directory: Path, names: list[str], *, checksums: bool) -> FileTable:
        return {"state/manifest.ocdbt": {"bytes": int(directory.name)}}

    monkeypatch.setattr(shared_restore, "measure_files", measure)
    reader: SharedReader[None] = SharedReader(lambda directory: None, checksums=False)
    for step in ("20", "10"):
        reader.read(Path(step))
    assert reader.measure(Path("10"), ["state/manifest.ocdbt"]) == {"state/manifest.ocdbt": {"bytes": 10}}
