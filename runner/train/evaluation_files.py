"""Encode the pictures and texts that an evaluation leaves in a run's directory: equal bytes for equal values."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

# Pixels between pictures.
GAP = 2
# Pictures with a shorter side than this are enlarged, so that a person sees something.
MIN_PIXELS = 48
WHITE = 255


def encode_mosaic(images: Float[np.ndarray, "count height width channels"], columns: int) -> bytes:
    """Encode images side by side as one PNG: values in [0, 1], grey (1 channel) or colour (3)."""
    pixels = _as_pixels(images)
    count, height, width, channels = pixels.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), WHITE, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (
            GAP + place * (size + GAP) for place, size in zip(divmod(index, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = picture
    return _encode_png(sheet)


def encode_picture(image: Float[np.ndarray, "height width channels"]) -> bytes:
    """Encode one image as PNG: values in [0, 1], grey (1 channel) or colour (3)."""
    return _encode_png(_as_pixels(image[None])[0])


def encode_figure(figure: Any) -> bytes:
    """Encode a figure of matplotlib as PNG."""
    out = io.BytesIO()
    # Without the version that drew it.
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def encode_pairs(
    above: Float[np.ndarray, "count height width channels"], below: Float[np.ndarray, "count height width channels"]
) -> bytes:
    """Encode each image of `above` with its counterpart below it, as one PNG."""
    columns = math.ceil(math.sqrt(2 * len(above)))
    blank = np.ones_like(above[:1])
    lines = []
    for start in range(0, len(above), columns):
        for side in (above, below):
            part = side[start : start + columns]
            lines += [part, np.repeat(blank, columns - len(part), axis=0)]
    return encode_mosaic(np.concatenate(lines), columns)


def _as_pixels(images: Float[np.ndarray, "count height width channels"]) -> np.ndarray:
    """Return images as bytes, the small ones enlarged."""
    pixels = (np.clip(np.nan_to_num(images), 0.0, 1.0) * 255.0).round().astype(np.uint8)
    # Whole factors: a resampled digit would show what is not there.
    factor = max(1, math.ceil(MIN_PIXELS / min(pixels.shape[1:3])))
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def _encode_png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).save(out, format="PNG")
    return out.getvalue()


def format_samples(texts: Sequence[tuple[str, str]]) -> str:
    """Return prompts and what came after them, as text."""
    return "\n".join(f"── {number} ── after {prompt!r}\n{text}\n" for number, (prompt, text) in enumerate(texts, 1))
