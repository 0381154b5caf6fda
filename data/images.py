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
KEPT_BYTES = 2**30  # of decoded pixels, in each process
VERIFIED = 5_000  # so many files are looked into before training begins


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images, by number, as float32 in [0, 1]."""

    names: list[str]
    label: np.ndarray
    encoded: Callable[[int], bytes]
    size: int
    channels: int
    kept: dict[int, UInt8[np.ndarray, "height width channels"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        numbers = np.asarray(indices)
        pixels = np.stack([self._pixels(int(number)) for number in numbers])
        return {"inputs": pixels.astype(np.float32) / np.float32(255.0), "label": self.label[numbers]}

    def _pixels(self, number: int) -> UInt8[np.ndarray, "height width channels"]:
        pixels = self.kept.get(number)
        if pixels is None:
            pixels = decode_image(self.encoded(number), self.size, self.channels, self.names[number])
            if (len(self.kept) + 1) * pixels.nbytes <= KEPT_BYTES:
                self.kept[number] = pixels
        return pixels


def decode_image(content: bytes, size: int, channels: int, name: str) -> UInt8[np.ndarray, "height width channels"]:
    """An image as `size` × `size` pixels: its middle square, scaled. Raises UnreadableError, which names it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft(None, (size, size))  # a JPEG need not be decoded larger than twice the size
            fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError(f"{name}: is no image that can be read ({_why(error)}); replace or remove it") from None
    return np.asarray(fitted, np.uint8).reshape(size, size, channels)


def _why(error: Exception) -> str:
    return "unknown format" if "cannot identify" in str(error) else str(error)


def list_classes(folder: Path) -> list[str]:
    """The classes of a folder: its folders, in the order of their names. Raises ValueError where it has none."""
    if not folder.is_dir():
        raise ValueError(f"path={folder} is a file; expected a folder with a folder of images for each class")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"path={folder} holds no folder; expected one with images for each class")
    return names


def read_image_folder(folder: Path, size: int, channels: int, eval_fraction: float) -> Sources:
    """The images of a folder, split by file: a side depends on the file's name alone, so new files move no old ones."""
    names = list_classes(folder)
    found = [(f"{name}/{file}", label) for label, name in enumerate(names) for file in _files(folder / name)]
    if empty := sorted(set(range(len(names))) - {label for _, label in found}):
        raise ValueError(f"{folder / names[empty[0]]} holds no {', '.join(ENDINGS)}; put images there, or remove it")
    named = _looked_at(folder, [name for name, _ in found])
    sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for file in found:
        sides[draw_from_name(file[0].encode(errors="surrogateescape")) < eval_fraction].append(file)
    mine, theirs = (_pictures(folder, side, size, channels) for side in sides)
    return Sources(
        mine,
        theirs,
        (size, size, channels),
        len(names),
        hash_files(named),
        f"{len(mine):,} + {len(theirs):,} images (train + eval) in {len(names)} classes, "
        f"as {size} × {size} × {channels}",
        waits=True,
        files=named,
    )


def _files(folder: Path) -> list[str]:
    """The images below a class, by name, in order."""
    found = []
    for path, _, names in os.walk(folder):
        inside = os.path.relpath(path, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in names if name.lower().endswith(ENDINGS)]
    return sorted(found)


def _pictures(folder: Path, files: list[tuple[str, int]], size: int, channels: int) -> EncodedImages:
    paths = [f"{folder}/{name}" for name, _ in files]  # plain text: a Path for each would take seconds
    labels = np.array([label for _, label in files], np.int32)

    def encoded(number: int) -> bytes:
        try:
            return _content(paths[number])
        except OSError as error:
            raise UnreadableError(f"{paths[number]}: {error.strerror}; bring it back") from None

    return EncodedImages(paths, labels, encoded, size, channels)


def _looked_at(folder: Path, names: list[str]) -> dict[str, str]:
    """Size and content of each file; of its size alone where all together are large: another image has another size.

    Some thousands of them are looked into as well, so that what is no image is found before training begins.
    """
    step = max(len(names) // VERIFIED, 1)
    sizes = {name: os.stat(f"{folder}/{name}").st_size for name in names}
    if sum(sizes.values()) > WHOLE_BYTES:
        for name in names[::step]:
            _verify(_content(f"{folder}/{name}"), f"{folder}/{name}")
        return {name: f"{size} -" for name, size in sizes.items()}
    named = {}
    for number, name in enumerate(names):
        content = _content(f"{folder}/{name}")
        named[name] = identify_bytes(content)
        if number % step == 0:
            _verify(content, f"{folder}/{name}")
    return named


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _verify(content: bytes, path: str) -> None:
    """Raises ValueError where a file is no image, or a PNG is cut off."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: is no image that can be read ({_why(error)}); replace or remove it") from None
