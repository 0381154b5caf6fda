"""Hugging Face datasets: from the hub, or from a folder that `save_to_disk` left. Needs the extra `hub`."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.fingerprint import hash_files, identify_bytes, identify_file
from data.images import EncodedImages
from data.sources import Source, Sources, count_classes, split_source
from data.tables import DIMENSIONS, make_labelled_sources, prepare_inputs
from data.text_files import make_byte_sources

if TYPE_CHECKING:
    from data.user_formats import Hub


def read_hub(option: Hub) -> Sources:
    """The examples of one split, and of another one to evaluate on. Raises ValueError where they cannot be had."""
    splits = [option.split, *([option.eval_split] if option.eval_split else [])]
    loaded = [_loaded(option, split) for split in splits]
    wanted = [option.inputs] if option.gives == "tokens" else [option.inputs, option.label]
    for dataset, split in zip(loaded, splits, strict=True):
        if missing := [name for name in wanted if name not in dataset.column_names]:
            key = "inputs" if missing[0] == option.inputs else "label"
            raise ValueError(
                f"data.{key}={missing[0]} is no column of {split}; it has: {', '.join(dataset.column_names)}"
            )
    files = {f"{option.path}, {split}": _identity(dataset) for dataset, split in zip(loaded, splits, strict=True)}
    if option.gives == "tokens":
        return _text(option, loaded, files)
    both = [_labelled(option, dataset, split) for dataset, split in zip(loaded, splits, strict=True)]
    number = count_classes(np.concatenate([labels for _, labels in both]), option.num_classes)
    first: Source = both[0][0]
    sides = (first, both[1][0]) if len(both) == 2 else split_source(first, option.eval_fraction)
    shape = first.take(np.array([0]))["inputs"].shape[1:]
    if len(shape) + 1 not in DIMENSIONS[option.gives]:
        raise ValueError(f"an example is {shape}, which is no {option.gives}; set data.gives")
    return make_labelled_sources(*sides, shape, number, files, splits, option.eval_fraction, waits=True)


def _loaded(option: Hub, split: str) -> Any:
    """One split. What fails here is the network, the name, or the split: the package says which."""
    try:
        import datasets
    except ImportError:
        raise ValueError('needs a package: pip install -e ".[hub]"') from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each try, twice; the error says enough
    path = Path(option.path).expanduser()
    try:
        if not path.is_dir():
            return datasets.load_dataset(option.path, option.subset, split=split, revision=option.revision)
        whole = datasets.load_from_disk(str(path))
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{option.path} cannot be loaded: {str(error).splitlines()[0]}") from None
    if isinstance(whole, datasets.Dataset):
        return whole
    if split not in whole:
        raise ValueError(f"{option.path} has no split {split}; it has: {', '.join(whole)}")
    return whole[split]


def _identity(dataset: Any) -> str:
    """Size and content of the files that a split is mapped from."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    contents = [identify_file(file) for file in files] or [str(dataset._fingerprint)]  # noqa: SLF001 (of data that is in memory alone)
    size = sum(int(content.split()[0]) for content in contents) if files else 0
    return f"{size} {identify_bytes(' '.join([*contents, str(len(dataset))]).encode()).split()[1]}"


@dataclass(frozen=True)
class Rows:
    """Lists of numbers with a label, read where the dataset is mapped."""

    dataset: Any
    inputs: str
    label: np.ndarray
    gives: str

    def __len__(self) -> int:
        return len(self.label)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(indices)
        values = self.dataset[rows][self.inputs]
        return {"inputs": prepare_inputs(np.asarray(values), self.gives), "label": self.label[rows]}


def _labelled(option: Hub, dataset: Any, split: str) -> tuple[Source, np.ndarray]:
    import datasets

    labels = np.asarray(dataset.with_format("numpy")[:][option.label] if len(dataset) else np.zeros(0, np.int64))
    feature = dataset.features[option.inputs]
    kept = labels.astype(np.int32) if labels.dtype.kind in "ui" else labels
    if isinstance(feature, datasets.Image):
        names = [f"{option.path}, {split}, row {row}" for row in range(len(dataset))]
        undecoded = dataset.cast_column(option.inputs, datasets.Image(decode=False))
        return EncodedImages(names, kept, _bytes_of(undecoded, option.inputs), option.size, option.channels), labels
    return Rows(dataset.with_format("numpy", columns=[option.inputs]), option.inputs, kept, option.gives), labels


def _bytes_of(dataset: Any, column: str) -> Callable[[int], bytes]:
    def encoded(row: int) -> bytes:
        value = dataset[row][column]
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    return encoded


def _text(option: Hub, loaded: list[Any], files: dict[str, str]) -> Sources:
    """A column of text as one long run of bytes, a line between rows; the end is held out, or the other split."""
    runs = []
    for dataset in loaded:
        out = io.BytesIO()
        for text in dataset[option.inputs]:
            out.write(str(text).encode())
            out.write(b"\n")
        runs.append(np.frombuffer(out.getvalue(), np.uint8))
    if len(runs) == 1:
        cut = int(len(runs[0]) * (1.0 - option.eval_fraction))
        runs = [runs[0][:cut], runs[0][cut:]]
    return make_byte_sources(
        [runs[0]], [runs[1]], option.seq_len, hash_files(files, option.inputs, option.eval_fraction), files
    )
