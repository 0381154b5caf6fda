"""Files of a run are touched folder by folder and never through a link; what is not whole is not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from runner import files


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file and a folder that no write may reach, and a folder `run` with links to them."""
    (tmp_path / "outside/folder").mkdir(parents=True)
    (tmp_path / "outside/file").write_text("mine\n")
    (tmp_path / "outside/folder/kept").write_text("mine\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/file").symlink_to(tmp_path / "outside/file")
    (tmp_path / "run/.fresh").symlink_to(tmp_path / "outside/file")
    (tmp_path / "run/folder").symlink_to(tmp_path / "outside/folder")
    return tmp_path / "outside"


WRITES: dict[str, Callable[[Path], object]] = {
    "replace": lambda path: files.replace_file(path, "theirs"),
    "append a line": lambda path: files.append_json_line(path, {"theirs": 1}),
    "append text": lambda path: files.append_text(path, "theirs"),
    "make a folder": lambda path: files.make_folder(path / "new"),
    "truncate": lambda path: os.close(files.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)),
    "remove a file": files.remove_file,
    "remove a tree": files.remove_tree,
    "rename to": lambda path: files.rename_path(path.parent.parent / "source", path),
    "rename from": lambda path: files.rename_path(path, path.parent.parent / "target"),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("where", ["file", "fresh", "folder", "folder/kept", "folder/new"])
def test_no_write_goes_through_a_link(outside: Path, name: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("theirs")
    with suppress(OSError):  # or it works on the link itself
        WRITES[name](tmp_path / "run" / where)
    assert (outside / "file").read_text() == "mine\n"
    assert sorted(os.listdir(outside / "folder")) == ["kept"]
    assert (outside / "folder/kept").read_text() == "mine\n"


@pytest.mark.parametrize("where", ["file", "folder/kept"])
def test_nothing_is_read_through_a_link(outside: Path, where: str) -> None:
    with pytest.raises(OSError, match="link") as refused:
        files.read_file(outside.parent / "run" / where)
    assert refused.value.errno == errno.ELOOP


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status.json")
    with pytest.raises(OSError, match="no plain file"):
        files.read_file(tmp_path / "status.json")
    with pytest.raises(OSError):  # noqa: PT011 -- ENXIO or EINVAL, as the system says it
        files.append_text(tmp_path / "status.json", "x")


def test_trouble_with_an_open_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system gives no name with a handle; without one nobody knows whose file it was."""
    (tmp_path / "a").write_text("x")
    opened = len(os.listdir("/dev/fd"))

    def refuse(handle: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", refuse)
        with pytest.raises(PermissionError) as raised:
            files.open_file(tmp_path / "a", os.O_RDONLY)
    assert raised.value.filename == str(tmp_path / "a")
    assert len(os.listdir("/dev/fd")) == opened


def test_what_is_larger_than_allowed_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 101)
    assert len(files.read_file(tmp_path / "large", limit=101)) == 101
    with pytest.raises(OSError, match="larger than 100"):
        files.read_file(tmp_path / "large", limit=100)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"9" * 5000])
def test_json_of_any_bytes_is_an_object_or_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert files.read_json_object(tmp_path / "x.json") is None


def test_what_cannot_be_read_is_not_taken_for_nothing(tmp_path: Path) -> None:
    assert files.read_json_object(tmp_path / "none.json") is None
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError):  # noqa: PT011
        files.read_json_object(tmp_path / "folder.json")


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"whole": 1}\n{"torn": ')
    files.append_json_line(path, {"next": 2})
    assert path.read_text().splitlines() == ['{"whole": 1}', '{"torn": ', '{"next": 2}']


def test_a_write_does_not_make_a_folder_that_has_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.replace_file(tmp_path / "moved/status.json", "{}")
    assert not (tmp_path / "moved").exists()


def test_every_new_folder_is_durable_in_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    files.make_folder(tmp_path / "root/name/run")
    assert synced == [str(tmp_path), str(tmp_path / "root"), str(tmp_path / "root/name")]


def test_a_file_is_replaced_durably_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    files.replace_file(tmp_path / "decisions.json", "{}")
    assert synced == [".decisions.json", tmp_path.name]
