"""Arrays in an .npz, and what any table of inputs and labels becomes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.fingerprint import hash_files, identify_file
from data.sources import Source, Sources, Table, count_classes, split_source

DIMENSIONS = {"images": (3, 4), "features": (2,)}  # with the examples; images without channels get one


def read_npz_shapes(path: Path, gives: str) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of the arrays that data=arrays reads, from their headers. Raises ValueError where one is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            wanted = ["inputs", "label", *(["eval_inputs", "eval_label"] if "eval_inputs" in names else [])]
            if missing := [name for name in wanted if name not in names]:
                raise ValueError(f"path={path} has no array {missing[0]}; it has: {', '.join(sorted(names)) or 'none'}")
            found = {name: _header(archive.open(f"{name}.npy")) for name in wanted}
    except (OSError, zipfile.BadZipFile):
        raise ValueError(f"path={path} is no .npz; write it with numpy.savez(path, inputs=…, label=…)") from None
    for side in ("", "eval_"):
        if f"{side}inputs" in found:
            _check(f"path={path}: {side}", found[f"{side}inputs"], found[f"{side}label"], gives)
    return found


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _check(where: str, inputs: tuple[Any, Any], label: tuple[Any, Any], gives: str) -> None:
    """Raises ValueError where inputs and labels do not go together."""
    (shape, dtype), (labels, label_dtype) = inputs, label
    if len(shape) not in DIMENSIONS[gives]:
        other = next((kind for kind, sizes in DIMENSIONS.items() if len(shape) in sizes), None)
        way = f"say data.gives={other}" if other else f"expected {' or '.join(map(str, DIMENSIONS[gives]))} dimensions"
        raise ValueError(f"{where}inputs has shape {shape}, which is no {gives}; {way}")
    if dtype.kind not in "uif":
        raise ValueError(f"{where}inputs is {dtype}; expected numbers")
    if labels != shape[:1] or label_dtype.kind not in "ui":
        raise ValueError(
            f"{where}label is {label_dtype} of shape {labels}; expected whole numbers of shape {shape[:1]}"
        )


def read_npz(path: Path, gives: str, eval_fraction: float, num_classes: int | None) -> Sources:
    """The arrays of an .npz. Raises ValueError where they do not fit or are torn."""
    read_npz_shapes(path, gives)
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); write it again") from None
    whole = {"inputs": columns["inputs"], "label": columns["label"]}
    held_out = {name: columns[f"eval_{name}"] for name in whole} if "eval_inputs" in columns else None
    return make_table_sources(whole, held_out, gives, eval_fraction, num_classes, {path.name: identify_file(path)})


def make_table_sources(
    columns: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray] | None,
    gives: str,
    eval_fraction: float,
    num_classes: int | None,
    files: Mapping[str, str],
) -> Sources:
    """Inputs and labels, with an evaluation part of their own or a fixed random one."""
    sides = [
        Table({"inputs": prepare_inputs(side["inputs"], gives), "label": side["label"]})
        for side in (columns, held_out or {})
        if side
    ]
    labels = np.concatenate([side.columns["label"] for side in sides])
    number = count_classes(labels, num_classes)
    if held_out and sides[0].columns["inputs"].shape[1:] != sides[1].columns["inputs"].shape[1:]:
        shapes = [str(side.columns["inputs"].shape[1:]) for side in sides]
        raise ValueError(f"an example is {shapes[0]} in training and {shapes[1]} in evaluation; expected one shape")
    for side in sides:
        side.columns["label"] = side.columns["label"].astype(np.int32)
    both: tuple[Source, Source] = (sides[0], sides[1]) if held_out else split_source(sides[0], eval_fraction)
    shape = sides[0].columns["inputs"].shape[1:]
    return make_labelled_sources(*both, shape, number, files, eval_fraction if not held_out else None)


def make_labelled_sources(
    train: Source,
    held_out: Source,
    shape: tuple[int, ...],
    num_classes: int,
    files: Mapping[str, str],
    *selected: object,
    waits: bool = False,
) -> Sources:
    """Two sources of labelled examples; `selected`: what else decides which examples they have."""
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
    """Inputs as a model takes them: float32; bytes of an image scaled to [0, 1]; images with their channels."""
    if gives == "images" and inputs.ndim == 3:
        inputs = inputs[..., None]
    if inputs.dtype == np.uint8 and gives == "images":
        return inputs.astype(np.float32) / np.float32(255.0)
    return inputs.astype(np.float32)
