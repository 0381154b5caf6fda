"""Folders of images as people have them: with parts of a data set, other formats, hidden files and links."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import Images
from data.fingerprint import hash_files
from data.images import decode_image
from data.sources import Source, Sources


def draw(file: Path, value: int, size: int = 8) -> None:
    """Write an image of one grey, by which it is known again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(file)


def make(root: Path, **parts: dict[str, int]) -> Path:
    """Write so many images of each class of each part; each has a grey of its own."""
    value = 0
    for part, classes in parts.items():
        for name, count in classes.items():
            for number in range(count):
                draw(root / part / name / f"{number}.png", value := value + 1)
    return root


def read(root: Path, **options: object) -> Sources:
    option = Images(path=str(root), size=8, **options)  # type: ignore[arg-type]
    option.check_readable()
    return option.sources()


def greys(source: Source) -> dict[int, int]:
    """Return the label of each image of a source, by its grey."""
    taken = source.take(np.arange(len(source)))
    shown = np.rint(taken["inputs"][:, 0, 0, 0] * 255).astype(int)
    return dict(zip(shown.tolist(), taken["label"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "valid", "Testing"),
        ("train", "dev", "test"),
        ("training_set", "validation", "test_set"),
    ],
)
def test_parts_of_a_data_set_are_used_as_such(train: str, val: str, test: str, tmp_path: Path) -> None:
    make(tmp_path, **{train: {"ant": 5, "bee": 4}, val: {"ant": 2, "bee": 1}, test: {"bee": 3}})
    sources = read(tmp_path)
    assert sources.classes == ("ant", "bee")
    assert sources.num_outputs == 2
    assert greys(sources.train) == {**dict.fromkeys(range(1, 6), 0), **dict.fromkeys(range(6, 10), 1)}
    assert greys(sources.eval) == {10: 0, 11: 0, 12: 1}
    assert greys(sources.held_out["test"]) == {13: 1, 14: 1, 15: 1}
    assert sources.summary == "9 + 3 + 3 images (train + eval + test, held out) in 2 classes, as 8 × 8 × 3"


def test_without_val_a_part_of_train_is_held_out_as_if_it_were_alone(tmp_path: Path) -> None:
    make(tmp_path, train={"ant": 20, "bee": 20}, test={"ant": 2, "bee": 1})
    sources, alone = read(tmp_path, eval_fraction=0.3), read(tmp_path / "train", eval_fraction=0.3)
    assert (len(sources.train) + len(sources.eval), len(sources.held_out["test"])) == (40, 3)
    assert 0 < len(sources.eval) < 20
    assert (greys(sources.train), greys(sources.eval)) == (greys(alone.train), greys(alone.eval))
    assert not alone.held_out


def test_train_alone_is_no_class(tmp_path: Path) -> None:
    assert read(make(tmp_path, train={"ant": 9, "bee": 9}), eval_fraction=0.3).classes == ("ant", "bee")


def test_ordinary_folders_are_what_they_were(tmp_path: Path) -> None:
    make(tmp_path / "x", car={"": 9}, plane={"": 9}, train={"": 9})
    sources = read(tmp_path / "x", eval_fraction=0.3)
    assert sources.classes == ("car", "plane", "train")
    assert len(sources.train) + len(sources.eval) == 27
    assert not sources.held_out
    assert sources.fingerprint == "36e4a757aeb63c34374311bf8ee3620ed569f0fadf98e86045f480ad79f95fca"
    # A class may be called as a part is, and have folders in it where others have not such a name.
    make(tmp_path / "y", test={"": 4}, dog={"young": 4, "old": 4})
    assert read(tmp_path / "y", eval_fraction=0.3).classes == ("dog", "test")
    make(tmp_path / "z", train={"": 9}, test={"": 9}, car={"": 9})
    assert read(tmp_path / "z", eval_fraction=0.3).classes == ("car", "test", "train")


def test_a_class_may_be_called_as_a_target_is(tmp_path: Path) -> None:
    assert read(make(tmp_path, masks={"": 9}, goggles={"": 9}), eval_fraction=0.3).classes == ("goggles", "masks")


def test_the_same_files_in_parts_are_other_data_than_as_classes(tmp_path: Path) -> None:
    make(tmp_path / "p", train={"a": 3}, val={"a": 1})
    parts = read(tmp_path / "p")
    assert parts.files.keys() == {"train/a/0.png", "train/a/1.png", "train/a/2.png", "val/a/0.png"}
    assert parts.fingerprint != hash_files(parts.files)


UNCLEAR: dict[str, tuple[dict[str, dict[str, int]], str]] = {
    "beside": ({"train": {"a": 1}, "val": {"a": 1}, "extra": {"a": 1}}, "which are parts of a data set, beside extra"),
    "class": ({"train": {"a": 1, "b": 1}, "cat": {"": 2}}, "train holds folders of its own, .* and cat is none of its"),
    "no train": ({"val": {"a": 1}, "test": {"a": 1}}, "holds test and val, but nothing to train on"),
    "test alone": ({"test": {"a": 1, "b": 1}}, "holds test and nothing to train on"),
    "flat": ({"train": {"": 3}, "test": {"": 3}}, "train holds no folder; expected one with images for each class"),
    "twice": ({"train": {"a": 1}, "train_2": {"a": 1}, "val": {"a": 1}}, "holds train and train_2, which are one part"),
    "other class": (
        {"train": {"ant": 1, "bee": 1}, "val": {"ant": 1, "bea": 1}},
        "bea is no class .* did you mean bee",
    ),
    "flat val": ({"train": {"ant": 1, "bee": 1}, "val": {"": 3}}, "val holds no folder; expected the classes that are"),
    "nested": ({"x": {"train/a": 1, "train/b": 1}}, "holds one folder, and that holds the others; say data.path=.*x"),
    "masks": ({"images": {"": 2}, "masks": {"": 2}}, "holds images and masks, which are images and their targets"),
    "voc": (
        {"JPEGImages": {"": 2}, "SegmentationClass": {"": 2}},
        "holds JPEGImages and SegmentationClass, which are images and their targets",
    ),
    "pets": ({"images": {"": 2}, "annotations": {"trimaps": 2}}, "holds images and annotations, which are images and"),
    "parts of masks": (
        {"train": {"images": 2, "labels": 2}, "valid": {"images": 2, "labels": 2}},
        "train holds images and labels, which are images and their targets",
    ),
    "archive": ({"pets": {"ant": 1, "bee": 1}}, "holds one folder, and that holds the others; say data.path=.*pets"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_clear_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    parts, why = UNCLEAR[case]
    option = Images(path=str(make(tmp_path, **parts)))
    for look in (option.check_readable, option.sources):
        with pytest.raises(ValueError, match=why) as caught:
            look()
        assert str(caught.value).startswith("path=")
        assert len(str(caught.value).splitlines()) == 1


def test_parts_within_classes_are_refused(tmp_path: Path) -> None:
    """As MVTec has them: what is to test on would be trained on."""
    make(tmp_path, bottle={"train": 3, "test": 2}, cable={"train": 3, "test": 2})
    with pytest.raises(
        ValueError, match="bottle holds test and train, .*; expected the classes in them, as train/bottle"
    ):
        Images(path=str(tmp_path)).sources()


def test_what_to_evaluate_on_may_be_named(tmp_path: Path) -> None:
    make(tmp_path, one={"ant": 4, "bee": 4}, two={"bee": 3})
    sources = read(tmp_path / "one", eval_path=str(tmp_path / "two"))
    assert (len(sources.train), greys(sources.eval)) == (8, {9: 1, 10: 1, 11: 1})
    assert "eval_path/bee/0.png" in sources.files
    for wrong, why in (
        ("one/ant", "eval_path=.*ant holds no folder"),
        ("nowhere", "eval_path=.*nowhere does not exist"),
    ):
        with pytest.raises(ValueError, match=why):
            read(tmp_path / "one", eval_path=str(tmp_path / wrong))
    make(tmp_path / "whole", train={"ant": 2}, val={"ant": 2})
    with pytest.raises(ValueError, match="leave data.eval_path out"):
        read(tmp_path / "whole", eval_path=str(tmp_path / "two"))


def test_a_test_part_without_classes_is_left_out_and_said(tmp_path: Path) -> None:
    """As ImageNet's and Tiny ImageNet's are; the case of endings and the files of macOS are no matter."""
    make(tmp_path, train={"n01": 3, "n02": 3}, val={"n01": 2, "n02": 2})
    draw(tmp_path / "train/n01/images/x.JPEG", 200)
    draw(tmp_path / "test/images/1.JPEG", 99)
    (tmp_path / "train/n01/.DS_Store").write_bytes(b"x")
    (tmp_path / "train/n01/._0.png").write_bytes(b"x")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    (tmp_path / "__MACOSX/train").mkdir(parents=True)
    (tmp_path / "train/n01/Thumbs.db").write_bytes(b"x")
    (tmp_path / "train/n02/boxes.txt").write_bytes(b"x")
    (tmp_path / "train/list.csv").write_bytes(b"x")
    sources = read(tmp_path)
    assert sources.classes == ("n01", "n02")
    assert (len(sources.train), len(sources.eval), sources.held_out) == (7, 4, {})
    assert sources.summary.endswith("; not read: test (without folders of classes), 1 .csv, 1 .txt") or (
        sources.summary.endswith("; not read: test (without folders of classes), 1 .txt, 1 .csv")
    )


def test_links_are_followed(tmp_path: Path) -> None:
    make(tmp_path / "disk", a={"": 9}, b={"": 9})
    place = tmp_path / "place"
    (place / "train").mkdir(parents=True)
    for name in "ab":
        (place / f"train/{name}").symlink_to(tmp_path / f"disk/{name}")
    (place / "val").symlink_to(place / "train")
    sources = read(place)
    assert (len(sources.train), len(sources.eval)) == (18, 18)
    (tmp_path / "disk/a/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="gone.png: No such file or directory; bring it back, or remove it"):
        read(place)


@pytest.mark.parametrize("ending", ["webp", "bmp", "gif", "tif", "TIFF", "jfif", "ppm"])
def test_other_formats_are_read(ending: str, tmp_path: Path) -> None:
    for name, value in (("a", 40), ("b", 200)):
        for number in range(6):
            file = tmp_path / name / f"{number}.{ending}"
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8), (value,) * 3).save(file, format="JPEG" if ending == "jfif" else None)
    sources = read(tmp_path, eval_fraction=0.3)
    assert len(sources.train) + len(sources.eval) == 12
    for grey, label in greys(sources.train).items():
        assert abs(grey - (40, 200)[label]) < 4


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    values = np.array([[0, 257, 25700, 65535]] * 4, np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = decode_image((tmp_path / "deep.png").read_bytes(), 4, 1, "deep.png")
    assert pixels[0, :, 0].tolist() == [0, 1, 100, 255]
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif: is no image that can be read .pixels of 32 bits"):
        decode_image((tmp_path / "float.tif").read_bytes(), 4, 1, "float.tif")


def test_a_name_need_not_be_utf8(tmp_path: Path) -> None:
    make(tmp_path, a={"": 9}, b={"": 9})
    os.rename(tmp_path / "a/0.png", os.fsencode(tmp_path) + b"/a/\xff.png")
    assert len(read(tmp_path, eval_fraction=0.3).files) == 18
