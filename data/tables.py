"""Arrays in an .npz, and what any table of inputs and labels becomes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.fingerprint import hash_files, identify_file
from data.sources import Source, Sources, Table, count_classes, split_source

# The dimensions that inputs may have, examples included; images without channels get one.
DIMENSIONS = {"images": (3, 4), "features": (2,)}

Header = tuple[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True)
class InputFormat:
    """As what a column of inputs is read: `gives`, and the size in pixels and the channels of an encoded image."""

    gives: Literal["images", "features"]
    size: int
    channels: int


def read_npz_shapes(path: Path, gives: str) -> dict[str, Header]:
    """Return shape and type of the arrays of an .npz, from their headers. Raises ValueError where one is wrong."""
    try:
        # Only headers are read: this is done before jax starts, on files of any size.
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            wanted = ["inputs", "label"]
            if "eval_inputs" in names:
                wanted += ["eval_inputs", "eval_label"]
            if missing := [name for name in wanted if name not in names]:
                raise ValueError(f"path={path} has no array {missing[0]}; it has: {', '.join(sorted(names)) or 'none'}")
            found = {name: _read_array_header(archive.open(f"{name}.npy")) for name in wanted}
    except (OSError, zipfile.BadZipFile):
        raise ValueError(f"path={path} is no .npz; write it with numpy.savez(path, inputs=…, label=…)") from None
    for side in ("", "eval_"):
        if f"{side}inputs" in found:
            _check_side(f"path={path}: {side}", found[f"{side}inputs"], found[f"{side}label"], gives)
    return found


def _read_array_header(file: Any) -> Header:
    with file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _check_side(where: str, inputs: Header, label: Header, gives: str) -> None:
    """Raise ValueError where inputs are not what `gives` says, or do not go together with the labels."""
    (shape, dtype), (label_shape, label_dtype) = inputs, label
    if len(shape) not in DIMENSIONS[gives]:
        other = next((kind for kind, sizes in DIMENSIONS.items() if len(shape) in sizes), None)
        way = f"say data.gives={other}" if other else f"expected {' or '.join(map(str, DIMENSIONS[gives]))} dimensions"
        raise ValueError(f"{where}inputs has shape {shape}, which is no {gives}; {way}")
    if dtype.kind not in "uif":
        raise ValueError(f"{where}inputs is {dtype}; expected numbers")
    if label_shape != shape[:1] or label_dtype.kind not in "ui":
        raise ValueError(
            f"{where}label is {label_dtype} of shape {label_shape}; expected whole numbers of shape {shape[:1]}"
        )


def read_npz(path: Path, gives: str, eval_fraction: float, num_classes: int | None) -> Sources:
    """Return the arrays of an .npz. Raises ValueError where they do not go together or the file is torn."""
    read_npz_shapes(path, gives)
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); write it again") from None
    train = {"inputs": columns["inputs"], "label": columns["label"]}
    held_out = {name: columns[f"eval_{name}"] for name in train} if "eval_inputs" in columns else None
    files = {path.name: identify_file(path)}
    if held_out is None:
        return make_table_sources(train, gives, eval_fraction, num_classes, files)
    return _make_two_table_sources(train, held_out, gives, num_classes, files)


def make_table_sources(
    columns: Mapping[str, np.ndarray],
    gives: str,
    eval_fraction: float,
    num_classes: int | None,
    files: Mapping[str, str],
) -> Sources:
    """Return the sources of a table of `inputs` and `label`, of which a fixed random part is to evaluate on."""
    number = count_classes(columns["label"], num_classes)
    table = _prepare_table(columns, gives)
    shape = table.columns["inputs"].shape[1:]
    return make_labelled_sources(split_source(table, eval_fraction), shape, number, files, (eval_fraction,))


def _make_two_table_sources(
    train: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    gives: str,
    num_classes: int | None,
    files: Mapping[str, str],
) -> Sources:
    """Return the sources of two tables, one of which is to evaluate on. Raises ValueError where they are not alike."""
    number = count_classes(np.concatenate([train["label"], held_out["label"]]), num_classes)
    sides = [_prepare_table(train, gives), _prepare_table(held_out, gives)]
    shape, eval_shape = (side.columns["inputs"].shape[1:] for side in sides)
    if shape != eval_shape:
        raise ValueError(f"an example is {shape} in training and {eval_shape} in evaluation; expected one shape")
    return make_labelled_sources((sides[0], sides[1]), shape, number, files, (None,))


def _prepare_table(columns: Mapping[str, np.ndarray], gives: str) -> Table:
    return Table({"inputs": prepare_inputs(columns["inputs"], gives), "label": columns["label"].astype(np.int32)})


def make_labelled_sources(
    sides: tuple[Source, Source],
    shape: tuple[int, ...],
    num_classes: int,
    files: Mapping[str, str],
    selected: tuple[object, ...],
    *,
    waits: bool = False,
) -> Sources:
    """Return two sources of labelled examples of one shape, to train and to evaluate on, as Sources.

    `selected` is whatever else than the content of the files decides which examples there are.
    """
    train, held_out = sides
    return Sources(
        train,
        held_out,
        shape,
        num_classes,
        hash_files(files, *selected),
        f"{len(train):,} + {len(held_out):,} examples (train + eval) of "
        f"{' × '.join(map(str, shape))}{' features' if len(shape) == 1 else ''}, {num_classes} classes",
        waits=waits,
        files=files,
    )


def prepare_inputs(inputs: np.ndarray, gives: str) -> np.ndarray:
    """Return inputs as a model takes them: float32; bytes of an image scaled to [0, 1]; images with their channels."""
    if gives == "images" and inputs.ndim == 3:
        inputs = inputs[..., None]
    # In float32, as encoded images are: the same pixels give the same numbers, whatever they were read from.
    if inputs.dtype == np.uint8 and gives == "images":
        return inputs.astype(np.float32) / np.float32(255.0)
    return inputs.astype(np.float32)
