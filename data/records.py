"""ArrayRecord files through grain, which finds any record at once. A record is an .npz with `inputs` and `label`."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.data_errors import UnreadableError
from data.fingerprint import identify_file
from data.sources import Sources, count_classes, split_source
from data.tables import DIMENSIONS, make_labelled_sources, prepare_inputs

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
        return {"inputs": prepare_inputs(inputs, self.gives), "label": labels.astype(np.int32)}

    def _parse_record(self, number: int, record: bytes) -> dict[str, Any]:
        try:
            # Without pickle: an array of objects would run code when it is read.
            with np.load(io.BytesIO(record), allow_pickle=False) as arrays:
                return {name: arrays[name] for name in ARRAYS}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            raise UnreadableError(
                f"{self.files[0].parent}: record {number} is no .npz with inputs and label; write it again"
            ) from None


def read_array_records(path: Path, gives: str, eval_fraction: float, num_classes: int | None) -> Sources:
    """Return every record of every file. Raises ValueError where a sample of them is not what it should be."""
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
    if num_classes is None:
        raise ValueError("records are not counted through: say how many classes there are, data.num_classes=N")
    number = count_classes(sample["label"], num_classes)
    root = path if path.is_dir() else path.parent
    files = {file.relative_to(root).as_posix(): identify_file(file) for file in found}
    sides = split_source(source, eval_fraction)
    return make_labelled_sources(sides, shape, number, files, (eval_fraction,), waits=True)
