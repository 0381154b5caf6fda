"""Images from files: a folder for each class. Decoded when an image is first taken, then kept while there is room."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from data.data_errors import UnreadableError
from data.fingerprint import WHOLE_BYTES, draw_from_name, hash_files, identify_bytes
from data.sources import Sources

ENDINGS = (".png", ".jpg", ".jpeg")
# Of decoded pixels, in each process.
KEPT_BYTES = 2**30
# So many files are opened as images before training begins.
VERIFIED_FILES = 5_000


@dataclass(frozen=True)
class EncodedImages:
    """Labelled images as float32 in [0, 1], decoded when they are taken: `size` × `size` pixels of 1 or 3 channels.

    `read` returns the encoded bytes of an image by its number; `names` are for error messages.
    """

    names: list[str]
    label: np.ndarray
    read: Callable[[int], bytes]
    size: int
    channels: int
    kept: dict[int, UInt8[np.ndarray, "height width channels"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the images and labels at `indices`. Raises UnreadableError, which names the image."""
        numbers = np.asarray(indices)
        pixels = np.stack([self._decode(int(number)) for number in numbers])
        return {"inputs": pixels.astype(np.float32) / np.float32(255.0), "label": self.label[numbers]}

    def _decode(self, number: int) -> UInt8[np.ndarray, "height width channels"]:
        pixels = self.kept.get(number)
        if pixels is None:
            pixels = decode_image(self.read(number), self.size, self.channels, self.names[number])
            # What came first stays: the order is random, so no image is wanted sooner than another.
            if (len(self.kept) + 1) * pixels.nbytes <= KEPT_BYTES:
                self.kept[number] = pixels
        return pixels


def decode_image(content: bytes, size: int, channels: int, name: str) -> UInt8[np.ndarray, "height width channels"]:
    """Return an image as `size` × `size` pixels: its middle square, scaled. Raises UnreadableError, which names it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            # A JPEG is then decoded at a fraction of its resolution, the least that is not below the wanted one.
            image.draft(None, (size, size))
            fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
    except (OSError, SyntaxError, ValueError) as error:
        why = _describe_error(error)
        raise UnreadableError(f"{name}: is no image that can be read ({why}); replace or remove it") from None
    return np.asarray(fitted, np.uint8).reshape(size, size, channels)


def _describe_error(error: Exception) -> str:
    # Pillow's message has the address of an object in it, which helps nobody.
    return "unknown format" if "cannot identify" in str(error) else str(error)


def list_classes(folder: Path) -> list[str]:
    """Return the classes of a folder: its folders, in the order of their names. Raises ValueError where it has none."""
    if not folder.is_dir():
        raise ValueError(f"path={folder} is a file; expected a folder with a folder of images for each class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"path={folder} holds no folder; expected one with images for each class")
    return names


def read_image_folder(folder: Path, size: int, channels: int, eval_fraction: float) -> Sources:
    """Return the images of a folder. Raises ValueError where a class has none, or a file is no image.

    Split by file: a file's side depends on its name alone, so new files move no old ones.
    """
    classes = list_classes(folder)
    labelled = [(f"{name}/{file}", label) for label, name in enumerate(classes) for file in _list_images(folder / name)]
    if empty := sorted(set(range(len(classes))) - {label for _, label in labelled}):
        raise ValueError(f"{folder / classes[empty[0]]} holds no {', '.join(ENDINGS)}; put images there, or remove it")
    files = _identify_images(folder, [name for name, _ in labelled])
    sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for name, label in labelled:
        # File names need not be UTF-8.
        draw = draw_from_name(name.encode(errors="surrogateescape"))
        sides[draw < eval_fraction].append((name, label))
    train, held_out = (_make_source(folder, side, size, channels) for side in sides)
    return Sources(
        train,
        held_out,
        (size, size, channels),
        len(classes),
        hash_files(files),
        f"{len(train):,} + {len(held_out):,} images (train + eval) in {len(classes)} classes, "
        f"as {size} × {size} × {channels}",
        waits=True,
        files=files,
    )


def _list_images(folder: Path) -> list[str]:
    """Return the images below the folder of a class, by name relative to it, in order."""
    found = []
    for path, _, names in os.walk(folder):
        inside = os.path.relpath(path, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in names if name.lower().endswith(ENDINGS)]
    return sorted(found)


def _make_source(folder: Path, labelled: list[tuple[str, int]], size: int, channels: int) -> EncodedImages:
    # Plain text: making a Path for each of a million files would take seconds.
    paths = [f"{folder}/{name}" for name, _ in labelled]
    labels = np.array([label for _, label in labelled], np.int32)

    def read(number: int) -> bytes:
        try:
            return _read_file(paths[number])
        except OSError as error:
            raise UnreadableError(f"{paths[number]}: {error.strerror}; bring it back") from None

    return EncodedImages(paths, labels, read, size, channels)


def _identify_images(folder: Path, names: list[str]) -> dict[str, str]:
    """Return size and content of each file; its size alone where all together are large.

    That is enough there: another image has another size. Some thousands of files are opened as well, so that what is no
    image is found before training begins.
    """
    step = max(len(names) // VERIFIED_FILES, 1)
    sizes = {name: os.stat(f"{folder}/{name}").st_size for name in names}
    if sum(sizes.values()) > WHOLE_BYTES:
        for name in names[::step]:
            _verify_image(_read_file(f"{folder}/{name}"), f"{folder}/{name}")
        return {name: f"{size} -" for name, size in sizes.items()}
    files = {}
    for number, name in enumerate(names):
        content = _read_file(f"{folder}/{name}")
        files[name] = identify_bytes(content)
        if number % step == 0:
            _verify_image(content, f"{folder}/{name}")
    return files


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _verify_image(content: bytes, path: str) -> None:
    """Raise ValueError where a file is no image, or a PNG is cut off."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        why = _describe_error(error)
        raise ValueError(f"{path}: is no image that can be read ({why}); replace or remove it") from None
