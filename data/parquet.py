"""Parquet: the named columns, read into memory. Through pyarrow, because what grain reads of Parquet has no order of
ours: it goes from the beginning to the end of each file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.fingerprint import identify_file
from data.images import EncodedImages
from data.sources import Sources, count_classes, split_source
from data.tables import make_labelled_sources, make_table_sources

if TYPE_CHECKING:
    from data.user_formats import Parquet


def find_parquet_files(path: Path, inputs: str | tuple[str, ...], label: str) -> list[Path]:
    """The files, all with the wanted columns. Raises ValueError where there are none, or one lacks a column."""
    try:
        import pyarrow.parquet as pq
        from pyarrow.lib import ArrowException
    except ImportError:
        raise ValueError('kind=parquet needs a package: pip install -e ".[parquet]"') from None
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"path={path} holds no .parquet file")
    wanted = [*([inputs] if isinstance(inputs, str) else inputs), label]
    for file in files:
        try:
            there = pq.read_schema(file).names
        except (OSError, ArrowException) as error:
            raise ValueError(f"path={file} is no Parquet file ({str(error).splitlines()[0]})") from None
        if missing := [name for name in wanted if name not in there]:
            key = "label" if missing[0] == label else "inputs"
            raise ValueError(f"{key}={missing[0]} is no column of {file}; it has: {', '.join(there)}")
    return files


def read_parquet(option: Parquet) -> Sources:
    """The examples of every file, in the order of the files' names."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(option.path).expanduser()
    files = find_parquet_files(path, option.inputs, option.label)
    names = [option.inputs] if isinstance(option.inputs, str) else list(option.inputs)
    try:
        table = pa.concat_tables([pq.read_table(file, columns=[*names, option.label]) for file in files])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); write it again") from None
    named = {file.relative_to(path if path.is_dir() else path.parent).as_posix(): identify_file(file) for file in files}
    labels = _plain(table.column(option.label).combine_chunks(), option.label)
    column = table.column(names[0]).combine_chunks()
    if len(names) == 1 and (encoded := _encoded(column)) is not None:
        return _pictures(option, encoded, labels, named)
    arrays = [_plain(table.column(name).combine_chunks(), name) for name in names]
    inputs = arrays[0] if len(arrays) == 1 and arrays[0].ndim > 1 else np.column_stack(arrays)
    wanted = "images" if inputs.ndim > 2 else "features"
    if option.gives != wanted:
        raise ValueError(f"an example is {inputs.shape[1:]}, which is no {option.gives}; say data.gives={wanted}")
    return make_table_sources(
        {"inputs": inputs, "label": labels}, None, wanted, option.eval_fraction, option.num_classes, named
    )


def _plain(column: Any, name: str) -> np.ndarray:
    """A column of numbers, or of lists (of lists) of numbers that are all of one length."""
    import pyarrow as pa

    if column.null_count:
        raise ValueError(f"column {name} has {column.null_count} empty rows; fill or drop them")
    lengths, kind = [], column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        values = column.flatten()
        sizes = (
            {len(values) // max(len(column), 1)}
            if pa.types.is_fixed_size_list(kind)
            else set(column.value_lengths().to_pylist())
        )
        if len(sizes) != 1:
            raise ValueError(f"column {name} has lists of {min(sizes)} to {max(sizes)} values; expected one length")
        lengths.append(sizes.pop())
        column, kind = values, values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise ValueError(f"column {name} is {kind}; expected numbers, lists of numbers, or encoded images")
    return column.to_numpy(zero_copy_only=False).reshape(-1, *lengths)


def _encoded(column: Any) -> list[bytes] | None:
    """The encoded images of a column, bare or with their path beside them; None where it is another kind."""
    import pyarrow as pa

    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return None
    return column.to_pylist()


def _pictures(option: Parquet, encoded: list[bytes], labels: np.ndarray, named: dict[str, str]) -> Sources:
    if option.gives != "images":
        raise ValueError(f"column {option.inputs} holds encoded images; say data.gives=images")
    names = [f"{option.path}, row {row}" for row in range(len(encoded))]
    number = count_classes(labels, option.num_classes)
    source = EncodedImages(names, labels.astype(np.int32), encoded.__getitem__, option.size, option.channels)
    if len(encoded):
        source.take(np.array([0]))
    shape = (option.size, option.size, option.channels)
    return make_labelled_sources(
        *split_source(source, option.eval_fraction), shape, number, named, option.eval_fraction, waits=True
    )
