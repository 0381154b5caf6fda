"""A store of programs gives back what was put, or nothing, whatever lies in its folder and whoever else works there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runner.train.program_store import ProgramStore, find_trouble
from tests.conftest import REPO

KEY, PROGRAM = "jit_step-0123abcd", bytes(range(256)) * 4


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> ProgramStore:
    return ProgramStore(tmp_path, "cafe-8", said.append)


def entry(store: ProgramStore) -> Path:
    (path,) = store._path.glob("*.program")
    return path


def test_what_was_put_is_given_back(store: ProgramStore, said: list[str]) -> None:
    assert store.get(KEY) is None
    for program in (PROGRAM, b"", b"another"):
        store.put(KEY, program)
        assert store.get(KEY) == program
    assert ProgramStore(store._path, "cafe-2", said.append).get(KEY) is None  # under other circumstances
    assert not any((store._path / "pending").iterdir())
    assert entry(store).stat().st_mode & 0o077 == 0
    assert said == []


def test_no_change_of_any_byte_is_given_out(store: ProgramStore, said: list[str]) -> None:
    rng = random.Random(0)
    store.put(KEY, PROGRAM)
    path, good = entry(store), entry(store).read_bytes()
    changes = [bytes([*good[:at], good[at] ^ 1 << rng.randrange(8), *good[at + 1 :]]) for at in range(len(good))]
    changes += [good[:length] for length in range(len(good))]
    changes += [good + b"x", good * 2, b"", rng.randbytes(len(good))]
    for change in changes:
        path.write_bytes(change)
        assert store.get(KEY) is None
        assert not path.exists()
    assert len(said) == len(changes)
    store.put(KEY, PROGRAM)
    assert store.get(KEY) == PROGRAM


def test_an_entry_under_the_name_of_another_is_none(store: ProgramStore) -> None:
    store.put(KEY, PROGRAM)
    first = entry(store)
    store.put("jit_eval-4567", b"other")
    first.replace(next(path for path in store._path.glob("*.program") if path != first))
    assert store.get("jit_eval-4567") is None


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "hard link out"])
def test_what_is_no_file_is_not_read_and_not_written_through(kind: str, store: ProgramStore, tmp_path: Path) -> None:
    store.put(KEY, PROGRAM)
    path, outside = entry(store), tmp_path / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.hardlink_to(outside)
    before = outside.read_bytes()
    assert store.get(KEY) == (PROGRAM if kind == "hard link out" else None)
    store.put(KEY, b"new")
    assert outside.read_bytes() == before
    assert store.get(KEY) == (None if kind == "folder" else b"new")


def test_a_folder_that_others_could_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "a" / "b"
    assert find_trouble(own) is None
    for mode in (0o770, 0o702, 0o1777):
        own.chmod(mode)
        assert str(find_trouble(own)).startswith("others may write in it")
    own.chmod(0o755)
    assert find_trouble(own) is None
    link = tmp_path / "link"
    link.symlink_to(own)
    assert find_trouble(link) is not None
    assert find_trouble(Path("gs:/bucket/programs")) == "it is no folder of this machine"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert str(find_trouble(own)).startswith("it belongs to another user")


def test_an_entry_of_another_user_is_not_loaded(
    store: ProgramStore, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(KEY, PROGRAM)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert store.get(KEY) is None
    assert "is no file of this user's" in said[0]


DYING = """
import os, sys
from pathlib import Path
from runner.train.program_store import ProgramStore
store = ProgramStore(Path(sys.argv[1]), "cafe-8", print)
with store.mark_loading(sys.argv[2]):
    os.kill(os.getpid(), 9)
"""


def test_only_a_dead_loader_condemns_its_entry(store: ProgramStore, said: list[str]) -> None:
    store.put(KEY, PROGRAM)
    with store.mark_loading(KEY), store.mark_loading("jit_missing-0"):
        other = ProgramStore(store._path, "cafe-8", said.append)
        other.remove_fatal_entries()
        assert other.get(KEY) == PROGRAM
        assert len(list((store._path / "pending").iterdir())) == 1  # nothing is loaded that is not there
    assert not any((store._path / "pending").iterdir())
    done = subprocess.run([sys.executable, "-c", DYING, str(store._path), KEY], cwd=REPO)
    assert done.returncode == -9
    store.remove_fatal_entries()
    assert store.get(KEY) is None
    assert said == [
        "compile_cache: jit_step is compiled anew: the process that loaded it last has died of it, or meanwhile"
    ]
    store.put(KEY, PROGRAM)
    store.remove_fatal_entries()  # said and done once
    assert store.get(KEY) == PROGRAM


def test_what_a_dead_writer_left_is_removed(store: ProgramStore, said: list[str]) -> None:
    store.put(KEY, PROGRAM)
    (store._path / "pending" / f"{entry(store).name}~1-1.writing").write_bytes(b"half")
    (store._path / "pending" / "what is this").mkdir()
    store.remove_fatal_entries()
    assert [path.name for path in (store._path / "pending").iterdir()] == ["what is this"]
    assert store.get(KEY) == PROGRAM
    assert said == []


def test_many_at_once_lose_nothing(store: ProgramStore, said: list[str]) -> None:
    """Eight threads, each with a store of its own as another process has, put, get, and begin again."""

    def work(number: int) -> None:
        rng, own = random.Random(number), ProgramStore(store._path, "cafe-8", said.append)
        for _ in range(60):
            key = f"jit_f-{rng.randrange(4)}"
            own.put(key, key.encode() * 1000)
            own.remove_fatal_entries()
            with own.mark_loading(key):
                seen.append(own.get(key) in (None, key.encode() * 1000))

    seen: list[bool] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 480
    assert all(seen)
    assert not [line for line in said if "damaged" in line]  # a reader never sees half an entry


def test_a_limit_removes_what_was_not_used_for_longest(store: ProgramStore) -> None:
    store.max_size = 4000
    for number in range(3):
        store.put(f"jit_f-{number}", PROGRAM)
        os.utime(store._path / f"jit_f-{number}-cafe-8.program", (number, number))
    assert store.get("jit_f-0") == PROGRAM  # used just now
    store.put("jit_f-3", PROGRAM)
    assert [store.get(f"jit_f-{number}") is not None for number in range(4)] == [True, False, True, True]
    store.put("jit_f-4", bytes(5000))
    assert store.get("jit_f-4") is None


def test_a_folder_that_is_gone_or_full_is_told_once(store: ProgramStore, said: list[str]) -> None:
    for path in sorted(store._path.rglob("*"), reverse=True):
        path.rmdir()
    store._path.rmdir()
    for _ in range(3):
        store.put(KEY, PROGRAM)
        assert store.get(KEY) is None
        with store.mark_loading(KEY):
            pass
    assert len(said) == 1
    assert "compiled anew next time" in said[0]
