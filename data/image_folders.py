"""Folders of images: one for each class, perhaps below `train`, `val` and `test`, as data sets are published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.bad_examples import OnBad
from data.data_errors import UndecodableError, UnreadableError
from data.documents import count_endings
from data.fingerprint import WHOLE_BYTES, draw_from_name, hash_files, identify_bytes
from data.images import EncodedImages, check_image
from data.option_fields import explain_missing_name
from data.sources import Sources
from data.splits import AmbiguousSplitError, Split, find_split, group_names, is_bare_split

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# How data sets for finding things in images call their folders (Pascal VOC, COCO, YOLO, and who follows them), in lower
# case and without numbers or signs.
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "pngimages", "rgb", "pictures", "photos"})
TARGET_FOLDERS = frozenset(
    {
        *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "trimaps", "gt", "groundtruth"),
        *("segmentation", "segmentations", "segmentationclass", "segmentationobject", "depth", "boxes", "bboxes"),
    }
)
# So many files are opened as images before training begins.
VERIFIED_FILES = 5_000
# What lies in nearly every folder of somebody and is nobody's data.
UNTOLD_FILES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
# What names of files of another folder than `path` begin with.
EVAL_PREFIX = "eval_path/"


@dataclass(frozen=True)
class ImageLayout:
    """Where the classes of each part are: `train` always, and perhaps `eval` and `test`.

    `parts` has, for each part, the folder that holds the folders of classes, and with what its names begin.
    `left_out` says what is there and not read.
    """

    parts: Mapping[Split, tuple[Path, str]]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageForm:
    """The side in pixels and the channels that images are given, and what is done about one that cannot be decoded."""

    size: int
    channels: int
    on_bad: OnBad = "raise"


@dataclass
class FoundImages:
    """The images of one part: the name of each, its path, and its label; and the names of other files."""

    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def select(self, chosen: Iterable[int]) -> FoundImages:
        """Return some of them."""
        numbers = list(chosen)
        return FoundImages(
            [self.names[n] for n in numbers], [self.paths[n] for n in numbers], [self.labels[n] for n in numbers]
        )


def find_image_layout(folder: Path, eval_path: Path | None = None) -> ImageLayout:
    """Return where the classes of a folder are: its own folders, or those below folders that are parts of a data set.

    Raises ValueError where there are none, where the parts have other classes than `train`, or where it is not clear
    what is a part and what a class.
    """
    names = _list_folders(folder)
    if not names:
        raise ValueError(f"path={folder} holds no folder; expected one with images for each class")
    groups = _group_parts(folder, names)
    if groups is None:
        _refuse_folder_in_folder(folder, names)
        _refuse_pictures_of_targets(folder, names)
        layout = ImageLayout({"train": (folder, "")}, tuple(names))
    else:
        layout = _lay_out_parts(folder, groups)
    if eval_path is None:
        return layout
    if "eval" in layout.parts:
        raise ValueError(
            f"eval_path={eval_path} is one thing to evaluate on, and {layout.parts['eval'][0]} another; "
            "leave data.eval_path out, or name in data.path what is to train on"
        )
    _check_classes("eval_path", eval_path, layout.classes)
    return ImageLayout({**layout.parts, "eval": (eval_path, EVAL_PREFIX)}, layout.classes, layout.left_out)


def _group_parts(folder: Path, names: list[str]) -> dict[Split, str] | None:
    """Return the folder of each part; None where folders are classes. Raises ValueError where it is not clear."""
    way_out = "name data.path and data.eval_path, each a folder of classes"
    # What holds folders is no class: its images would lie in it.
    nested = [name for name in names if find_split(name) and _holds_classes(folder / name)]
    try:
        groups = group_names(names)
    except AmbiguousSplitError as error:
        if not nested and not all(map(is_bare_split, names)):
            return None
        raise ValueError(f"path={folder} {error}; {way_out}") from None
    if groups is None:
        if nested and len(names) > 1:
            beside = next(name for name in names if name != nested[0])
            raise ValueError(
                f"path={folder}: {nested[0]} holds folders of its own, as a part of a data set does, and {beside} is "
                f"none of its parts; {way_out}"
            )
        if nested and find_split(nested[0]) != "train":
            raise ValueError(f"path={folder} holds {nested[0]} and nothing to train on; {way_out}")
        return {"train": nested[0]} if nested else None
    if several := next((group for group in groups.values() if len(group) > 1), None):
        raise ValueError(f"path={folder} holds {several[0]} and {several[1]}, which are one part; {way_out}")
    if not _holds_classes(folder / groups["train"][0]):
        raise ValueError(
            f"path={folder / groups['train'][0]} holds no folder; expected one with images for each class, as a part "
            "of a data set has them"
        )
    return {part: group[0] for part, group in groups.items()}


def _lay_out_parts(folder: Path, groups: Mapping[Split, str]) -> ImageLayout:
    """Return the parts of a data set, which all have the classes of `train`. Raises ValueError where one has others."""
    classes = tuple(_list_folders(folder / groups["train"]))
    _refuse_pictures_of_targets(folder / groups["train"], classes)
    left_out = []
    parts: dict[Split, tuple[Path, str]] = {"train": (folder / groups["train"], f"{groups['train']}/")}
    for part in ("eval", "test"):
        if part not in groups:
            continue
        place = folder / groups[part]
        if part == "test" and not set(_list_folders(place)) & set(classes):
            # As ImageNet's is: the labels were kept back by its makers.
            left_out.append(f"{groups[part]} (without folders of classes)")
            continue
        _check_classes("path", place, classes)
        parts[part] = (place, f"{groups[part]}/")
    return ImageLayout(parts, classes, tuple(left_out))


def _check_classes(key: str, place: Path, classes: tuple[str, ...]) -> None:
    """Raise ValueError where a folder to evaluate on has no classes, or others than those trained on."""
    if not place.is_dir():
        raise ValueError(f"{key}={place} is a file; expected a folder with the classes that are trained on")
    names = _list_folders(place)
    if not names:
        raise ValueError(
            f"{key}={place} holds no folder; expected the classes that are trained on: {', '.join(classes[:5])}"
        )
    if unknown := [name for name in names if name not in classes]:
        known = explain_missing_name(unknown[0], classes)
        raise ValueError(f"{key}={place / unknown[0]}: {unknown[0]} is no class that is trained on{known}")


def _refuse_folder_in_folder(folder: Path, names: list[str]) -> None:
    """Raise ValueError where the only folder is no class: what a downloaded archive was unpacked into."""
    inside = folder / names[0]
    if len(names) == 1 and _holds_classes(inside):
        raise ValueError(f"path={folder} holds one folder, and that holds the others; say data.path={inside}")


def _refuse_pictures_of_targets(folder: Path, names: Sequence[str]) -> None:
    """Raise ValueError where folders are not classes, but images and what is to be found in them, as masks."""
    images, targets = (
        [name for name in names if re.sub(r"[\W\d_]", "", name.lower()) in known]
        for known in (IMAGE_FOLDERS, TARGET_FOLDERS)
    )
    if images and targets:
        raise ValueError(
            f"path={folder} holds {images[0]} and {targets[0]}, which are images and their targets and no classes; "
            "read them with a function of your own (data=my_file:my_data), or name folders after classes"
        )


def _list_folders(folder: Path) -> list[str]:
    """Return the folders of a folder, in the order of their names, without hidden ones."""
    if not folder.is_dir():
        raise ValueError(f"path={folder} is a file; expected a folder with a folder of images for each class")
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name))


def _holds_classes(folder: Path) -> bool:
    """Tell whether a folder holds folders, and no image itself."""
    has_folder = False
    for entry in os.scandir(folder):
        if entry.name.lower().endswith(ENDINGS) and not _is_hidden(entry.name):
            return False
        has_folder = has_folder or (entry.is_dir() and not _is_hidden(entry.name))
    return has_folder


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def read_image_folder(layout: ImageLayout, form: ImageForm, eval_fraction: float) -> Sources:
    """Return the images of a folder. Raises ValueError where a class has none, or a file is no image.

    Split by file where there is no part to evaluate on: a file's side depends on its name alone, so new files move no
    old ones.
    """
    found = {part: _find_images(place, prefix, layout.classes) for part, (place, prefix) in layout.parts.items()}
    missing = sorted(set(range(len(layout.classes))) - set(found["train"].labels))
    if missing:
        empty = layout.parts["train"][0] / layout.classes[missing[0]]
        raise ValueError(f"{empty} holds no {', '.join(ENDINGS[:3])} (nor other images); put some there, or remove it")
    files = _identify_images(found, form.on_bad)
    is_drawn = "eval" not in found
    others = [*layout.left_out, count_endings(name for part in found.values() for name in part.others)]
    counts = {name: len(part.names) for name, part in found.items()}
    if is_drawn:
        found |= _draw_sides(found["train"], layout.parts["train"][1], eval_fraction)
    sources = {part: _make_source(images, form) for part, images in found.items()}
    held_out = {"test": sources["test"]} if "test" in sources else {}
    plain = is_drawn and layout.parts["train"][1] == ""
    return Sources(
        sources["train"],
        sources["eval"],
        (form.size, form.size, form.channels),
        len(layout.classes),
        # The same files in other parts are other data.
        hash_files(files) if plain else hash_files(files, *sorted(counts)),
        _summarize(sources, layout, form, [other for other in others if other]),
        waits=True,
        files=files,
        held_out=held_out,
        classes=layout.classes,
    )


def _summarize(
    sources: Mapping[Split, EncodedImages], layout: ImageLayout, form: ImageForm, left_out: list[str]
) -> str:
    """Return how many images there are in each part, and what is not read."""
    sides = " + ".join(f"{len(sources[part]):,}" for part in ("train", "eval", "test") if part in sources)
    named = "train + eval + test, held out" if "test" in sources else "train + eval"
    size = f"{form.size} × {form.size} × {form.channels}"
    not_read = f"; not read: {', '.join(left_out)}" if left_out else ""
    return f"{sides} images ({named}) in {len(layout.classes)} classes, as {size}{not_read}"


def _find_images(place: Path, prefix: str, classes: Iterable[str]) -> FoundImages:
    """Return the images below the folder of each class, in the order of their names within it."""
    found = FoundImages()
    for label, name in enumerate(classes):
        inside = []
        for path, folders, files in os.walk(place / name):
            folders[:] = [folder for folder in folders if not _is_hidden(folder)]
            if path == str(place / name):
                _refuse_parts_in_class(place / name, folders)
            relative = os.path.relpath(path, place / name)
            for file in files:
                if file.lower().endswith(ENDINGS) and not _is_hidden(file):
                    inside.append(os.path.normpath(os.path.join(relative, file)))
                elif not _is_hidden(file) and file.lower() not in UNTOLD_FILES:
                    found.others.append(file)
        for file in sorted(inside):
            found.names.append(f"{prefix}{name}/{file}")
            # Plain text: making a Path for each of a million files would take seconds.
            found.paths.append(f"{place}/{name}/{file}")
            found.labels.append(label)
    # Those beside the folders are in no class.
    beside = (entry.name for entry in os.scandir(place) if entry.is_file() and not _is_hidden(entry.name))
    found.others += [name for name in beside if name.lower() not in UNTOLD_FILES]
    return found


def _refuse_parts_in_class(folder: Path, inside: list[str]) -> None:
    """Raise ValueError where a class holds the parts of a data set: what is to test on would be trained on."""
    try:
        groups = group_names(inside)
    except AmbiguousSplitError:
        groups = None
    if groups is not None:
        parts = " and ".join(group[0] for group in groups.values())
        raise ValueError(
            f"path={folder} holds {parts}, which are parts of a data set; expected the classes in them, as "
            f"{groups['train'][0]}/{folder.name}: move them, or name data.path and data.eval_path"
        )


def _draw_sides(images: FoundImages, prefix: str, eval_fraction: float) -> dict[Split, FoundImages]:
    """Return images to train and to evaluate on, drawn by their names below the folder that holds the classes."""
    sides: tuple[list[int], list[int]] = ([], [])
    for number, name in enumerate(images.names):
        # File names need not be UTF-8.
        draw = draw_from_name(name.removeprefix(prefix).encode(errors="surrogateescape"))
        sides[draw < eval_fraction].append(number)
    return {"train": images.select(sides[0]), "eval": images.select(sides[1])}


def _make_source(images: FoundImages, form: ImageForm) -> EncodedImages:
    def read(number: int) -> bytes:
        try:
            return _read_file(images.paths[number])
        except OSError as error:
            raise UnreadableError(f"{images.paths[number]}: {error.strerror}; bring it back") from None

    labels = np.array(images.labels, np.int32)
    return EncodedImages(images.paths, labels, read, form.size, form.channels, find_file=images.names.__getitem__)


def _identify_images(found: Mapping[Split, FoundImages], on_bad: OnBad) -> dict[str, str]:
    """Return size and content of each file; its size alone where all together are large.

    That is enough there: another image has another size. Some thousands of files are opened as well, so that what is no
    image is found before training begins.
    """
    named = {name: path for part in found.values() for name, path in zip(part.names, part.paths, strict=True)}
    step = max(len(named) // VERIFIED_FILES, 1)
    try:
        sizes = {name: os.stat(path).st_size for name, path in named.items()}
        is_large = sum(sizes.values()) > WHOLE_BYTES
        files = {name: f"{size} -" for name, size in sizes.items()} if is_large else {}
        for number, (name, path) in enumerate(named.items()):
            if is_large and number % step:
                continue
            content = _read_file(path)
            if not is_large:
                files[name] = identify_bytes(content)
            # What is to be passed over is found where it is decoded.
            if number % step == 0 and on_bad == "raise":
                check_image(content, path)
    except UndecodableError as error:
        raise ValueError(f"{error}; replace or remove it, or add data.on_bad=skip") from None
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}; bring it back, or remove it") from None
    return files


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
