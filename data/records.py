"""ArrayRecord files through grain, which finds any record at once. A record is an .npz with `inputs` and `label`."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.data_errors import UnreadableError
from data.fingerprint import identify_file
from data.label_checks import CheckedLabels
from data.labels import Labels, prepare_labels
from data.sources import IGNORED_LABEL, Source, Sources, split_source
from data.tables import DIMENSIONS, describe_scaling, make_labelled_sources, prepare_inputs

ARRAYS = ("inputs", "label")
# So many records, from all over the files, are looked at before training: reading all of them would take long.
CHECKED_RECORDS = 1000


def find_record_files(path: Path) -> list[Path]:
    """Return a file, or the .array_record files of a folder. Raises ValueError where there are none or one is empty."""
    files = sorted(file for file in path.rglob("*.array_record*") if file.is_file()) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"path={path} holds no .array_record file")
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise ValueError(f"path={empty[0]} is empty; copy it again")
    return files


@dataclass(frozen=True)
class ArrayRecordSource:
    """The records of some files, read where they lie."""

    files: tuple[Path, ...]
    gives: str

    def __post_init__(self) -> None:
        from grain.sources import ArrayRecordDataSource

        object.__setattr__(self, "_records", ArrayRecordDataSource([str(file) for file in self.files]))

    def __len__(self) -> int:
        return len(self._records)  # type: ignore[attr-defined]

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the examples at `indices`. Raises UnreadableError where a record is none, or unlike the others."""
        numbers = [int(index) for index in np.asarray(indices)]
        records = self._records.__getitems__(numbers)  # type: ignore[attr-defined]
        rows = [self._parse_record(number, record) for number, record in zip(numbers, records, strict=True)]
        try:
            inputs, labels = (np.stack([row[name] for row in rows]) for name in ARRAYS)
        except ValueError:
            raise UnreadableError(
                f"{self.files[0].parent}: records have inputs of several shapes; expected one"
            ) from None
        try:
            return {"inputs": prepare_inputs(inputs, self.gives), "label": _prepare_record_labels(labels)}
        except ValueError as error:
            raise UnreadableError(
                f"{self.files[0].parent}: records {min(numbers)} to {max(numbers)}: {error}"
            ) from None

    def read_type(self) -> np.dtype[Any]:
        """Return the type of the inputs of the first record."""
        (record,) = self._records.__getitems__([0])  # type: ignore[attr-defined]
        dtype: np.dtype[Any] = self._parse_record(0, record)["inputs"].dtype
        return dtype

    def _parse_record(self, number: int, record: bytes) -> dict[str, Any]:
        try:
            # Without pickle: an array of objects would run code when it is read.
            with np.load(io.BytesIO(record), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ARRAYS}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise UnreadableError(
                f"{self.files[0].parent}: record {number} is no .npz with inputs and label; write it again"
            ) from None


def _prepare_record_labels(labels: np.ndarray) -> np.ndarray:
    """Return the labels of some records as a model takes them. Raises ValueError where they are no numbers."""
    if labels.ndim == 2 and labels.shape[1] == 1 and labels.dtype.kind != "f":
        labels = labels[:, 0]
    if labels.dtype.kind not in "biuf" or labels.ndim > (2 if labels.dtype.kind == "f" else 1):
        raise ValueError(f"label is {labels.dtype} of shape {labels.shape[1:]}; expected a whole number, or numbers")
    if labels.dtype.kind == "f":
        return labels.astype(np.float32)
    # One that is beyond 32 bits stays beyond all classes.
    if labels.dtype.itemsize >= 4:
        labels = np.minimum(labels, 2**31 - 1)
    if labels.dtype.itemsize > 4 and labels.dtype.kind == "i":
        labels = np.maximum(labels, -(2**31))
    return labels.astype(np.int32)


def read_array_records(
    path: Path, gives: str, eval_fraction: float, num_classes: int | None, ignore_label: int = IGNORED_LABEL
) -> Sources:
    """Return every record of every file; the label `ignore_label` is no class.

    Raises ValueError where a sample of them is not what it should be.
    """
    found = find_record_files(path)
    try:
        source = ArrayRecordSource(tuple(found), gives)
        checked = np.unique(np.linspace(0, len(source) - 1, min(len(source), CHECKED_RECORDS)).astype(np.int64))
        sample = source.take(checked)
    # What grain's reader raises where a file is none of its own.
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{path} is no ArrayRecord file ({str(error).splitlines()[0]}); write it again") from None
    shape = sample["inputs"].shape[1:]
    if len(shape) + 1 not in DIMENSIONS[gives]:
        raise ValueError(f"an example is {shape}, which is no {gives}; set data.gives")
    labels = _check_sample(sample["label"], num_classes, ignore_label)
    root = path if path.is_dir() else path.parent
    files = {file.relative_to(root).as_posix(): identify_file(file) for file in found}
    # The records that were not looked at are looked at when they are taken.
    looked_at: Source = source
    if num_classes is not None:
        looked_at = CheckedLabels(
            source, num_classes, labels.ignore_label if labels.may_ignore else None, f"{root}: record"
        )
    sides = split_source(looked_at, eval_fraction)
    selected = (eval_fraction, *describe_scaling(source.read_type(), gives))
    return make_labelled_sources(sides, shape, labels, files, selected, waits=True)


def _check_sample(label: np.ndarray, num_classes: int | None, ignore_label: int) -> Labels:
    """Return what the labels of some records say. Raises ValueError where they are outside, or not enough to know."""
    if label.dtype.kind != "f" and num_classes is None:
        raise ValueError("records are not counted through: say how many classes there are, data.num_classes=N")
    labels = prepare_labels([label], num_classes, None, ignore_label)
    # A label that was chosen may be in the records that were not looked at.
    return labels if ignore_label == IGNORED_LABEL else replace(labels, may_ignore=True)
