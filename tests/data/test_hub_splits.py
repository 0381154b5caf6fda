"""Datasets of the hub bring splits and names of classes along; images are decoded only when they are trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import Hub
from data.bad_examples import SkippingSource
from data.fingerprint import hash_files
from data.sources import Sources
from runner.launch.main import main
from runner.rundir.layout import RunDir
from runner.train.dataset import read_as_before, record_or_compare

datasets = pytest.importorskip("datasets")


def encoded(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (value, value, value)).save(out, "PNG")
    return out.getvalue()


def split(size: int, start: int = 0, labels: list[Any] | None = None, **columns: Any) -> Any:
    """Return a split of images, each of a grey of its own."""
    made: dict[str, Any] = {
        "image": [{"bytes": encoded(start + n), "path": None} for n in range(size)],
        "label": labels or [n % 2 for n in range(size)],
        "text": [f"row {start + n}" for n in range(size)],
        **columns,
    }
    kinds = {"image": datasets.Image()}
    if labels is None:
        kinds["label"] = datasets.ClassLabel(names=["cat", "dog"])
    result = datasets.Dataset.from_dict(made)
    for name, kind in kinds.items():
        result = result.cast_column(name, kind)
    return result


def save(root: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(str(root / "hub"))
    return str(root / "hub")


def sizes(sources: Sources) -> tuple[int, int, dict[str, int]]:
    return len(sources.train), len(sources.eval), {name: len(part) for name, part in sources.held_out.items()}


def greys(source: Any) -> list[int]:
    return sorted(np.rint(source.take(np.arange(len(source)))["inputs"][:, 0, 0, 0] * 255).astype(int).tolist())


def test_no_image_is_decoded_to_read_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, train=split(50), validation=split(10, 50), test=split(10, 60))
    decoded, opened = [], []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda self, *given, **more: decoded.append(1))
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **more: (opened.append(1), real(*given, **more))[1])
    sources = Hub(path=path, size=8).sources()
    # The first one is looked at for its shape.
    assert (len(decoded), len(opened)) == (0, 1)
    sources.train.take(np.arange(5))
    assert (len(decoded), len(opened)) == (0, 5)


@pytest.mark.parametrize("validation", ["validation", "valid", "dev"])
def test_the_splits_of_a_dataset_are_used_as_such(validation: str, tmp_path: Path) -> None:
    splits = {"train": split(30), validation: split(10, 30), "test": split(8, 40), "unsupervised": split(4, 60)}
    sources = Hub(path=save(tmp_path, **splits), size=8).sources()
    assert sizes(sources) == (30, 10, {"test": 8})
    assert greys(sources.train) == list(range(30))
    assert greys(sources.eval) == list(range(30, 40))
    assert greys(sources.held_out["test"]) == list(range(40, 48))
    assert sources.classes == ("cat", "dog")
    assert f"trains on its split train, evaluates on {validation}, test is never trained on" in sources.summary
    assert "not read: unsupervised" in sources.summary


def test_what_was_chosen_is_taken(tmp_path: Path) -> None:
    path = save(tmp_path, train=split(30), validation=split(10, 30), test=split(8, 40))
    assert sizes(Hub(path=path, size=8, eval_split="test").sources()) == (30, 8, {})
    assert sizes(Hub(path=path, size=8, split="test", eval_split="validation").sources()) == (8, 10, {})
    part = Hub(path=path, size=8, eval_split="none", eval_fraction=0.2).sources()
    assert sizes(part) == (24, 6, {"test": 8})
    # As a run that began before splits were looked for has it.
    assert part.fingerprint == hash_files(part.files, ["train"], 0.2)
    with pytest.raises(ValueError, match="has no split dev; it has: train, validation, test"):
        Hub(path=path, eval_split="dev").sources()


def test_a_label_is_not_foretold_from_itself(tmp_path: Path) -> None:
    path = save(tmp_path, train=split(30, labels=[n % 2 for n in range(30)]))
    with pytest.raises(ValueError, match="inputs=label is the label as well; name another column"):
        Hub(path=path, inputs="label", label="label", gives="features").sources()


def test_without_a_split_to_evaluate_on_a_part_is_held_out_as_ever(tmp_path: Path) -> None:
    sources = Hub(path=save(tmp_path, train=split(30), test=split(8, 40)), size=8, eval_fraction=0.2).sources()
    assert sizes(sources) == (24, 6, {"test": 8})
    assert sources.fingerprint == hash_files(sources.files, ["train"], 0.2)
    both = {"train": split(9), "validation_matched": split(4, 9), "validation_mismatched": split(4, 13)}
    sources = Hub(path=save(tmp_path / "two", **both), size=8, eval_fraction=0.3).sources()
    assert sizes(sources) == (6, 3, {})
    assert "not read: validation_matched, validation_mismatched" in sources.summary


def test_a_test_split_without_labels_is_left_out_and_said(tmp_path: Path) -> None:
    train = split(20, labels=[n % 3 for n in range(20)])
    for name, labels in (("kept back", [-1] * 5), ("others", [0, 1, 2, 3, 4])):
        sources = Hub(path=save(tmp_path / name, train=train, test=split(5, 20, labels)), size=8).sources()
        assert (sources.num_outputs, sources.held_out) == (3, {})
        assert "not read: test (without labels, or with others)" in sources.summary


def test_labels_may_be_names(tmp_path: Path) -> None:
    names = ["owl", "cat", "cat", "dog"] * 6
    path = save(
        tmp_path, train=split(24, labels=names), validation=split(4, 24, ["dog"] * 4), test=split(2, 30, ["owl"] * 2)
    )
    sources = Hub(path=path, size=8).sources()
    assert sources.classes == ("cat", "dog", "owl")
    assert sources.train.take(np.arange(4))["label"].tolist() == [2, 0, 0, 1]
    assert sources.eval.take(np.arange(2))["label"].tolist() == [1, 1]
    assert sources.held_out["test"].take(np.arange(2))["label"].tolist() == [2, 2]


def test_text_has_splits_too(tmp_path: Path) -> None:
    path = save(tmp_path, train=split(9), validation=split(3, 20), test=split(4, 30))
    sources = Hub(path=path, gives="tokens", inputs="text", seq_len=6).sources()
    shown = [bytes(side.corpus).decode() for side in (sources.train, sources.eval, sources.held_out["test"])]  # type: ignore[attr-defined]
    assert shown == ["".join(f"row {n}\n" for n in range(a, b)) for a, b in ((0, 9), (20, 23), (30, 34))]


def test_an_image_that_is_torn_or_missing_is_passed_over(tmp_path: Path) -> None:
    made = split(12)
    rows = [
        {"bytes": row["bytes"][:40] if n in (3, 4) else row["bytes"], "path": None}
        for n, row in enumerate(made.cast_column("image", datasets.Image(decode=False))["image"])
    ]
    rows[7] = None
    torn = made.remove_columns("image").add_column("image", rows, feature=datasets.Image())
    path = save(tmp_path, train=torn, validation=split(3, 20))
    source = Hub(path=path, size=8, on_bad="skip").sources().train
    assert isinstance(source, SkippingSource)
    assert greys(source) == [0, 1, 2, 5, 5, 5, 6, 8, 8, 9, 10, 11]
    with pytest.raises(ValueError, match="row [347].* or add data.on_bad=skip"):
        Hub(path=path, size=8).sources().train.take(np.arange(12))


def test_a_run_that_began_before_keeps_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed again, the same command goes on with what it was trained on."""
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, train=split(30), validation=split(10, 30))
    option, run = Hub(path=path, size=8, eval_fraction=0.2), RunDir(tmp_path / "run")
    (run.checkpoints / "10").mkdir(parents=True)
    record_or_compare(run, Hub(path=path, size=8, eval_split="none", eval_fraction=0.2).sources())
    sources = read_as_before(option, run)
    assert sources is not None
    assert sizes(sources) == (24, 6, {})
    assert record_or_compare(run, sources) == []
    words = ("data=hub", f"data.path={path}", "data.size=8", "data.batch_size=4", "model=mlp", "model.width=8")
    small = ("log.tensorboard=false", "train.eval_steps=2", "ckpt.save.periodic.steps=2", "data.workers=1")
    assert main([*words, *small, "train.steps=2", "data.eval_split=none"]) == 0
    (found,) = tmp_path.glob("outputs/*/*/config.yaml")
    # What that run was: its configuration says null, for nothing else could be said.
    found.write_text(found.read_text().replace("eval_split: none", "eval_split: null"))
    before = json.loads((found.parent / "data.json").read_text())
    assert main([*words, *small, "train.steps=4", f"dir={found.parent}"]) == 0
    assert json.loads((found.parent / "data.json").read_text()) == before
