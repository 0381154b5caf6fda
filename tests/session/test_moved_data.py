"""A run is what it was trained on, not where that lay: data is moved, renamed, copied and exchanged between starts."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.config.schema import dump_yaml
from runner.errors import ConfigError, RefusedError, StorageError
from runner.launch.command_line import RunRequest
from runner.launch.compose import compose
from runner.rundir.layout import RunDir
from runner.session import moved_run
from runner.session.standing import find_run, inspect_run
from runner.train import dataset, moved_data
from tests.conftest import SMALL, Door, assert_same, write_corpus

pytestmark = pytest.mark.forked

TEXT = ("data=text", "data.seq_len=16", "data.batch_size=2")
TABLE = ("model=mlp", "data=arrays", "data.gives=features", "data.batch_size=4")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    moved_data._last_read.clear()
    return tmp_path


def write_text(path: str, seed: int = 0) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(np.random.default_rng(seed).integers(97, 122, 4000, np.uint8).tobytes())
    return path


def write_table(path: str, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    np.savez(path, inputs=rng.random((40, 3), np.float32), label=np.arange(40) % 4)
    return path


def request_of(*words: str) -> RunRequest:
    request = compose(words)
    assert isinstance(request, RunRequest)
    return request


def found(*words: str) -> RunDir:
    request = request_of(*words)
    run = find_run(request.config, request.command.overrides)
    inspect_run(run, request.config)
    return run


def begun(*words: str, step: int = 0) -> RunDir:
    """Leave what a run leaves when it has trained: its configuration, the record of its data, a checkpoint."""
    request, run = request_of(*words), found(*words)
    assert not run.config.exists()
    (run.checkpoints / str(step)).mkdir(parents=True)
    run.config.write_text(dump_yaml(request.config.document))
    run.status.write_text(f'{{"state": "running", "step": {step}}}')
    sources = moved_data.read_moved_data(request.config, run) or dataset.read_sources(request.config.data)
    dataset.record_or_compare(run, sources)
    return run


def compare(*words: str) -> None:
    """Compare the data of a command with its run's, as an attempt does."""
    config, run = request_of(*words).config, found(*words)
    dataset.record_or_compare(run, moved_data.read_moved_data(config, run) or dataset.read_sources(config.data))


@pytest.mark.parametrize("to", ["there/a.txt", "there/b.txt", "b.txt"])
def test_a_text_that_was_moved_or_renamed_is_the_run_s(to: str, here: Path) -> None:
    run = begun(*TEXT, f"data.path={write_text('a.txt')}")
    Path("there").mkdir()
    Path("a.txt").rename(to)
    for path in (to, str(here / to), f"./{to}"):
        assert found(*TEXT, f"data.path={path}").path == run.path
        compare(*TEXT, f"data.path={path}")


def test_a_table_under_another_name(here: Path) -> None:
    run = begun(*TABLE, f"data.path={write_table('x.npz')}")
    Path("x.npz").rename("y.npz")
    assert found(*TABLE, "data.path=y.npz").path == run.path
    compare(*TABLE, "data.path=y.npz")
    # What it is recorded as stays: the next file is compared with that as well.
    config = request_of(*TABLE, "data.path=y.npz").config
    sources = moved_data.read_moved_data(config, run)
    assert sources is not None
    assert list(sources.files) == ["x.npz"]
    assert sources.fingerprint != sources.fingerprint_as_read == config.data.sources().fingerprint


def test_a_folder_of_texts(here: Path) -> None:
    for name in "abcdefgh":
        write_text(f"old/{name}.txt", ord(name))
    run = begun(*TEXT, "data.path=old")
    shutil.copytree("old", "mount/new")
    shutil.rmtree("old")
    assert found(*TEXT, "data.path=mount/new").path == run.path
    compare(*TEXT, "data.path=mount/new")
    # A name below the place decides on which side a text is: a renamed one is other data.
    Path("mount/new/a.txt").rename("mount/new/z.txt")
    moved_data._last_read.clear()
    assert found(*TEXT, "data.path=mount/new").path != run.path


def write_csv(path: str, seed: int) -> None:
    rows = np.random.default_rng(seed).random((40, 2))
    Path(path).write_text("a,b,label\n" + "".join(f"{x:.3f},{y:.3f},{n % 3}\n" for n, (x, y) in enumerate(rows)))


def write_jsonl(path: str, seed: int) -> None:
    lines = (json.dumps({"text": f"some text {x}"}) for x in np.random.default_rng(seed).random(100))
    Path(path).write_bytes(gzip.compress("\n".join(lines).encode()))


def write_images(path: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (2, 6, 8, 8, 3), np.uint8)
    for name, images in zip("ab", pixels, strict=True):
        Path(path, name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(Path(path, name, f"{number}.png"))


KINDS = {
    "csv": (write_csv, ".csv", ("model=mlp", "data=csv", "data.label=label", "data.batch_size=4")),
    "jsonl": (write_jsonl, ".jsonl.gz", ("data=text", "data.field=text", "data.seq_len=16", "data.batch_size=2")),
    "images": (write_images, "", ("model=cnn", "data=images", "data.batch_size=4")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_data(kind: str, here: Path) -> None:
    write, ending, words = KINDS[kind]
    write(f"a{ending}", 0)
    write(f"other{ending}", 1)
    run = begun(*words, f"data.path=a{ending}")
    Path("mount").mkdir()
    Path(f"a{ending}").rename(f"mount/b{ending}")
    assert found(*words, f"data.path=mount/b{ending}").path == run.path
    compare(*words, f"data.path=mount/b{ending}")
    assert found(*words, f"data.path=other{ending}").path != run.path


@pytest.mark.parametrize("kind", ["jsonl", "images"])
def test_what_is_evaluated_on_may_move_as_well(kind: str, here: Path) -> None:
    write, ending, words = KINDS[kind]
    Path("old").mkdir()
    Path("new").mkdir()
    write(f"a{ending}", 0)
    write(f"old/a{ending}", 1)
    run = begun(*words, f"data.path=a{ending}", f"data.eval_path=old/a{ending}")
    Path(f"old/a{ending}").rename(f"new/b{ending}")
    Path(f"a{ending}").rename(f"b{ending}")
    now = (*words, f"data.path=b{ending}", f"data.eval_path=new/b{ending}")
    assert found(*now).path == run.path
    compare(*now)
    # The two exchanged are other data.
    assert found(*words, f"data.path=new/b{ending}", f"data.eval_path=b{ending}").path != run.path


def test_workers_read_a_renamed_file_again(here: Path) -> None:
    """They compare it with what reading gives, not with what the run calls it."""
    run = begun(*TABLE, f"data.path={write_table('x.npz')}")
    Path("x.npz").rename("y.npz")
    config = request_of(*TABLE, "data.path=y.npz").config
    sources = moved_data.read_moved_data(config, run)
    assert sources is not None
    again = dataset.make_stream(config.data, sources, 0)._batches._reopen()  # type: ignore[misc]
    assert len(again) == len(sources.train)


def test_other_data_at_another_place_is_another_run(here: Path) -> None:
    run = begun(*TEXT, f"data.path={write_text('a.txt')}")
    other = found(*TEXT, f"data.path={write_text('b.txt', seed=1)}")
    assert other.path != run.path
    assert not other.path.exists()
    # Both go on by themselves.
    assert begun(*TEXT, "data.path=b.txt").path == other.path
    assert found(*TEXT, "data.path=a.txt").path == run.path
    assert found(*TEXT, "data.path=b.txt").path == other.path


@pytest.mark.forked(quick=True)
def test_a_new_run_on_other_data_says_so_and_is_not_told_to_go_on_with_the_other(door: Door) -> None:
    words = [word for word in SMALL if not word.startswith(("data.path", "train.steps"))]
    assert door.run(*words, "train.steps=2", "data.path=corpus.txt").returncode == 0
    first = door.the_run.name
    (door.cwd / "other.txt").write_text((door.cwd / "corpus.txt").read_text()[::-1])
    done = door.run(*words, "train.steps=2", "data.path=other.txt")
    assert done.returncode == 0, done.stderr
    assert "(new run)" in done.stdout
    assert f"differs from outputs/default/{first} only in its data: what lies there is not what" in done.stdout
    assert "to continue that one" not in done.stdout


def test_of_two_data_sets_that_were_both_moved_each_finds_its_own(here: Path) -> None:
    first, second = (begun(*TEXT, f"data.path={write_text(f'{name}.txt', ord(name))}") for name in "ab")
    for name in "ab":
        write_text(f"job/{name}.txt", ord(name))
        Path(f"{name}.txt").unlink()
    assert found(*TEXT, "data.path=job/a.txt").path == first.path
    assert found(*TEXT, "data.path=job/b.txt").path == second.path


def test_of_two_runs_on_copies_the_one_that_came_further_goes_on(here: Path) -> None:
    shutil.copy(write_text("a.txt"), "b.txt")
    begun(*TEXT, "data.path=a.txt", step=3)
    # As it was begun by a version that told them apart by their paths.
    request = request_of(*TEXT, "data.path=b.txt")
    name = found(*TEXT, "data.path=a.txt").path.with_name(f"b-{moved_run.hash_config(request.config.document)}")
    further = RunDir(name)
    (further.checkpoints / "5").mkdir(parents=True)
    further.config.write_text(dump_yaml(request.config.document))
    further.status.write_text('{"state": "running", "step": 5}')
    dataset.record_or_compare(further, dataset.read_sources(request.config.data))
    shutil.copy("a.txt", "c.txt")
    assert found(*TEXT, "data.path=c.txt").path == further.path


def test_other_options_are_another_run(here: Path) -> None:
    run = begun(*TEXT, f"data.path={write_text('a.txt')}")
    Path("a.txt").rename("b.txt")
    for other in ("seed=1", "data.seq_len=32", "optim.lr=0.5", "name=other"):
        assert found(*TEXT, "data.path=b.txt", other).path != run.path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read of the data."""
    seen: list[str] = []
    real: Callable[..., object] = moved_data.read_sources

    def read(option: object) -> object:
        seen.append(option.path)  # type: ignore[attr-defined]
        return real(option)

    monkeypatch.setattr(moved_data, "read_sources", read)
    return seen


def test_nothing_is_read_where_no_run_differs_in_its_place_alone(here: Path, reads: list[str]) -> None:
    write_text("a.txt")
    found(*TEXT, "data.path=a.txt")
    begun(*TEXT, "data.path=a.txt")
    found(*TEXT, "data.path=a.txt")
    found(*TEXT, "data.path=a.txt", "seed=1")
    write_text("b.txt")
    found(*TEXT, "data.path=b.txt", "seed=1")
    found("model=mlp", "data=digits")
    assert reads == []
    found(*TEXT, "data.path=b.txt")
    assert reads == ["b.txt"]
    # The run that goes on has it in memory.
    compare(*TEXT, "data.path=b.txt")
    assert reads == ["b.txt"]


def test_what_resume_says_is_of_the_run_that_was_found(here: Path) -> None:
    begun(*TEXT, f"data.path={write_text('a.txt')}")
    Path("a.txt").rename("b.txt")
    with pytest.raises(RefusedError, match="resume=never: outputs/default/.*a.txt.* exists"):
        found(*TEXT, "data.path=b.txt", "resume=never")
    assert "a.txt" in str(found(*TEXT, "data.path=b.txt", "resume=must"))
    write_text("c.txt", seed=3)
    with pytest.raises(RefusedError, match="resume=must: nothing is at"):
        found(*TEXT, "data.path=c.txt", "resume=must")


def test_dir_with_another_place(here: Path) -> None:
    run = begun(*TEXT, f"data.path={write_text('a.txt')}")
    Path("a.txt").rename("b.txt")
    assert found(f"dir={run.path}", "data.path=b.txt").path == run.path
    compare(f"dir={run.path}", "data.path=b.txt")
    write_text("c.txt", seed=3)
    with pytest.raises(RefusedError, match="the data is not what this run was trained on"):
        compare(f"dir={run.path}", "data.path=c.txt")


def test_a_run_that_recorded_nothing_is_no_match(here: Path) -> None:
    run = begun(*TEXT, f"data.path={write_text('a.txt')}")
    run.data.unlink()
    Path("a.txt").rename("b.txt")
    assert found(*TEXT, "data.path=b.txt").path != run.path


def test_a_damaged_neighbour_is_passed_over(here: Path) -> None:
    run = begun(*TEXT, f"data.path={write_text('a.txt')}")
    Path("a.txt").rename("b.txt")
    for number, content in enumerate((b"", b"data: [", b"data:\n  path: \xff", b"data: 5\n", b"\0" * 100)):
        neighbour = run.path.with_name(f"x{number}-0123456{number}")
        neighbour.mkdir()
        (neighbour / "config.yaml").write_bytes(content)
    run.path.with_name("y-01234567").mkdir()
    run.path.with_name("z-01234567").touch()
    assert found(*TEXT, "data.path=b.txt").path == run.path


def test_a_neighbour_that_cannot_be_read_now_is_not_no_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(*TEXT, f"data.path={write_text('a.txt')}")
    Path("a.txt").rename("b.txt")

    def fail(run: RunDir) -> None:
        raise OSError(5, "Input/output error", str(run.config))

    monkeypatch.setattr(moved_data, "read_places", fail)
    with pytest.raises(StorageError, match="Input/output error; nothing was begun"):
        found(*TEXT, "data.path=b.txt")


def test_data_that_cannot_be_read_is_one_line(here: Path) -> None:
    begun(*TABLE, f"data.path={write_table('x.npz')}")
    Path("x.npz").rename("y.npz")
    whole = Path("y.npz").read_bytes()
    Path("y.npz").write_bytes(whole.replace(b"\x93NUMPY", b"\x93NUMPX"))
    with pytest.raises(ConfigError):
        found(*TABLE, "data.path=y.npz")


@pytest.mark.forked(quick=True)
def test_a_sweep_goes_on_with_its_runs_where_their_data_lies_now(door: Door) -> None:
    words = [word for word in SMALL if not word.startswith(("data.path", "train.steps"))]
    sweep = ("-m", *words, "train.steps=4", "seed=0,1")
    assert door.run(*sweep, "data.path=corpus.txt").returncode == 0
    (door.cwd / "corpus.txt").rename(door.cwd / "moved.txt")
    done = door.run(*sweep, "data.path=moved.txt", "hydra.launcher.parallel=1")
    assert "2 runs: 2 finished" in done.stdout, (done.stdout, done.stderr)
    # Nothing was started: both were found finished.
    assert "running" not in done.stdout
    assert len([*door.cwd.glob("outputs/*/*/config.yaml")]) == 2
    # One more run beside them, which finds none.
    third = door.run("-m", *words, "train.steps=4", "seed=0,1,2", "data.path=moved.txt")
    assert "3 runs: 3 finished" in third.stdout, (third.stdout, third.stderr)
    assert len([*door.cwd.glob("outputs/*/*/config.yaml")]) == 3


def test_killed_moved_and_typed_again_is_bit_for_bit_the_whole(door: Door, tmp_path: Path) -> None:
    """The law. Renamed as well, and typed with an absolute path."""
    words = [word for word in SMALL if not word.startswith("data.path")]
    whole = Door(tmp_path / "whole", door.forks)
    whole.cwd.mkdir()
    write_corpus(whole.cwd)
    assert whole.run(*words, "data.path=corpus.txt").returncode == 0
    door.kill_at(20, *words, "data.path=corpus.txt")
    (door.cwd / "mount").mkdir()
    (door.cwd / "corpus.txt").rename(door.cwd / "mount/text.txt")
    done = door.run(*words, f"data.path={door.cwd}/mount/text.txt")
    assert done.returncode == 0, done.stderr
    assert f'changed: data.path: "corpus.txt" → "{door.cwd}/mount/text.txt"' in done.stdout
    assert_same(door.the_run, whole.the_run, 60)
