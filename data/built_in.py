"""Data that every machine has: scikit-learn's digits, and random examples that are made on the spot."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

from data.fingerprint import identify_bytes
from data.sources import NUM_BYTES, NUM_CLASSES, Source, Sources, Table, split_table
from data.text_files import TokenWindows


def read_digits(eval_fraction: float) -> Sources:
    """Return the UCI handwritten digits as scikit-learn ships them, pixels scaled to [0, 1]; the split is fixed."""
    table = _load_digits_table()
    pixels, labels = table[:, :-1], table[:, -1]
    return _split_columns(
        {"inputs": (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8, 1), "label": labels.astype(np.int32)},
        eval_fraction,
        "digits.csv.gz",
    )


def _load_digits_table() -> Float[np.ndarray, "1797 65"]:
    """Return the 64 pixels and the label of each image."""
    # From the file in the package: importing scikit-learn takes half as long as a whole restart.
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin or "").parent / "datasets/data/digits.csv.gz" if package else Path()
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])


def _split_columns(columns: dict[str, np.ndarray], eval_fraction: float, name: str) -> Sources:
    train, held_out = split_table(Table(columns), eval_fraction)
    content = [column.tobytes() for column in columns.values()]
    return Sources(
        train,
        held_out,
        columns["inputs"].shape[1:],
        NUM_CLASSES,
        hashlib.sha256(b"".join(content)).hexdigest(),
        f"{len(train)} + {len(held_out)} examples (train + eval)",
        files={name: identify_bytes(*content)},
    )


@dataclass(frozen=True)
class DelayedSource:
    """A source that takes so many seconds longer for each batch: what slow storage does to training."""

    source: Source
    seconds: float

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """Return the examples at `indices` after the delay."""
        time.sleep(self.seconds)
        return self.source.take(indices)


def delay_batches(sources: Sources, seconds: float) -> Sources:
    """Return the sources with a delay before each batch of training; without one where `seconds` is 0."""
    return replace(sources, train=DelayedSource(sources.train, seconds), waits=True) if seconds else sources


def make_random_tokens(size: int, seq_len: int) -> Sources:
    """Make `size` windows of uniformly random bytes, the same on every machine."""
    content: UInt8[np.ndarray, "bytes"] = np.random.default_rng(0).integers(0, NUM_BYTES, size * seq_len + 1, np.uint8)
    source = TokenWindows(content, seq_len)
    held_out = TokenWindows(content[: max(size // 8, 1) * seq_len + 1], seq_len)
    name = f"synthetic tokens {size} {seq_len}"
    files = {name: identify_bytes(content.tobytes())}
    return Sources(source, held_out, (seq_len,), NUM_BYTES, name, f"{size} random windows", files=files)


def make_random_features(size: int, num_features: int) -> Sources:
    """Make Gaussian features whose class is the largest of ten fixed random projections.

    So there is something to learn, and every machine makes the same.
    """
    rng = np.random.default_rng(0)
    features: Float[np.ndarray, "size features"] = rng.standard_normal((size, num_features)).astype(np.float32)
    return _split_columns(_label_by_projection(features, rng), 1 / 8, f"synthetic features {size} {num_features}")


def make_random_images(size: int, image_size: int) -> Sources:
    """Make square images of three channels of Gaussian noise, labelled as the features of `make_random_features`."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((size, image_size, image_size, 3)).astype(np.float32)
    return _split_columns(_label_by_projection(images, rng), 1 / 8, f"synthetic images {size} {image_size}")


def _label_by_projection(inputs: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return inputs with a label each: the number of the random projection that is the largest."""
    flat = inputs.reshape(len(inputs), -1)
    label = (flat @ rng.standard_normal((flat.shape[1], NUM_CLASSES))).argmax(axis=1).astype(np.int32)
    return {"inputs": inputs, "label": label}


def make_no_examples() -> Sources:
    """Return what stands in the place of data where there is none: one example, which holds its number alone."""
    only = Table({"number": np.zeros(1, np.uint32)})
    return Sources(only, only, (), 0, "none", "data of its own")
