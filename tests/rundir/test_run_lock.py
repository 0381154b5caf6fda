"""A run is one process's: its lock is looked at again, and a lease stands in where storage shares no locks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import LostRunError, RefusedError, StorageError
from runner.rundir import lease
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "outputs/default/run")


def remove_lock(run_dir: RunDir) -> None:
    run_dir.lock.unlink()


def replace_lock(run_dir: RunDir) -> None:
    run_dir.lock.unlink()
    run_dir.lock.touch()


def move_run(run_dir: RunDir) -> None:
    run_dir.path.rename(run_dir.path.with_name("moved"))


def remove_run(run_dir: RunDir) -> None:
    shutil.rmtree(run_dir.path)


def copy_run_in_place(run_dir: RunDir) -> None:
    move_run(run_dir)
    shutil.copytree(run_dir.path.with_name("moved"), run_dir.path)


def link_run_in_place(run_dir: RunDir) -> None:
    move_run(run_dir)
    run_dir.path.symlink_to("moved")


def take_lease_over(run_dir: RunDir) -> None:
    owner = json.loads(run_dir.lease.read_text())
    run_dir.lease.write_text(json.dumps({**owner, "token": "another", "host": "elsewhere"}))


@pytest.mark.parametrize(
    "harm",
    [remove_lock, replace_lock, move_run, remove_run, copy_run_in_place, link_run_in_place, take_lease_over],
)
def test_the_holder_notices_what_was_done_to_its_run(run_dir: RunDir, harm: Callable[[RunDir], None]) -> None:
    with lock_run(run_dir) as lock:
        lock.check()
        harm(run_dir)
        with pytest.raises(LostRunError, match="taken from this process") as lost:
            lock.prove()
    assert lost.value.exit_code == 3


def test_a_lock_that_is_given_back_leaves_no_lease(run_dir: RunDir) -> None:
    with lock_run(run_dir):
        assert run_dir.lease.exists()
    assert not run_dir.lease.exists()
    with lock_run(run_dir) as lock:
        lock.check()


def test_where_the_lock_was_removed_the_living_holder_is_still_refused(run_dir: RunDir) -> None:
    with lock_run(run_dir):
        remove_lock(run_dir)
        with (
            pytest.raises(RefusedError, match=f"in use by pid {os.getpid()} .*its lock was removed"),
            lock_run(run_dir),
        ):
            pass


HOLD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
with lock_run(RunDir(Path(sys.argv[1]))):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_holder_that_was_killed_here_is_not_waited_for(run_dir: RunDir) -> None:
    killed = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, str(run_dir.path)])
    assert killed.returncode == -9
    assert run_dir.lease.exists()
    began = time.monotonic()
    with lock_run(run_dir) as lock:
        lock.check()
    assert time.monotonic() - began < lease.EXPIRED_SECONDS / 2


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that gives a lock to everybody, and a lease that expires soon."""
    monkeypatch.setattr(fcntl, "flock", lambda handle, how: None)
    monkeypatch.setattr(lease, "EXPIRED_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)


def pretend_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "read_machine", lambda: "another-boot pid:[1]")


@pytest.mark.usefixtures("unshared")
def test_of_two_machines_without_shared_locks_the_second_is_refused(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock_run(run_dir) as lock:
        with monkeypatch.context() as elsewhere:
            pretend_elsewhere(elsewhere)
            with pytest.raises(RefusedError, match="in use by pid"), lock_run(run_dir):
                pass
        lock.check()


@pytest.mark.usefixtures("unshared")
def test_a_lease_that_nobody_renews_is_taken_over_and_its_owner_is_told(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_run(run_dir) as lock:
        monkeypatch.setattr(os, "utime", lambda *arguments, **options: None)
        with monkeypatch.context() as elsewhere:
            pretend_elsewhere(elsewhere)
            with lock_run(run_dir) as taken:
                taken.check()
                assert "waiting up to" in capsys.readouterr().out
                with pytest.raises(LostRunError, match="has taken it over"):
                    lock.prove()
                with pytest.raises(LostRunError, match="has taken it over"):
                    lock.check()
                # The owner of before gives back what is its own, and this is not.
                assert run_dir.lease.exists()


@pytest.mark.usefixtures("unshared")
def test_an_old_lease_of_another_machine_is_not_waited_for(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir.path.mkdir(parents=True)
    owner = lease.Owner("token", 1, 1, "elsewhere", "another-boot pid:[1]")
    run_dir.lease.write_text(json.dumps(vars(owner)))
    os.utime(run_dir.lease, (time.time() - 60, time.time() - 60))
    with lock_run(run_dir) as lock:
        lock.check()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 9999, b'{"token": 1}', b'{"token": null, "pid": -1}'])
def test_a_lease_of_any_bytes_holds_nobody_up(run_dir: RunDir, content: bytes) -> None:
    run_dir.path.mkdir(parents=True)
    run_dir.lease.write_bytes(content)
    with lock_run(run_dir) as lock:
        lock.check()


def test_a_number_that_was_given_again_is_another_process(run_dir: RunDir) -> None:
    run_dir.path.mkdir(parents=True)
    owner = lease.Owner("token", os.getpid(), 1, "here", lease.read_machine())
    run_dir.lease.write_text(json.dumps(vars(owner)))
    with lock_run(run_dir) as lock:
        lock.check()


def test_where_nothing_can_be_written_it_is_trouble_of_the_machine(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system", str(run_dir.path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StorageError, match="Read-only file system") as refused, lock_run(run_dir):
        pass
    assert refused.value.exit_code == 5


FOREIGN: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file": lambda run, outside: (run / ".README.md").symlink_to(outside / "file"),
    "a link to a folder": lambda run, outside: (run / "logs").symlink_to(outside),
    "a link deep below": lambda run, outside: (_folder(run / "checkpoints/.trash/7") / "x").symlink_to(outside),
    "a link to nothing": lambda run, outside: (run / "status.json").symlink_to(outside / "nothing"),
    "the lock itself": lambda run, outside: (run / ".lock").symlink_to(outside / "file"),
    "best outside": lambda run, outside: (_folder(run / "checkpoints") / "best").symlink_to(outside),
    "best upwards": lambda run, outside: (_folder(run / "checkpoints") / "best").symlink_to("../../../outside"),
    "out of wandb": lambda run, outside: (_folder(run / "logs/wandb") / "latest-run").symlink_to(outside),
    "a pipe": lambda run, outside: os.mkfifo(run / "attempts.jsonl"),
    "a second name": lambda run, outside: os.link(outside / "file", run / "attempts.jsonl"),
}


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_with_what_leads_out_of_it_is_refused(run_dir: RunDir, name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("mine\n")
    run_dir.path.mkdir(parents=True)
    FOREIGN[name](run_dir.path, tmp_path / "outside")
    with pytest.raises(RefusedError) as refused, lock_run(run_dir):
        pass
    assert refused.value.exit_code == 3
    assert len(str(refused.value).splitlines()) == 1
    assert [(path.name, path.read_text()) for path in (tmp_path / "outside").iterdir()] == [("file", "mine\n")]


def test_the_links_that_a_run_and_wandb_make_are_its_own(run_dir: RunDir) -> None:
    (_folder(run_dir.checkpoints) / "best").symlink_to("40")
    wandb = _folder(run_dir.logs / "wandb/wandb")
    (_folder(wandb / "run-1/logs") / "debug-core.log").symlink_to("/somewhere/cache/core-debug.log")
    (wandb / "latest-run").symlink_to("run-1")
    # As a kill leaves them that falls while the data of an earlier start is set aside.
    aside = _folder(run_dir.logs / "wandb/.superseded/offline-run-1-0f0f0f0f/logs")
    (aside / "debug-core.log").symlink_to("/somewhere/cache/core-debug.log")
    os.link(_touch(run_dir.checkpoints / "data"), run_dir.path.parent / "backup")
    with lock_run(run_dir):
        pass


def _touch(path: Path) -> Path:
    path.touch()
    return path
