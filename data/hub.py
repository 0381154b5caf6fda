"""Hugging Face datasets: from the hub, or from a folder that `save_to_disk` left. Needs the extra `hub`."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.fingerprint import hash_files, identify_bytes, identify_file
from data.images import EncodedImages
from data.sources import Source, Sources, count_classes, split_source
from data.tables import DIMENSIONS, InputFormat, make_labelled_sources, prepare_inputs
from data.text_files import make_byte_sources


@dataclass(frozen=True)
class HubDataset:
    """Which dataset is read, and which splits of it: one to train on, and perhaps one to evaluate on.

    `path` is a name on the hub or a folder; `subset` and `revision` are of a dataset on the hub.
    """

    path: str
    subset: str | None
    revision: str | None
    split: str
    eval_split: str | None

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits that are read, the one to train on first."""
        return [self.split, *([self.eval_split] if self.eval_split else [])]

    def load_splits(self, columns: list[str]) -> list[Any]:
        """Return the `datasets.Dataset` of each split.

        Raises ValueError where one cannot be had, or lacks one of the columns (`inputs` first, then perhaps `label`).
        """
        loaded = [self._load(split) for split in self.splits]
        for dataset, split in zip(loaded, self.splits, strict=True):
            if missing := [name for name in columns if name not in dataset.column_names]:
                key = "inputs" if missing[0] == columns[0] else "label"
                raise ValueError(
                    f"data.{key}={missing[0]} is no column of {split}; it has: {', '.join(dataset.column_names)}"
                )
        return loaded

    def _load(self, split: str) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError('needs a package: pip install -e ".[hub]"') from None
        # It tells of each try, twice; the error says enough.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        path = Path(self.path).expanduser()
        try:
            if not path.is_dir():
                return datasets.load_dataset(self.path, self.subset, split=split, revision=self.revision)
            whole = datasets.load_from_disk(str(path))
        # What fails here is the network, the name, or the split: the package says which.
        except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{self.path} cannot be loaded: {str(error).splitlines()[0]}") from None
        if isinstance(whole, datasets.Dataset):
            return whole
        if split not in whole:
            raise ValueError(f"{self.path} has no split {split}; it has: {', '.join(whole)}")
        return whole[split]

    def identify(self, loaded: list[Any]) -> dict[str, str]:
        """Return "SIZE HASH" of each loaded split by a name for a person."""
        return {
            f"{self.path}, {split}": _identify_split(dataset)
            for dataset, split in zip(loaded, self.splits, strict=True)
        }


def read_hub_examples(
    chosen: HubDataset, inputs: str, label: str, form: InputFormat, eval_fraction: float, num_classes: int | None
) -> Sources:
    """Return the labelled examples of one split, and of another one, or a part of it, to evaluate on.

    `inputs` and `label` are columns. Raises ValueError where they cannot be had, or are not what `form` says.
    """
    loaded = chosen.load_splits([inputs, label])
    files = chosen.identify(loaded)
    both = []
    for dataset, split in zip(loaded, chosen.splits, strict=True):
        labels = np.asarray(dataset.with_format("numpy")[:][label] if len(dataset) else np.zeros(0, np.int64))
        both.append((_make_source(dataset, f"{chosen.path}, {split}", inputs, labels, form), labels))
    number = count_classes(np.concatenate([labels for _, labels in both]), num_classes)
    first = both[0][0]
    sides = (first, both[1][0]) if len(both) == 2 else split_source(first, eval_fraction)
    shape = first.take(np.array([0]))["inputs"].shape[1:]
    if len(shape) + 1 not in DIMENSIONS[form.gives]:
        raise ValueError(f"an example is {shape}, which is no {form.gives}; set data.gives")
    return make_labelled_sources(sides, shape, number, files, (chosen.splits, eval_fraction), waits=True)


def read_hub_text(chosen: HubDataset, column: str, seq_len: int, eval_fraction: float) -> Sources:
    """Return a column of text as one long run of bytes, a line between rows.

    The split for evaluation is held out, or the end of the text where there is none. Raises ValueError where they
    cannot be had.
    """
    loaded = chosen.load_splits([column])
    files = chosen.identify(loaded)
    runs = []
    for dataset in loaded:
        out = io.BytesIO()
        for text in dataset[column]:
            out.write(str(text).encode())
            out.write(b"\n")
        runs.append(np.frombuffer(out.getvalue(), np.uint8))
    if len(runs) == 1:
        cut = int(len(runs[0]) * (1.0 - eval_fraction))
        runs = [runs[0][:cut], runs[0][cut:]]
    return make_byte_sources([runs[0]], [runs[1]], seq_len, hash_files(files, column, eval_fraction), files)


def _identify_split(dataset: Any) -> str:
    """Return "SIZE HASH" of the files that a split is mapped from, and of its number of rows."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # One that is in memory alone has no file; the package's own fingerprint is what it has.
    contents = [identify_file(file) for file in files] or [str(dataset._fingerprint)]  # noqa: SLF001
    size = sum(int(content.split()[0]) for content in contents) if files else 0
    return f"{size} {identify_bytes(' '.join([*contents, str(len(dataset))]).encode()).split()[1]}"


@dataclass(frozen=True)
class NumberRows:
    """Lists of numbers with a label, read where the dataset is mapped."""

    dataset: Any
    inputs: str
    label: np.ndarray
    gives: str

    def __len__(self) -> int:
        return len(self.label)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows at `indices`."""
        rows = np.asarray(indices)
        values = self.dataset[rows][self.inputs]
        return {"inputs": prepare_inputs(np.asarray(values), self.gives), "label": self.label[rows]}


def _make_source(dataset: Any, name: str, inputs: str, labels: np.ndarray, form: InputFormat) -> Source:
    """Return the rows of a split as a source of images or of numbers."""
    import datasets

    # Labels of another type are refused by `count_classes`, which has to see them as they are.
    kept = labels.astype(np.int32) if labels.dtype.kind in "ui" else labels
    if isinstance(dataset.features[inputs], datasets.Image):
        rows = [f"{name}, row {row}" for row in range(len(dataset))]
        undecoded = dataset.cast_column(inputs, datasets.Image(decode=False))
        return EncodedImages(rows, kept, _read_encoded_from(undecoded, inputs), form.size, form.channels)
    return NumberRows(dataset.with_format("numpy", columns=[inputs]), inputs, kept, form.gives)


def _read_encoded_from(dataset: Any, column: str) -> Callable[[int], bytes]:
    def read(row: int) -> bytes:
        value = dataset[row][column]
        # An image is in the dataset itself, or in a file that it names.
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    return read
