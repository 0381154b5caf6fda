"""Arrays in an .npz: by their names, and looked at before they are read."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data.array_names import ChosenArrays, choose_arrays
from data.fingerprint import identify_file
from data.option_fields import ArrayNames
from data.sources import Sources
from data.splits import Split
from data.tables import DIMENSIONS, Columns, TableFormat, TableParts, make_table_sources

# Whatever numpy raises of a file that is torn, encrypted, or packed in a way it does not know.
NPZ_ERRORS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

Header = tuple[tuple[int, ...], np.dtype[Any]]


def read_npz_shapes(path: Path, gives: str, given: ArrayNames | None = None) -> dict[str, Header]:
    """Return shape and type of the wanted arrays of an .npz, from their headers.

    Raises ValueError where one is wrong.
    """
    chosen = _choose_npz_arrays(path, given)
    found = {}
    # Only headers are read: this is done before jax starts, on files of any size.
    with zipfile.ZipFile(path) as archive:
        for name in chosen.names:
            try:
                found[name] = _read_array_header(archive.open(f"{name}.npy"))
            except NPZ_ERRORS as error:
                raise ValueError(
                    f"path={path}: {name} cannot be read ({str(error).splitlines()[0]}); write it again"
                ) from None
    for inputs, label in chosen.parts.values():
        _check_inputs(f"path={path}: {inputs}", found[inputs], gives)
        _check_label(f"path={path}: {label}", found[label], found[inputs][0][:1])
    return found


def _choose_npz_arrays(path: Path, given: ArrayNames | None) -> ChosenArrays:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (OSError, zipfile.BadZipFile):
        raise ValueError(f"path={path} is no .npz; write it with numpy.savez(path, inputs=…, label=…)") from None
    try:
        return choose_arrays(names, given)
    except ValueError as error:
        raise ValueError(f"path={path} {error}") from None


def _read_array_header(file: Any) -> Header:
    with file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype


def _check_inputs(where: str, inputs: Header, gives: str) -> None:
    """Raise ValueError where inputs are not what `gives` says."""
    shape, dtype = inputs
    if len(shape) not in DIMENSIONS[gives]:
        other = next((kind for kind, sizes in DIMENSIONS.items() if len(shape) in sizes), None)
        way = f"say data.gives={other}" if other else f"expected {' or '.join(map(str, DIMENSIONS[gives]))} dimensions"
        raise ValueError(f"{where} has shape {shape}, which is no {gives}; {way}")
    if dtype.kind == "c":
        raise ValueError(f"{where} is {dtype}; write its real and its imaginary part as numbers beside each other")
    if dtype.kind not in "buif":
        raise ValueError(f"{where} is {dtype}; expected numbers")
    if gives == "ids" and dtype.kind not in "ui":
        raise ValueError(f"{where} is {dtype}, but ids are whole numbers; write them so (astype(int))")


def _check_label(where: str, label: Header, examples: tuple[int, ...]) -> None:
    """Raise ValueError where labels cannot be labels, or do not go together with the inputs."""
    shape, dtype = label
    if dtype.kind == "O":
        raise ValueError(f"{where} is an array of objects; write it as numbers or as text, such as astype(str)")
    if shape[:1] != examples or len(shape) > 2 or dtype.kind not in "buifUST":
        raise ValueError(
            f"{where} is {dtype} of shape {shape}; expected whole numbers of shape {examples}, names, or numbers"
        )


def read_npz(path: Path, form: TableFormat, eval_fraction: float, given: ArrayNames | None = None) -> Sources:
    """Return the arrays of an .npz. Raises ValueError where they do not go together or the file is torn."""
    read_npz_shapes(path, form.gives, given)
    chosen = _choose_npz_arrays(path, given)
    try:
        # Without pickle: an array of objects would run code when it is read. One that is not wanted is left alone.
        with np.load(path, allow_pickle=False) as archive:
            columns: dict[Split, Columns] = {
                split: {"inputs": archive[inputs], "label": archive[label]}
                for split, (inputs, label) in chosen.parts.items()
            }
    except NPZ_ERRORS as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); write it again") from None
    files = {path.name: identify_file(path)}
    selected = tuple(chosen.names) if given is not None else ()
    return make_table_sources(TableParts(columns, files, selected, chosen.said), form, eval_fraction)
