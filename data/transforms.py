"""Images varied for training, a batch at a time. What is drawn depends on the seed and the number of the batch alone.

So any batch can be made by itself, in any process, and is the same after a restart; and any rows of it, without the
others.
Random crops and flips: He et al. 2016 (arXiv:1512.03385), 4.2. Erasing: DeVries & Taylor 2017 (arXiv:1708.04552).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data.option_fields import Augmentation

ImageBatch = Float[np.ndarray, "batch height width channels"]
# Each draws from a stream of its own: to turn one off changes nothing of the others.
CROP, FLIP, ERASE, BRIGHTNESS, NOISE = range(1, 6)


@dataclass(frozen=True)
class RowsOfBatch:
    """Where some images belong: they are the rows from `first` on of a batch of `batch_size`."""

    first: int
    batch_size: int


def augment_images(
    images: ImageBatch, option: Augmentation, *, seed: int, number: int, place: RowsOfBatch | None = None
) -> ImageBatch:
    """Return the images of batch `number`, varied as `option` says; the same array where it says nothing.

    `place` says which rows of the batch they are; None: all of them. An image comes out the same, whichever others are
    there.
    """
    place = place or RowsOfBatch(0, len(images))

    def draw(stream: int, times: int) -> Float[np.ndarray, "times batch"]:
        every = draw_uniform(seed, number, stream, (times, place.batch_size))
        return every[:, place.first : place.first + len(images)]

    def draw_pixels(stream: int, times: int) -> Float[np.ndarray, "times batch height width channels"]:
        # Here the numbers of the other rows are many: they are passed over and not drawn.
        size = math.prod(images.shape[1:])
        begins = [(time * place.batch_size + place.first) * size for time in range(times)]
        return np.stack([draw_uniform(seed, number, stream, images.shape, begin) for begin in begins])

    if option.crop:
        images = crop_images(images, option.crop, draw(CROP, 2))
    if option.flip:
        images = np.where((draw(FLIP, 1)[0] < 0.5)[:, None, None, None], images[:, :, ::-1], images)
    if option.erase:
        images = erase_squares(images, option.erase, draw(ERASE, 3))
    if option.brightness:
        shift = np.float32(option.brightness) * make_normal(draw(BRIGHTNESS, 2))
        images = images + shift[:, None, None, None]
    if option.noise:
        images = images + np.float32(option.noise) * make_normal(draw_pixels(NOISE, 2))
    return images


def draw_uniform(
    seed: int, number: int, stream: int, shape: tuple[int, ...], begin: int = 0
) -> Float[np.ndarray, "..."]:
    """Return numbers in [0, 1) with 24 random bits each, for one stream of one batch, without its first `begin`."""
    # Raw Philox output never changes between versions of numpy. Each of its 64-bit numbers gives two of ours, of 24
    # bits, which float32 holds exactly; and each value of its counter gives four of its own.
    block, rest = divmod(begin, 8)
    end = rest + math.prod(shape)
    raw = np.random.Philox(key=[seed % 2**64, number], counter=[block, 0, 0, stream]).random_raw((end + 1) // 2)
    halves = raw.astype("<u8").view("<u4")[rest:end]
    values = (halves >> 8).astype(np.float32)
    values *= np.float32(2**-24)
    return values.reshape(shape)


def make_normal(pairs: Float[np.ndarray, "2 *shape"]) -> Float[np.ndarray, "*shape"]:
    """Return standard normal numbers made of pairs of uniform ones (Box & Muller 1958)."""
    return np.sqrt(-2.0 * np.log1p(-pairs[0])) * np.cos(np.float32(2.0 * np.pi) * pairs[1])


def crop_images(images: ImageBatch, border: int, where: Float[np.ndarray, "2 batch"]) -> ImageBatch:
    """Return a window of each image's own size, cut from the image with a black border of `border` pixels.

    `where` has a number in [0, 1) for the row and one for the column of each window.
    """
    size, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)))
    top, left = (where * (2 * border + 1)).astype(np.int64)
    rows, columns = top[:, None] + np.arange(height), left[:, None] + np.arange(width)
    # Indexed by (image, row, column) at once: all windows in one copy.
    return padded[np.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]


def erase_squares(images: ImageBatch, share: float, draws: Float[np.ndarray, "3 batch"]) -> ImageBatch:
    """Return the images, a share of them with a square of half their height and width in black.

    `draws` has three numbers in [0, 1) for each image: whether it is one of them, and the row and the column.
    """
    _, height, width, _ = images.shape
    top, left = (draws[1] * (height - height // 2 + 1)).astype(int), (draws[2] * (width - width // 2 + 1)).astype(int)
    rows, columns = np.arange(height) - top[:, None], np.arange(width) - left[:, None]
    inside = ((rows >= 0) & (rows < height // 2))[:, :, None] & ((columns >= 0) & (columns < width // 2))[:, None, :]
    is_erased = inside & (draws[0] < share)[:, None, None]
    return np.where(is_erased[..., None], np.float32(0.0), images)
