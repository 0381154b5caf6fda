"""Encoded images: decoded when one is first taken, then kept while there is room."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data.data_errors import UndecodableError

# Of decoded pixels, in each process.
KEPT_BYTES = 2**30


@dataclass(frozen=True)
class EncodedImages:
    """Labelled images as float32 in [0, 1], decoded when they are taken: `size` × `size` pixels of 1 or 3 channels.

    `read` returns the encoded bytes of an image by its number; `names` are for error messages. `find_file` returns the
    name in `Sources.files` of the file that holds one image; None where images have no files of their own.
    """

    names: list[str]
    label: np.ndarray
    read: Callable[[int], bytes]
    size: int
    channels: int
    kept: dict[int, UInt8[np.ndarray, "height width channels"]] = field(default_factory=dict)
    find_file: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return len(self.label)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the images and labels at `indices`. Raises UndecodableError, which names the image."""
        numbers = np.asarray(indices)
        pixels = np.stack([self._decode(int(number)) for number in numbers])
        return {"inputs": pixels.astype(np.float32) / np.float32(255.0), "label": self.label[numbers]}

    def _decode(self, number: int) -> UInt8[np.ndarray, "height width channels"]:
        pixels = self.kept.get(number)
        if pixels is None:
            try:
                pixels = decode_image(self.read(number), self.size, self.channels, self.names[number])
            except UndecodableError as error:
                raise self._add_ways_out(error, number) from None
            # What came first stays: the order is random, so no image is wanted sooner than another.
            if (len(self.kept) + 1) * pixels.nbytes <= KEPT_BYTES:
                self.kept[number] = pixels
        return pixels

    def _add_ways_out(self, error: UndecodableError, number: int) -> UndecodableError:
        """Return the error with what to do: what is no file of its own cannot be replaced by itself."""
        mend = "replace it with a good file of the same name" if self.find_file else "write it again for a new run"
        told = UndecodableError(f"{error}; {mend}, or add data.on_bad=skip")
        told.file = self.find_file(number) if self.find_file else None
        return told


def decode_image(content: bytes, size: int, channels: int, name: str) -> UInt8[np.ndarray, "height width channels"]:
    """Return an image as `size` × `size` pixels: its middle square, scaled. Raises UndecodableError, which names it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            # A JPEG is then decoded at a fraction of its resolution, the least that is not below the wanted one.
            image.draft(None, (size, size))
            fitted = ImageOps.fit(_as_bytes(image).convert("L" if channels == 1 else "RGB"), (size, size))
    # What Pillow raises of a file that is no image, is cut off, or would fill the memory (a bomb).
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError) as error:
        raise UndecodableError(f"{name}: is no image that can be read ({describe_error(error)})") from None
    return np.asarray(fitted, np.uint8).reshape(size, size, channels)


def _as_bytes(image: Any) -> Any:
    """Return an image with at most 8 bits a value. Raises ValueError where its values have no largest one."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        # Pillow would cut off what is above 255, and nearly all of such an image is.
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, of which nobody knows what is white; write it with 8 or 16")
    return image


def describe_error(error: Exception) -> str:
    """Return what Pillow says of an image, without the address of an object, which helps nobody."""
    return "unknown format" if "cannot identify" in str(error) else str(error)


def check_image(content: bytes, name: str) -> None:
    """Raise UndecodableError where a file is no image, or a PNG is cut off. Decodes nothing."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UndecodableError(f"{name}: is no image that can be read ({describe_error(error)})") from None
