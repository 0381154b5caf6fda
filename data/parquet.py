"""Parquet files: the named columns, read into memory.

Through pyarrow, because grain reads each Parquet file from its beginning to its end, and the order of examples is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.arrow_columns import (
    find_class_names,
    find_encoded_images,
    read_inputs,
    read_label,
    read_text,
    require_pyarrow,
)
from data.bad_examples import skip_bad_examples
from data.fingerprint import hash_files
from data.images import EncodedImages
from data.sources import Source, Sources
from data.splits import Split
from data.table_files import TableFiles, find_table_files
from data.tables import (
    InputFormat,
    TableFormat,
    TableParts,
    check_example_shape,
    drop_hidden_test,
    make_split_sources,
    make_table_sources,
)
from data.text_files import join_documents, make_byte_sources, make_byte_windows


def find_parquet_files(path: Path, inputs: str | tuple[str, ...], label: str | None) -> TableFiles:
    """Return the file, or the files of a folder, in the order of their names: by part where their names say one.

    Without `label`, none is looked for. Raises ValueError where there are none, or one lacks a wanted column.
    """
    require_pyarrow("parquet")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"path={path} holds no .parquet file")
    return find_table_files(path, files, _as_names(inputs), label, _read_column_names)


def _read_column_names(file: Path) -> list[str]:
    import pyarrow.parquet as pq
    from pyarrow.lib import ArrowException

    try:
        names: list[str] = pq.read_schema(file).names
    except (OSError, ArrowException) as error:
        raise ValueError(f"path={file} is no Parquet file ({str(error).splitlines()[0]})") from None
    return names


def read_parquet(
    path: Path,
    inputs: str | tuple[str, ...],
    label: str,
    pixels: InputFormat,
    form: TableFormat,
    eval_fraction: float,
) -> Sources:
    """Return the examples of every file, in the order of the files' names.

    `inputs` is a column of lists of numbers or of encoded images, or several columns of numbers. Raises ValueError
    where they cannot be read or are not what `form` says.
    """
    found = find_parquet_files(path, inputs, label)
    names = _as_names(inputs)
    tables = {split: _read_tables(path, files, [*names, label]) for split, files in found.groups.items()}
    parts = TableParts({}, found.identify(path), found.selected, found.said)
    labels = {split: read_label(table, label) for split, table in tables.items()}
    images = _find_images(tables, names[0]) if len(names) == 1 else None
    if images is not None:
        parts = replace(parts, columns={split: {"label": own} for split, own in labels.items()})
        made = _make_image_sources(path, images, parts, pixels, form, eval_fraction)
    else:
        columns = {
            split: {"inputs": read_inputs(table, names), "label": labels[split]} for split, table in tables.items()
        }
        check_example_shape(columns["train"]["inputs"].shape[1:], form.gives)
        made = make_table_sources(replace(parts, columns=columns), form, eval_fraction)
    classes = find_class_names(tables["train"].schema, label)
    return replace(made, classes=classes) if len(classes) == made.num_outputs and not made.classes else made


def read_parquet_text(path: Path, column: str, seq_len: int, eval_fraction: float) -> Sources:
    """Return a column of text as one long run of bytes, a line between rows.

    Without a part to evaluate on, the end of the text is held out. Raises ValueError where the column is no text.
    """
    found = find_parquet_files(path, column, None)
    runs = {}
    for split, files in found.groups.items():
        rows = read_text(_read_tables(path, files, [column]), column)
        runs[split] = join_documents(f"{row}".encode() for row in rows)
    drawn = None if "eval" in runs else eval_fraction
    if drawn is not None:
        train, held = runs["train"].cut(int(len(runs["train"].content) * (1.0 - drawn)))
        runs |= {"train": train, "eval": held}
    files_read = found.identify(path)
    fingerprint = hash_files(files_read, column, drawn, *found.selected)
    made = make_byte_sources([runs["train"]], [runs["eval"]], seq_len, fingerprint, files_read)
    held_out = {"test": make_byte_windows(runs["test"], seq_len)} if "test" in runs else {}
    return replace(made, summary="; ".join(filter(None, [made.summary, found.said])), held_out=held_out)


def _read_tables(path: Path, files: Sequence[Path], columns: list[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); write it again") from None


def _make_image_sources(
    path: Path,
    images: Mapping[Split, list[bytes]],
    parts: TableParts,
    pixels: InputFormat,
    form: TableFormat,
    eval_fraction: float,
) -> Sources:
    """Return encoded images with their labels, decoded when they are taken."""
    if form.gives != "images":
        raise ValueError("a column holds encoded images; say data.gives=images")
    columns, said = drop_hidden_test(parts.columns, form.ignore_label)
    labels = form.prepare_labels(columns)
    sources: dict[Split, Source] = {}
    for (split, encoded), own in zip(((split, images[split]) for split in columns), labels.sides, strict=True):
        where = f"{path}, {split}," if len(columns) > 1 else f"{path},"
        rows = [f"{where} row {row}" for row in range(len(encoded))]
        sources[split] = EncodedImages(rows, own, encoded.__getitem__, pixels.size, pixels.channels)
        # A look at the first one: what is no image at all is told before training begins.
        if len(encoded) and pixels.on_bad == "raise":
            sources[split].take(np.array([0]))
    shape = (pixels.size, pixels.size, pixels.channels)
    told = "; ".join(filter(None, [parts.said, said]))
    made = make_split_sources(sources, shape, labels, replace(parts, said=told), eval_fraction, waits=True)
    return skip_bad_examples(made, pixels.on_bad)


def _find_images(tables: Mapping[Split, Any], name: str) -> dict[Split, list[bytes]] | None:
    """Return the encoded images of each part; None where the column is of another kind in one."""
    found = {}
    for split, table in tables.items():
        if (encoded := find_encoded_images(table.column(name).combine_chunks(), name)) is None:
            return None
        found[split] = encoded
    return found


def _as_names(inputs: str | tuple[str, ...]) -> list[str]:
    return [inputs] if isinstance(inputs, str) else list(inputs)
