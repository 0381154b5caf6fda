"""Parquet files: the named columns, read into memory.

Through pyarrow, because grain reads each Parquet file from its beginning to its end, and the order of examples is ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data.fingerprint import identify_file
from data.images import EncodedImages
from data.sources import Sources, count_classes, split_source
from data.tables import InputFormat, make_labelled_sources, make_table_sources


def find_parquet_files(path: Path, inputs: str | tuple[str, ...], label: str) -> list[Path]:
    """Return the file, or the files of a folder, in the order of their names.

    Raises ValueError where there are none, or one lacks a wanted column.
    """
    try:
        import pyarrow.parquet as pq
        from pyarrow.lib import ArrowException
    except ImportError:
        raise ValueError('kind=parquet needs a package: pip install -e ".[parquet]"') from None
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"path={path} holds no .parquet file")
    wanted = [*_as_names(inputs), label]
    for file in files:
        try:
            columns = pq.read_schema(file).names
        except (OSError, ArrowException) as error:
            raise ValueError(f"path={file} is no Parquet file ({str(error).splitlines()[0]})") from None
        if missing := [name for name in wanted if name not in columns]:
            key = "label" if missing[0] == label else "inputs"
            raise ValueError(f"{key}={missing[0]} is no column of {file}; it has: {', '.join(columns)}")
    return files


def read_parquet(
    path: Path,
    inputs: str | tuple[str, ...],
    label: str,
    form: InputFormat,
    eval_fraction: float,
    num_classes: int | None,
) -> Sources:
    """Return the examples of every file, in the order of the files' names.

    `inputs` is a column of lists of numbers or of encoded images, or several columns of numbers. Raises ValueError
    where they cannot be read or are not what `form` says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = find_parquet_files(path, inputs, label)
    names = _as_names(inputs)
    try:
        table = pa.concat_tables([pq.read_table(file, columns=[*names, label]) for file in found])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); write it again") from None
    root = path if path.is_dir() else path.parent
    files = {file.relative_to(root).as_posix(): identify_file(file) for file in found}
    labels = _to_array(table.column(label).combine_chunks(), label)
    column = table.column(names[0]).combine_chunks()
    if len(names) == 1 and (encoded := _find_encoded_images(column)) is not None:
        if form.gives != "images":
            raise ValueError(f"column {names[0]} holds encoded images; say data.gives=images")
        number = count_classes(labels, num_classes)
        rows = [f"{path}, row {row}" for row in range(len(encoded))]
        source = EncodedImages(rows, labels.astype(np.int32), encoded.__getitem__, form.size, form.channels)
        # A look at the first one: what is no image at all is told before training begins.
        if len(encoded):
            source.take(np.array([0]))
        sides, shape = split_source(source, eval_fraction), (form.size, form.size, form.channels)
        return make_labelled_sources(sides, shape, number, files, (eval_fraction,), waits=True)
    arrays = [_to_array(table.column(name).combine_chunks(), name) for name in names]
    values = arrays[0] if len(arrays) == 1 and arrays[0].ndim > 1 else np.column_stack(arrays)
    wanted = "images" if values.ndim > 2 else "features"
    if form.gives != wanted:
        raise ValueError(f"an example is {values.shape[1:]}, which is no {form.gives}; say data.gives={wanted}")
    return make_table_sources({"inputs": values, "label": labels}, wanted, eval_fraction, num_classes, files)


def _as_names(inputs: str | tuple[str, ...]) -> list[str]:
    return [inputs] if isinstance(inputs, str) else list(inputs)


def _to_array(column: Any, name: str) -> np.ndarray:
    """Return a column of numbers, or of lists (of lists) of numbers that are all of one length, as an array."""
    import pyarrow as pa

    if column.null_count:
        raise ValueError(f"column {name} has {column.null_count} empty rows; fill or drop them")
    # Each level of lists is taken off and becomes a dimension.
    lengths, kind = [], column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        values = column.flatten()
        if pa.types.is_fixed_size_list(kind):
            sizes = {len(values) // max(len(column), 1)}
        else:
            sizes = set(column.value_lengths().to_pylist())
        if len(sizes) != 1:
            raise ValueError(f"column {name} has lists of {min(sizes)} to {max(sizes)} values; expected one length")
        lengths.append(sizes.pop())
        column, kind = values, values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"column {name} is {kind}; expected numbers, lists of numbers, or encoded images")
    return column.to_numpy(zero_copy_only=False).reshape(-1, *lengths)


def _find_encoded_images(column: Any) -> list[bytes] | None:
    """Return the encoded images of a column, bare or with their path beside them; None where it is another kind."""
    import pyarrow as pa

    # Hugging Face writes an image as {bytes, path}.
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return None
    return column.to_pylist()
