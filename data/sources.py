"""Where examples come from. A source is random access over examples; its order is the pipeline's business."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

NUM_BYTES = 256
NUM_CLASSES = 10


@runtime_checkable
class Source(Protocol):
    """Random access over examples, many at a time."""

    def __len__(self) -> int: ...

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        """The examples at `indices`, stacked: every value has a leading batch dimension."""
        ...


@dataclass(frozen=True)
class Sources:
    """What a data option reads: two sources, their shape, and the proof that they are the same data as last time."""

    train: Source
    eval: Source
    inputs: tuple[int, ...]  # the shape of one example: (features,), (height, width, channels) or (tokens,)
    num_outputs: int  # classes, or the vocabulary
    fingerprint: str  # hash of everything the examples are made of
    summary: str  # for a person: "12.1 MB of text in 734 files"
    decode: Callable[[np.ndarray], str] | None = None  # tokens Int[seq] as text; None where they are none
    waits: bool = False  # whether taking examples may take long: then they are fetched ahead, by a thread


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows of `seq_len` tokens and the one after them, over one long run of bytes."""

    corpus: UInt8[np.ndarray, "bytes"]
    seq_len: int

    def __len__(self) -> int:
        return max(len(self.corpus) - 1, 0) // self.seq_len

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        positions = np.asarray(indices)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        return {"tokens": self.corpus[positions]}


@dataclass(frozen=True)
class Table:
    """Arrays that share their leading dimension."""

    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        rows = np.asarray(indices)
        return {name: column[rows] for name, column in self.columns.items()}


def stdlib(seq_len: int, eval_fraction: float) -> Sources:
    """Every module of the standard library of this Python, tests and installed packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return _split_by_file(root, sorted(_modules(root, skip)), seq_len, eval_fraction)


def _modules(root: Path, skip: set[str]) -> Iterator[Path]:
    """Every module below a folder; what is skipped is not entered: installed packages are most of it."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def text(path: Path, pattern: str, seq_len: int, eval_fraction: float) -> Sources:
    """A file, or the files of a folder that match `pattern`, in the order of their names."""
    files = sorted(file for file in path.glob(pattern) if file.is_file()) if path.is_dir() else [path]
    return _split_by_file(path if path.is_dir() else path.parent, files, seq_len, eval_fraction)


def _split_by_file(root: Path, files: list[Path], seq_len: int, eval_fraction: float) -> Sources:
    """Train and evaluate on different files. A file's side depends on its name alone, so new files move no old ones.

    Where the files are too few to fill both sides, the end of the whole text is for evaluation.
    """
    whole = hashlib.sha256()
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for file in files:
        name, content = file.relative_to(root).as_posix().encode(), file.read_bytes()
        whole.update(b"%d %s %d " % (len(name), name, len(content)))
        whole.update(content)
        draw = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
        sides[draw < eval_fraction].append(np.frombuffer(content, np.uint8))
    if not all(sides):
        joined = np.concatenate([*sides[0], *sides[1]])
        cut = int(len(joined) * (1.0 - eval_fraction))
        sides = ([joined[:cut]], [joined[cut:]])
    number = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    return _windows(*sides, seq_len, whole.hexdigest(), number)


def as_text(tokens: Int[np.ndarray, "seq"]) -> str:
    """Bytes as UTF-8."""
    return np.asarray(tokens, np.uint8).tobytes().decode(errors="replace")


def _windows(
    train: Iterable[np.ndarray], held_out: Iterable[np.ndarray], seq_len: int, fingerprint: str, files: str
) -> Sources:
    empty = np.zeros(0, np.uint8)
    mine, theirs = (Windows(np.concatenate([empty, *side]), seq_len) for side in (train, held_out))
    sizes = f"{len(mine.corpus) / 1e6:.1f} + {len(theirs.corpus) / 1e6:.1f}"
    summary = f"{sizes} MB of text (train + eval) in {files}"
    return Sources(mine, theirs, (seq_len,), NUM_BYTES, fingerprint, summary, as_text)


def digits(eval_fraction: float) -> Sources:
    """The UCI handwritten digits as scikit-learn ships them, pixels scaled to [0, 1]; the split is fixed."""
    table = _digits()
    pixels, labels = table[:, :-1], table[:, -1]
    return _split_table(
        {"inputs": (pixels / 16.0).astype(np.float32).reshape(-1, 8, 8, 1), "label": labels.astype(np.int32)},
        eval_fraction,
    )


def _digits() -> Float[np.ndarray, "1797 65"]:
    """Pixels and label of each image, from the file in scikit-learn: importing it takes half as long as a restart."""
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin or "").parent / "datasets/data/digits.csv.gz" if package else Path()
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])


def _split_table(columns: dict[str, np.ndarray], eval_fraction: float) -> Sources:
    whole = Table(columns)
    order = np.random.default_rng(0).permutation(len(whole))
    cut = int(len(whole) * (1.0 - eval_fraction))
    digest = hashlib.sha256(b"".join(column.tobytes() for column in columns.values())).hexdigest()
    summary = f"{cut} + {len(whole) - cut} examples (train + eval)"
    return Sources(
        Table(whole.take(order[:cut])),
        Table(whole.take(order[cut:])),
        columns["inputs"].shape[1:],
        NUM_CLASSES,
        digest,
        summary,
    )


@dataclass(frozen=True)
class Slow:
    """A source that takes its time: what slow storage does to training."""

    source: Source
    seconds: float

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: Int[np.ndarray, "batch"]) -> dict[str, np.ndarray]:
        time.sleep(self.seconds)
        return self.source.take(indices)


def slowed(sources: Sources, seconds: float) -> Sources:
    """The same data, each batch of training after a delay."""
    return replace(sources, train=Slow(sources.train, seconds), waits=True) if seconds else sources


def synthetic_tokens(size: int, seq_len: int) -> Sources:
    """Uniformly random bytes, the same on every machine."""
    content: UInt8[np.ndarray, "bytes"] = np.random.default_rng(0).integers(0, NUM_BYTES, size * seq_len + 1, np.uint8)
    source = Windows(content, seq_len)
    held_out = Windows(content[: max(size // 8, 1) * seq_len + 1], seq_len)
    return Sources(
        source, held_out, (seq_len,), NUM_BYTES, f"synthetic tokens {size} {seq_len}", f"{size} random windows"
    )


def synthetic_features(size: int, num_features: int) -> Sources:
    """Gaussian features whose class is the largest of ten fixed random projections: learnable, and made anywhere."""
    rng = np.random.default_rng(0)
    features: Float[np.ndarray, "size features"] = rng.standard_normal((size, num_features)).astype(np.float32)
    label = (features @ rng.standard_normal((num_features, NUM_CLASSES))).argmax(axis=1).astype(np.int32)
    return _split_table({"inputs": features, "label": label}, eval_fraction=1 / 8)
