"""A run whose data holds what cannot be decoded goes on: after exactly that was mended, or passing over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import Images
from data.bad_examples import SkippingSource
from data.data_errors import UndecodableError
from runner.errors import RefusedError
from runner.launch.main import main
from runner.rundir.layout import RunDir
from runner.train import broken_data
from runner.train.dataset import list_fingerprints, record_or_compare
from tests.data.test_bad_examples import jpegs

SMALL = (
    "model=mlp",
    "model.width=16",
    "log.tensorboard=false",
    "data.size=8",
    "data.batch_size=4",
    "data.eval_fraction=0.3",
)
STEPS = ("train.steps=8", "train.log_steps=1", "train.eval_steps=4", "ckpt=periodic", "ckpt.save.periodic.steps=1")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What is broken would be found before training.
    monkeypatch.setattr(broken_data, "LOOKED_AT_SECONDS", 0.0)


def train(path: str, *words: str) -> int:
    return main(["data=images", f"data.path={path}", *SMALL, *STEPS, "schedule=constant", *words])


def the_run(root: str = "outputs") -> Path:
    (found,) = Path(root).glob("*/*/status.json")
    return found.parent


def record(root: str = "outputs") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((the_run(root) / "data.json").read_text())
    return found


def metrics(root: str = "outputs") -> str:
    return (the_run(root) / "logs/metrics.jsonl").read_text()


def last_trained(folder: str, step: int) -> str:
    """Return the file that training takes for the first time in a late step."""
    from data.pipeline import ShuffledBatches

    source = Images(path=folder, size=8, eval_fraction=0.3).sources().train
    batches = ShuffledBatches(source, batch_size=4, seed=0)
    first: dict[int, int] = {}
    for number in range(step + 1):
        positions = np.arange(number * 4, number * 4 + 4)
        for index in batches._order_of(0)[positions[positions < len(source)]].tolist():
            first.setdefault(index, number)
    late = max(first, key=lambda index: first[index])
    return Path(source.names[late]).relative_to(folder).as_posix()  # type: ignore[attr-defined]


def tear(file: Path) -> bytes:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return content


@pytest.mark.parametrize("words", [(), ("data.workers=1",)])
def test_after_the_file_was_mended_the_same_command_goes_on(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the numbers of a run that had the good file from the beginning."""
    jpegs(Path("d"))
    name = last_trained("d", 3)
    good = tear(Path("d", name))
    assert train("d", *words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: the data broke while training: d/{name}: is no image that can be read")
    assert len(said.splitlines()) == 1
    assert "replace it with a good file of the same name, or add data.on_bad=skip" in said
    assert record()["broken"].keys() == {name}
    assert (the_run() / "checkpoints").exists()
    Path("d", name).write_bytes(good)
    assert train("d") == 0
    assert f"mended since: {name}; going on with the same examples" in capsys.readouterr().out
    assert (len(record()["earlier"]), record()["broken"]) == (1, {})
    # Once it was said, it is the data of this run.
    assert train("d", f"dir={the_run()}", "train.steps=10") == 0
    assert "mended" not in capsys.readouterr().out
    found = metrics()
    assert train("d", "root=whole", "train.steps=8") == 0
    assert found.startswith(metrics("whole"))


def test_a_run_that_was_given_up_goes_on_when_its_data_is_mended(capsys: pytest.CaptureFixture[str]) -> None:
    """A supervisor has typed the command again and again, until it was not tried any more."""
    jpegs(Path("d"))
    name = last_trained("d", 3)
    good = tear(Path("d", name))
    assert [train("d", "train.max_crashes=1") for _ in range(3)] == [1, 1, 1]
    assert "not tried again" in capsys.readouterr().err
    Path("d", name).write_bytes(good)
    assert train("d", "train.max_crashes=1") == 0
    tear(Path("d", name))
    assert [train("d", "train.max_crashes=1", "root=other") for _ in range(3)] == [1, 1, 1]
    assert "not tried again" in capsys.readouterr().err
    assert train("d", "train.max_crashes=1", "root=other", "data.on_bad=skip") == 0


def test_an_evaluation_passes_over_too_and_leaves_the_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    jpegs(Path("d"))
    assert train("d", "train.steps=2", "data.on_bad=skip") == 0
    sources = Images(path="d", size=8, eval_fraction=0.3).sources()
    last = Path(sources.eval.names[-1])  # type: ignore[attr-defined]
    name, before = last.relative_to("d").as_posix(), record()
    tear(last)
    capsys.readouterr()
    # What is torn now is other data than was trained on, but for a file that the run knows to be broken.
    assert train("d", "train.steps=0", f"dir={the_run()}", "data.on_bad=skip") == 3
    known = {**before, "broken": {name: before["files"][name]}}
    (the_run() / "data.json").write_text(json.dumps(known))
    assert train("d", "train.steps=0", f"dir={the_run()}", "data.on_bad=skip") == 0
    assert f"warning: d/{name}: is no image that can be read" in capsys.readouterr().out
    assert record() == known


def test_another_change_is_still_refused_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    jpegs(Path("d"))
    name = last_trained("d", 3)
    good = tear(Path("d", name))
    assert train("d") == 1
    Path("d", name).write_bytes(good)
    other = next(file for file in sorted(Path("d").rglob("*.jpg")) if file != Path("d", name))
    kept = other.read_bytes()
    other.write_bytes(kept + b"x")
    before = record()
    capsys.readouterr()
    assert train("d") == 3
    said = capsys.readouterr().err
    assert f"changed: {other.relative_to('d')} (" in said
    assert name not in said
    assert record() == before
    other.write_bytes(kept)
    Path("d", name).unlink()
    assert train("d") == 3
    assert f"gone: {name}" in capsys.readouterr().err
    Path("d", name).write_bytes(good)
    assert train("d") == 0


@pytest.mark.parametrize(
    ("name", "value"), [("data.fingerprint.MOST_LINES", 5), ("data.image_folders.WHOLE_BYTES", 100)]
)
def test_the_mended_file_is_known_where_files_are_many_or_large(
    name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where data.json has a line for each folder, or sizes alone."""
    monkeypatch.setattr(name, value)
    jpegs(Path("d"))
    option, run = Images(path="d", size=8, eval_fraction=0.3), RunDir(Path("run"))
    good = {file: tear(Path("d", file)) for file in ("a/12.jpg", "b/13.jpg")}
    (run.checkpoints / "1").mkdir(parents=True)
    sources = option.sources()
    record_or_compare(run, sources)
    torn = sources.train if "d/a/12.jpg" in sources.train.names else sources.eval  # type: ignore[attr-defined]
    with pytest.raises(UndecodableError) as caught:
        torn.take(np.array([torn.names.index("d/a/12.jpg")]))  # type: ignore[attr-defined]
    broken_data.remember_broken(run, sources, caught.value)
    Path("d/b/13.jpg").write_bytes(good["b/13.jpg"])
    with pytest.raises(RefusedError, match="the data is not what this run was trained on"):
        record_or_compare(run, option.sources())
    tear(Path("d/b/13.jpg"))
    Path("d/a/12.jpg").write_bytes(good["a/12.jpg"])
    now = option.sources()
    assert record_or_compare(run, now) == ["mended since: a/12.jpg; going on with the same examples"]
    assert record_or_compare(run, now) == []
    assert list_fingerprints(run, now) == {sources.fingerprint, now.fingerprint}


@pytest.mark.parametrize(
    "odd",
    [
        {"broken": 7},
        {"skipped": {"train": {"x": {}, "99": {"why": "far"}, "0": {}}}},
        {"earlier": [1]},
        {"classes": "abc"},
    ],
)
def test_what_a_record_says_of_broken_files_may_be_anything(odd: dict[str, Any]) -> None:
    jpegs(Path("d"))
    option, run = Images(path="d", size=8, eval_fraction=0.3, on_bad="skip"), RunDir(Path("run"))
    (run.checkpoints / "1").mkdir(parents=True)
    sources = option.sources()
    record_or_compare(run, sources)
    run.data.write_text(json.dumps({**json.loads(run.data.read_text()), **odd}))
    assert record_or_compare(run, sources) == []
    broken_data.watch_skipped(run, sources, print)
    assert isinstance(sources.train, SkippingSource)
    assert list(sources.train.skipped) == ([0] if "skipped" in odd else [])
    assert list_fingerprints(run, sources) == {sources.fingerprint}


def test_a_broken_example_is_passed_over_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Switched on in the run that broke, which gives the numbers of a run that had it from the beginning."""
    jpegs(Path("d"))
    name = last_trained("d", 3)
    tear(Path("d", name))
    assert train("d") == 1
    capsys.readouterr()
    assert train("d", "data.on_bad=skip", "data.workers=1", "data.prefetch=2") == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"warning: d/{name}: is no image that can be read") == 1
    assert [entry["file"] for entry in record()["skipped"]["train"].values()] == [name]
    assert train("d", "data.on_bad=skip", "root=whole") == 0
    assert metrics() == metrics("whole")


def test_what_was_passed_over_stays_so_when_it_is_mended(capsys: pytest.CaptureFixture[str]) -> None:
    """Or the same run would have other numbers, by whether it was interrupted."""
    jpegs(Path("d"))
    name = last_trained("d", 3)
    good = tear(Path("d", name))
    roots = {}
    for root in ("mended", "torn"):
        Path("d", name).write_bytes(good[: len(good) // 2])
        assert train("d", "data.on_bad=skip", f"root={root}") == 0
        if root == "mended":
            Path("d", name).write_bytes(good)
        assert train("d", "data.on_bad=skip", f"dir={the_run(root)}", "train.steps=16") == 0
        roots[root] = metrics(root)
    assert f"mended since: {name}" in capsys.readouterr().out
    assert roots["mended"] == roots["torn"]
    Path("d", name).write_bytes(good)
    assert train("d", "root=good", "train.steps=16") == 0
    assert metrics("good") != roots["torn"]


@pytest.mark.parametrize("words", [(), ("data.on_bad=raise", "data.workers=1")])
def test_what_is_torn_is_found_before_training_and_leaves_nothing(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(broken_data, "LOOKED_AT_SECONDS", 5.0)
    jpegs(Path("d"))
    name = last_trained("d", 3)
    tear(Path("d", name))
    assert train("d", *words) == 2
    said = capsys.readouterr().err
    assert f"d/{name}: is no image that can be read" in said
    assert len(said.strip().splitlines()) == 1
    assert not Path("outputs").exists()


def test_the_record_says_classes_and_examples() -> None:
    jpegs(Path("d"))
    assert train("d", "train.steps=1") == 0
    found = record()
    train_size = len(Images(path="d", size=8, eval_fraction=0.3).sources().train)
    assert (found["classes"], found["examples"]) == (["a", "b", "c"], train_size)


def broken_text(root: Path) -> tuple[str, ...]:
    (root / "a.txt").write_bytes(bytes(1000))
    return ("data=text", f"data.path={root}")


def late_json(root: Path) -> tuple[str, ...]:
    (root / "a.jsonl").write_text('{"text": "x"}\n' * 20_000 + '{"body": "x"}\n')
    return ("data=text", f"data.path={root}", "data.pattern=*.jsonl")


def dead_link(root: Path) -> tuple[str, ...]:
    jpegs(root)
    (root / "a/gone.jpg").symlink_to("nowhere")
    return ("data=images", f"data.path={root}", "model=mlp")


def unknown_class(root: Path) -> tuple[str, ...]:
    jpegs(root / "train")
    jpegs(root / "val")
    (root / "val/a").rename(root / "val/A")
    return ("data=images", f"data.path={root}", "model=mlp")


def no_images_at_all(root: Path) -> tuple[str, ...]:
    for name in "ab":
        (root / name).mkdir()
        Image.new("L", (8, 8)).save(root / name / "1.png")
        (root / name / "1.png").write_bytes(b"text")
    return ("data=images", f"data.path={root}", "model=mlp")


def large_token(root: Path) -> tuple[str, ...]:
    for name in ("train", "val"):
        np.full(500, 70, "<u2").tofile(root / f"{name}.bin")
    return ("data=tokens", f"data.path={root}", "data.vocab_size=65", "data.seq_len=8")


@pytest.mark.parametrize("make", [broken_text, late_json, dead_link, unknown_class, no_images_at_all, large_token])
def test_bad_data_is_a_line_and_leaves_nothing(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("d").mkdir()
    assert main([*make(Path("d")), "train.steps=1", "log.tensorboard=false"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert not Path("outputs").exists()
