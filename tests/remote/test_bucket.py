"""What comes onto a disk, what goes to a bucket, and what is set aside: whoever has worked on the run last counts."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from runner import files
from runner.checkpoint.record import list_steps
from runner.errors import RefusedError, StorageError
from runner.remote.bucket import hold_in_bucket
from runner.remote.local_note import read_note
from runner.remote.objects import Objects, RemoteError
from runner.remote.remote_layout import SEGMENT_BYTES, Listing, group_segments, sort_listing
from runner.remote.run_files import FileMirror, fetch_files
from runner.rundir.decisions import Decisions, read_decisions, write_decisions
from runner.rundir.layout import RunDir
from tests.buckets import URL, failing
from tests.buckets import memory as memory
from tests.remote.simulation import KEY, choose, contents_of, find_lie, work, write_checkpoint


def look(memory: MemoryStore) -> Listing:
    return sort_listing(Objects(memory, URL).below(KEY).list_sizes(), "LOCK")


def test_a_run_is_there_as_it_is_here(memory: MemoryStore, tmp_path: Path) -> None:
    run_dir = work(tmp_path / "a")
    objects, listing = Objects(memory, URL).below(KEY), look(memory)
    for name in listing.files:
        assert objects.read(name) == (run_dir.path / name).read_bytes(), name
    assert {"config.yaml", "status.json", "logs/metrics.jsonl"} <= set(listing.files)
    assert "remote.json" not in listing.files
    assert listing.sealed_steps == [20, 40, 50]
    for step, present in listing.checkpoints.items():
        for name in present:
            own = run_dir.checkpoints / str(step) / name
            assert objects.read(f"checkpoints/{step}/{name}") == own.read_bytes(), name
    assert json.loads(objects.read("checkpoints/newest")) == {"step": 50}
    assert json.loads(objects.read("checkpoints/best"))["step"] == 20


def test_an_empty_disk_goes_on(memory: MemoryStore, tmp_path: Path) -> None:
    work(tmp_path / "a", 30)
    shutil.rmtree(tmp_path / "a")
    run_dir = work(tmp_path / "b")
    assert list_steps(run_dir.checkpoints) == [20, 40, 50]
    assert find_lie(tmp_path / "c") is None


def test_what_was_killed_before_it_was_sent_is_used(
    memory: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = work(tmp_path / "a", 20)
    # Saved, and killed at once.
    for step in range(21, 31):
        with open(run_dir.metrics, "a") as log:
            log.write(f"line of step {step}\n")
    write_checkpoint(run_dir, 30)
    with hold_in_bucket(choose(), KEY, run_dir, lambda: None):
        pass
    assert list_steps(run_dir.checkpoints)[-1] == 30
    assert "set aside" not in capsys.readouterr().out
    work(tmp_path / "a", 30)
    assert look(memory).sealed_steps[-1] == 30


def test_who_has_only_looked_leaves_the_branch_ours(
    memory: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine has taken the lock and was refused: what is here and was not sent yet is used all the same."""
    run_dir = work(tmp_path / "a", 20)
    write_checkpoint(run_dir, 30)
    other = RunDir(tmp_path / "b" / KEY)
    files.make_folder(other.logs)
    for _ in range(2):
        with hold_in_bucket(choose(), KEY, other, lambda: None):
            pass
        with hold_in_bucket(choose(), KEY, run_dir, lambda: None):
            assert list_steps(run_dir.checkpoints)[-1] == 30
    assert "set aside" not in capsys.readouterr().out


def test_a_branch_that_was_left_is_set_aside(
    memory: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = work(tmp_path / "a", 20)
    write_checkpoint(here, 30)
    work(tmp_path / "b", 25)  # another machine has worked on it since
    again = work(tmp_path / "a", 40)
    said = capsys.readouterr().out
    assert "another machine has worked on this run since; going on from step 20" in said
    assert "(up to step 30) was set aside" in said
    (aside,) = (again.path.parent / ".overwritten").iterdir()
    assert (aside / "checkpoints/30").is_dir()
    assert look(memory).sealed_steps == [20, 30, 40]


def test_a_kill_while_the_lock_is_taken_leaves_the_branch_ours(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = work(tmp_path / "a", 20)
    write_checkpoint(run_dir, 30)
    with monkeypatch.context() as killed:
        killed.setattr("runner.remote.bucket.sort_listing", lambda *arguments: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), hold_in_bucket(choose(), KEY, run_dir, lambda: None):
                pass
    note = read_note(run_dir)
    assert note is not None
    assert note.next_token
    with hold_in_bucket(choose(), KEY, run_dir, lambda: None):
        assert list_steps(run_dir.checkpoints)[-1] == 30
    assert "set aside" not in capsys.readouterr().out


def test_a_branch_that_was_left_stays_so_when_the_lock_was_taken_and_no_more(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = work(tmp_path / "a", 20)
    write_checkpoint(run_dir, 30)
    work(tmp_path / "b", 20)
    with monkeypatch.context() as killed:
        killed.setattr("runner.remote.bucket.sort_listing", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError), hold_in_bucket(choose(), KEY, run_dir, lambda: None):
            pass
    with hold_in_bucket(choose(), KEY, run_dir, lambda: None):
        assert list_steps(run_dir.checkpoints) == []


def test_a_run_that_was_here_before_its_bucket_goes_there_whole(memory: MemoryStore, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / KEY)
    files.make_folder(run_dir.logs)
    files.make_folder(run_dir.checkpoints)
    run_dir.config.write_text("seed: 0\n")
    run_dir.metrics.write_text("".join(f"line of step {step}\n" for step in range(1, 41)))
    for step in (20, 30, 40):
        write_checkpoint(run_dir, step)
    work(tmp_path, 40)
    assert look(memory).sealed_steps == [20, 30, 40]
    assert find_lie(tmp_path / "look") is None


def test_a_machine_that_vanished_before_anything_was_sent_begins_anew(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = work(tmp_path / "a", 5)
    write_decisions(run_dir, Decisions(attempt=1, was_durable=True))
    work(tmp_path / "a", 6)
    next_dir = RunDir(tmp_path / "b" / KEY)
    files.make_folder(next_dir.logs)
    # Also where it is killed as soon as its files are there, and begun again on the same disk.
    with monkeypatch.context() as killed:
        killed.setattr("runner.remote.bucket.Bucket.prepare", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError), hold_in_bucket(choose(), KEY, next_dir, lambda: None):
            pass
    assert not read_decisions(next_dir, {}, []).decisions.was_durable
    with hold_in_bucket(choose(), KEY, next_dir, lambda: None) as bucket:
        assert not bucket.list_steps()
        assert not read_decisions(next_dir, {}, []).decisions.was_durable
    # But one whose checkpoint was there once, and is there no more, does not.
    work(tmp_path / "a", 10)
    for key in Objects(memory, URL).below(KEY).list_sizes("checkpoints/10/"):
        Objects(memory, URL).below(KEY).delete([key])
    last = RunDir(tmp_path / "c" / KEY)
    files.make_folder(last.logs)
    with hold_in_bucket(choose(), KEY, last, lambda: None):
        assert read_decisions(last, {}, []).decisions.was_durable


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_every_flip_is_noticed(memory: MemoryStore, tmp_path: Path, count: int) -> None:
    """A bit flips in an object of the newest checkpoint: the one before it is used, and the damaged one set aside."""
    rng = random.Random(count)
    work(tmp_path / "a")
    before = {meta["path"]: memory.get(meta["path"]).bytes().to_bytes() for meta in memory.list().collect()}
    targets = [key for key in before if f"{KEY}/checkpoints/50/" in key and before[key]]
    for flip in range(count):
        for key, content in before.items():
            memory.put(key, content)
        key = rng.choice(targets)
        content = bytearray(before[key])
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        memory.put(key, bytes(content))
        run_dir = RunDir(tmp_path / f"flip-{flip}" / KEY)
        files.make_folder(run_dir.logs)
        with hold_in_bucket(choose(), KEY, run_dir, lambda: None) as bucket:
            files.make_folder(run_dir.checkpoints)
            assert bucket.bring_newer(0)
        assert list_steps(run_dir.checkpoints) == [40], key
        gone = [meta["path"] for meta in memory.list().collect() if f"{KEY}/quarantine/50-" in meta["path"]]
        assert gone, key
        assert 50 not in look(memory).checkpoints
        memory.delete(gone)
        shutil.rmtree(tmp_path / f"flip-{flip}")


@pytest.mark.parametrize("what", ["missing", "shorter", "foreign seal", "no seal"])
def test_what_is_not_whole_is_not_believed(memory: MemoryStore, tmp_path: Path, what: str) -> None:
    work(tmp_path / "a")
    objects = Objects(memory, URL).below(KEY)
    if what == "missing":
        objects.delete(["checkpoints/50/state/d/data"])
    elif what == "shorter":
        objects.write("checkpoints/50/state/d/data", contents_of(50)["state/d/data"][:-1])
    elif what == "foreign seal":
        objects.write("checkpoints/50/holdfast.json", objects.read("checkpoints/40/holdfast.json"))
    else:
        objects.delete(["checkpoints/50/holdfast.json"])
    run_dir = RunDir(tmp_path / "b" / KEY)
    files.make_folder(run_dir.logs)
    with hold_in_bucket(choose(), KEY, run_dir, lambda: None) as bucket:
        files.make_folder(run_dir.checkpoints)
        assert bucket.bring_newer(0)
    assert list_steps(run_dir.checkpoints) == [40]


def test_checkpoints_without_a_configuration_are_nobodys(memory: MemoryStore, tmp_path: Path) -> None:
    """A run that was ever durable never starts over by itself; who means it says so."""
    run_dir = work(tmp_path / "a")
    Objects(memory, URL).below(KEY).delete(["config.yaml"])
    other = RunDir(tmp_path / "b" / KEY)
    files.make_folder(other.logs)
    with pytest.raises(RefusedError, match=r"has checkpoints and no config\.yaml"):
        hold_in_bucket(choose(), KEY, other, lambda: None).__enter__()
    assert not other.config.exists()
    # The machine that has it sends it again.
    work(tmp_path / "a", 60)
    assert "config.yaml" in look(memory).files
    assert run_dir.config.exists()


def test_a_file_that_does_not_belong_is_left_where_it_is(memory: MemoryStore, tmp_path: Path) -> None:
    """A holder that was asleep may have sent it; the seal says what belongs."""
    work(tmp_path / "a")
    Objects(memory, URL).below(KEY).write("checkpoints/50/state/d/stray", b"?")
    assert find_lie(tmp_path / "b") is None


@pytest.mark.parametrize("part_bytes", [1 << 24, 1000])
def test_a_checkpoint_that_the_disk_has_damaged_is_not_sent(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    """Nor does the command end as if it were there."""
    monkeypatch.setattr("runner.remote.objects.PART_BYTES", part_bytes)
    run_dir = work(tmp_path / "a", 20)
    write_checkpoint(run_dir, 30)
    data = run_dir.checkpoints / "30/state/d/data"
    data.write_bytes(data.read_bytes().replace(b"30", b"31", 1))
    with hold_in_bucket(choose(patience_seconds=0.5), KEY, run_dir, lambda: None) as bucket:
        with pytest.raises(StorageError, match="step 30 is on this machine's disk alone"):
            bucket.finish(None)
    assert look(memory).sealed_steps == [10, 20]


def test_trouble_of_this_disk_is_waited_out(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = work(tmp_path / "a", 20)
    write_checkpoint(run_dir, 30)
    real, failed = files.open_file, list[Path]()

    def open_file(path: Path, *arguments: int) -> int:
        if path.name == "data" and len(failed) < 3:
            failed.append(path)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, *arguments)

    monkeypatch.setattr("runner.remote.objects.files.open_file", open_file)
    with hold_in_bucket(choose(), KEY, run_dir, lambda: None) as bucket:
        bucket.finish(None)
    assert len(failed) == 3
    assert look(memory).sealed_steps[-1] == 30


def test_pins_go_along(memory: MemoryStore, tmp_path: Path) -> None:
    run_dir = work(tmp_path / "a", 20)
    (run_dir.checkpoints / "10" / "pinned").touch()
    work(tmp_path / "a", 30)
    assert "pinned" in look(memory).checkpoints[10]
    shutil.rmtree(tmp_path / "a")
    work(tmp_path / "b", 50)
    assert look(memory).sealed_steps == [10, 20, 40, 50]


class TestLogs:
    """A log goes up in pieces: what is sent for it is what was added, and a little more."""

    def send(self, memory: MemoryStore, run_dir: RunDir, mirror: FileMirror | None = None) -> FileMirror:
        mirror = mirror or FileMirror(Objects(memory, URL).below(KEY), run_dir, look(memory))
        mirror.send_changed()
        return mirror

    def fetch(self, memory: MemoryStore, folder: Path) -> bytes:
        run_dir = RunDir(folder)
        shutil.rmtree(folder, ignore_errors=True)
        files.make_folder(folder)
        fetch_files(Objects(memory, URL).below(KEY), look(memory), run_dir)
        return run_dir.metrics.read_bytes()

    def make(self, tmp_path: Path) -> RunDir:
        run_dir = RunDir(tmp_path / "run")
        files.make_folder(run_dir.logs)
        run_dir.config.write_text("seed: 0\n")
        return run_dir

    @pytest.mark.parametrize("size", [0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 3 * SEGMENT_BYTES + 5])
    def test_any_length_comes_back(self, memory: MemoryStore, tmp_path: Path, size: int) -> None:
        run_dir, content = self.make(tmp_path), random.Random(size).randbytes(size)
        run_dir.metrics.write_bytes(content)
        self.send(memory, run_dir)
        assert self.fetch(memory, tmp_path / "there") == content

    def test_what_is_sent_is_bounded(self, memory: MemoryStore, tmp_path: Path) -> None:
        run_dir, rng = self.make(tmp_path), random.Random(0)
        mirror, sent, total = None, 0, 0
        objects = Objects(memory, URL).below(KEY)
        for _ in range(40):
            with open(run_dir.metrics, "ab") as log:
                total += log.write(rng.randbytes(100_000))
            mirror = mirror or FileMirror(objects, run_dir, look(memory))
            before = objects.requests["put"]
            mirror.send_changed()
            sent += objects.requests["put"] - before
        # One piece each time, and one more where a piece became full; whole, it would have been 40 × 2 MB on average.
        assert sent <= 40 + total // SEGMENT_BYTES + 2
        assert self.fetch(memory, tmp_path / "there") == run_dir.metrics.read_bytes()

    def test_a_log_that_was_cut_back_and_went_on(self, memory: MemoryStore, tmp_path: Path) -> None:
        run_dir, rng, mirror = self.make(tmp_path), random.Random(1), None
        content = b""
        for _ in range(30):
            content = content[: rng.randrange(len(content) + 1)] + rng.randbytes(rng.randrange(3 * SEGMENT_BYTES))
            run_dir.metrics.write_bytes(content)
            mirror = self.send(memory, run_dir, mirror)
            assert self.fetch(memory, tmp_path / "there") == content
            # A process that knows nothing of what is there brings it to the same.
            mirror = None if rng.random() < 0.3 else mirror

    def test_an_old_end_is_never_put_to_a_new_beginning(self, memory: MemoryStore, tmp_path: Path) -> None:
        """Whatever request is the last: what is there is the beginning of a log that was."""
        from tests.buckets import Killed, failing

        old, new = (random.Random(seed).randbytes(3 * SEGMENT_BYTES + 9) for seed in (1, 2))
        new = old[: SEGMENT_BYTES + 5] + new[SEGMENT_BYTES + 5 : -7]
        run_dir = self.make(tmp_path)
        for at in range(1, 9):
            for meta in memory.list().collect():
                memory.delete([meta["path"]])
            run_dir.metrics.write_bytes(old)
            mirror = self.send(memory, run_dir)
            run_dir.metrics.write_bytes(new)
            with pytest.MonkeyPatch.context() as patch, failing(patch, at, "killed before"):
                with suppress(Killed):
                    mirror.send_changed()
            found = self.fetch(memory, tmp_path / "there")
            assert old.startswith(found) or new.startswith(found), at


def test_a_piece_whose_answer_was_lost_is_taken_away_where_the_log_ends_before_it(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log ends with a full piece, after which another one would be read as its end."""
    run_dir = RunDir(tmp_path / "run")
    files.make_folder(run_dir.logs)
    full = random.Random(3).randbytes(SEGMENT_BYTES)
    run_dir.metrics.write_bytes(full + b"what is cut off")
    mirror = FileMirror(Objects(memory, URL).below(KEY), run_dir, look(memory))
    with failing(monkeypatch, 2, "answer lost"), suppress(RemoteError):
        mirror.send_changed()
    run_dir.metrics.write_bytes(full)
    mirror.send_changed()
    assert [name for name in look(memory).files if "metrics" in name] == ["logs/metrics.jsonl"]


def test_pieces_follow_on_each_other() -> None:
    full = SEGMENT_BYTES
    assert group_segments({"a": full, "a.part000001": 5, "a.part000002": 7}) == {"a": ["a", "a.part000001"]}
    assert group_segments({"a": 3, "a.part000001": 5}) == {"a": ["a"]}
    # Somebody's own file of such a name, without one that it would be a piece of.
    assert group_segments({"b.part000001": 5}) == {"b.part000001": ["b.part000001"]}


def test_what_is_damaged_on_its_way_is_fetched_once_more(
    memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(tmp_path / "a")
    real, damaged = Objects.download, list[str]()

    def download(self: Objects, key: str, path: Path, size: int) -> None:
        real(self, key, path, size)
        if key.endswith("/data") and not damaged:
            damaged.append(key)
            path.write_bytes(bytes(size))

    monkeypatch.setattr(Objects, "download", download)
    run_dir = RunDir(tmp_path / "b" / KEY)
    files.make_folder(run_dir.logs)
    with hold_in_bucket(choose(), KEY, run_dir, lambda: None) as bucket:
        files.make_folder(run_dir.checkpoints)
        assert bucket.bring_newer(0)
    assert damaged
    assert list_steps(run_dir.checkpoints) == [50]
    assert 50 in look(memory).checkpoints, "nothing was set aside there"
