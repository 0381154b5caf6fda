"""CSV files: columns of numbers and a label, read into memory through pyarrow."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.arrow_columns import is_number, is_text, read_inputs, read_label, require_pyarrow
from data.compressed import LOOKED_AT_BYTES, find_binary_kind, read_beginning, read_plain, strip_ending
from data.sources import Sources
from data.table_files import TableFiles, find_table_files
from data.tables import TableFormat, TableParts, make_table_sources

ENDINGS = (".csv", ".tsv")
DELIMITERS = ",;\t|"
# So many rows are looked at to find the delimiter.
SNIFFED_ROWS = 20
NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
DECIMAL_COMMA = r"^\s*[-+]?\d+,\d+\s*$"
# A column that mostly holds these is meant as numbers, and what keeps it from being so is told.
MEANT_AS_NUMBER = f"{NUMBER}|{DECIMAL_COMMA}"
# What pandas calls the index that it writes beside the columns.
INDEX_NAMES = re.compile(r"^(|Unnamed: \d+)$")
# pyarrow finds the type of a column in the first block, so that has to be the whole file.
MOST_BLOCK = 2**31 - 1


def find_csv_files(path: Path, inputs: str | tuple[str, ...] | None, label: str, delimiter: str | None) -> TableFiles:
    """Return the file, or the files of a folder, in the order of their names: by part where their names say one.

    Raises ValueError where there are none, or one has no header or lacks a wanted column.
    """
    require_pyarrow("csv")
    files = sorted(file for file in path.rglob("*") if _is_csv(file)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"path={path} holds no file that ends in {' or '.join(ENDINGS)}, compressed or not")
    wanted = [] if inputs is None else [inputs] if isinstance(inputs, str) else list(inputs)
    return find_table_files(path, files, wanted, label, lambda file: read_header(file, delimiter)[0])


def _is_csv(file: Path) -> bool:
    return strip_ending(file.name).lower().endswith(ENDINGS) and file.is_file() and not file.name.startswith(".")


def read_header(file: Path, delimiter: str | None) -> tuple[list[str], str]:
    """Return the names of the columns of a file, and what stands between them: as is given, or as it looks.

    Raises ValueError where its first line is no header.
    """
    beginning = read_beginning(file)
    if kind := find_binary_kind(beginning):
        raise ValueError(f"path={file} is {kind}; expected CSV")
    is_cut = len(beginning) >= LOOKED_AT_BYTES
    if is_cut and b"\n" not in beginning:
        # So many columns that their names alone are longer than what was looked at.
        beginning, is_cut = read_plain(file), False
    # The last line may be cut off, also within a character.
    lines = beginning.decode("utf-8-sig", errors="replace").splitlines()
    lines = (lines[:-1] if is_cut else lines)[:SNIFFED_ROWS]
    if not any(line.strip() for line in lines):
        raise ValueError(f"path={file} is empty; expected a line of names, and a row for each example")
    delimiter = delimiter or _find_delimiter(lines)
    names = [name.strip() for name in next(csv.reader(lines, delimiter=delimiter))]
    if any("\ufffd" in name for name in names):
        raise ValueError(f"path={file} is no UTF-8 text; write it so: iconv -f LATIN1 -t UTF-8")
    if all(re.match(NUMBER, name) for name in names):
        raise ValueError(f"path={file} begins with numbers ({lines[0][:40]}); write a first line with names of columns")
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"path={file} has several columns {twice[0]}; give them different names")
    return names, delimiter


def _find_delimiter(lines: Sequence[str]) -> str:
    """Return what parts each of these lines into the same number of columns, the most of all."""

    def rank(delimiter: str) -> tuple[bool, int]:
        sizes = [len(row) for row in csv.reader(lines, delimiter=delimiter) if row]
        # Where rows are of several lengths, one of them is wrong, and that is told when they are read.
        return len(set(sizes)) == 1 and sizes[0] > 1, sizes[0]

    return max(DELIMITERS, key=rank)


def read_csv(
    path: Path,
    inputs: str | tuple[str, ...] | None,
    label: str,
    delimiter: str | None,
    form: TableFormat,
    eval_fraction: float,
) -> Sources:
    """Return the examples of every file; without `inputs` every other column of numbers is one.

    Raises ValueError where a file cannot be read, or a column is not what `form` says.
    """
    import pyarrow as pa

    found = find_csv_files(path, inputs, label, delimiter)
    tables = {}
    for split, files in found.groups.items():
        read = [_read_table(file, delimiter) for file in files]
        _check_same_columns(files, read)
        try:
            tables[split] = pa.concat_tables(read, promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"{path}: the files do not go together ({str(error).splitlines()[0]})") from None
    if not len(tables["train"]):
        raise ValueError(f"path={path} holds no row to train on")
    if inputs is None:
        names, told = _choose_inputs(tables["train"], label)
    else:
        names, told = [inputs] if isinstance(inputs, str) else list(inputs), ""
    for table in tables.values():
        # A list that is made anew each time it is asked for: with thousands of columns that takes most of the time.
        there = set(table.column_names)
        for name in names:
            if name not in there:
                raise ValueError(f"{path}: column {name} is not in all parts of the data")
            _refuse_text(table.column(name), name)
    columns = {
        split: {"inputs": read_inputs(table, names), "label": _read_csv_label(table, label)}
        for split, table in tables.items()
    }
    said = "; ".join(filter(None, [found.said, told]))
    return make_table_sources(TableParts(columns, found.identify(path), found.selected, said), form, eval_fraction)


def _read_csv_label(table: Any, name: str) -> np.ndarray:
    import pyarrow as pa

    if pa.types.is_binary(table.column(name).type):
        raise ValueError(f"column {name} is no UTF-8 text; write the file as UTF-8 (iconv -f LATIN1 -t UTF-8)")
    label = read_label(table, name)
    # A blank behind each comma is no part of a name.
    return np.char.strip(label) if label.dtype.kind == "U" else label


def _read_table(file: Path, delimiter: str | None) -> Any:
    """Return a file as a table whose columns have the types that all their values have."""
    import pyarrow as pa
    import pyarrow.csv as pc

    names, delimiter = read_header(file, delimiter)
    content = read_plain(file)
    try:
        table = pc.read_csv(
            pa.BufferReader(content),
            pc.ReadOptions(block_size=min(max(len(content) + 1, 2**20), MOST_BLOCK)),
            pc.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        )
    except pa.ArrowException as error:
        raise ValueError(f"{file} cannot be read as CSV ({str(error).splitlines()[0][:200]}); mend that line") from None
    return table.rename_columns(names)


def _check_same_columns(files: Sequence[Path], tables: Sequence[Any]) -> None:
    """Raise ValueError where files of one part have different columns."""
    for file, table in zip(files[1:], tables[1:], strict=True):
        if differing := set(table.column_names) ^ set(tables[0].column_names):
            raise ValueError(f"{file} and {files[0]} differ in column {min(differing)!r}; expected the same columns")


def _choose_inputs(table: Any, label: str) -> tuple[list[str], str]:
    """Return every other column of numbers, and what is said about those that are none."""
    names, left_out = [], []
    for field in table.schema:
        if field.name == label:
            continue
        column = table.column(field.name)
        if INDEX_NAMES.match(field.name):
            left_out.append("the index")
        elif is_number(field.type):
            names.append(field.name)
        elif is_text(field.type) and _count_matches(column, MEANT_AS_NUMBER) * 2 >= len(column):
            _refuse_text(column, field.name)
        else:
            left_out.append(f"{field.name} ({'text' if is_text(field.type) else field.type})")
    if not names:
        raise ValueError(f"inputs: there is no column of numbers beside {label}; left: {', '.join(left_out) or 'none'}")
    return names, f"left out: {', '.join(left_out)}" if left_out else ""


def _refuse_text(column: Any, name: str) -> None:
    """Raise ValueError where a column that should be numbers is text, with what is in it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_binary(column.type):
        raise ValueError(f"column {name} is no UTF-8 text; write the file as UTF-8")
    if pa.types.is_null(column.type):
        raise ValueError(f"column {name} is empty in all {len(column):,} rows; leave it out of data.inputs")
    if not is_text(column.type):
        return
    odd = column.filter(pc.invert(pc.match_substring_regex(column, NUMBER)))
    example = repr(str(odd[0])[:40])
    if _count_matches(odd, DECIMAL_COMMA) * 2 > len(column):
        raise ValueError(f"column {name} has numbers with a decimal comma ({example}); write them with a point")
    if len(odd) * 2 <= len(column):
        raise ValueError(
            f"column {name} is numbers but for {len(odd):,} row{'s' if len(odd) > 1 else ''} (such as {example}); "
            "fill or drop them"
        )
    raise ValueError(f"column {name} is text (such as {example}); leave it out of data.inputs, or make numbers of it")


def _count_matches(column: Any, pattern: str) -> int:
    import pyarrow.compute as pc

    return int(pc.sum(pc.match_substring_regex(column, pattern)).as_py() or 0)
