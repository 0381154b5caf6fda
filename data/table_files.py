"""Which files hold a table: one, or those of a folder, by the part of the data set that their names say they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.fingerprint import identify_file
from data.option_fields import explain_missing_name
from data.splits import AmbiguousSplitError, Split, group_by_split

PARTS: tuple[Split, ...] = ("train", "eval", "test")


@dataclass(frozen=True)
class TableFiles:
    """The files of each part of a data set, and what a person is told about them: nothing where no name says a part."""

    groups: Mapping[Split, Sequence[Path]]
    said: str = ""

    @property
    def selected(self) -> tuple[str, ...]:
        """Return what a fingerprint needs to know of the parts; nothing where there are none, as it ever was."""
        return tuple(self.groups) if self.said else ()

    def identify(self, path: Path) -> dict[str, str]:
        """Return "SIZE HASH" of each file by its name below `path`, or by its own where that is the file."""
        root = path if path.is_dir() else path.parent
        return {
            file.relative_to(root).as_posix(): identify_file(file) for group in self.groups.values() for file in group
        }


def find_table_files(
    path: Path,
    files: Sequence[Path],
    wanted: Sequence[str],
    label: str | None,
    read_names: Callable[[Path], Sequence[str]],
) -> TableFiles:
    """Return files by part, once each is known to have the wanted columns and the label.

    A test set without labels is left out, unless none are wanted. `read_names` returns the columns of a file. Raises
    ValueError where one lacks a column, or the names of files may be those of parts or not.
    """
    if label in wanted:
        raise ValueError(f"inputs={label} is the label as well; leave it out of data.inputs")
    if twice := [name for name in wanted if wanted.count(name) > 1]:
        raise ValueError(f"inputs={twice[0]} is named twice; name each column once")
    try:
        groups = group_by_split(files, path) if path.is_dir() else None
    except AmbiguousSplitError as error:
        raise ValueError(f"path={path} {error}; name the file to train on, or move the others away") from None
    if groups is None:
        groups = {"train": list(files)}
    left_out = ""
    for split, members in list(groups.items()):
        columns = {file: read_names(file) for file in members}
        every = [*wanted, *([] if label is None else [label])]
        lacking = [(name, file) for file, names in columns.items() for name in every if name not in names]
        # Competitions keep the labels of their test set to themselves.
        if split == "test" and {name for name, _ in lacking} == {label}:
            del groups[split]
            left_out = f"; the test set is left out, for it has no column {label}"
        elif lacking:
            name, file = lacking[0]
            key = "label" if name == label else "inputs"
            raise ValueError(f"{key}={name} is no column of {file}{explain_missing_name(name, columns[file])}")
    if len(groups) == 1 and not left_out:
        return TableFiles(groups)
    counts = ", ".join(f"{split} {len(groups[split])}" for split in PARTS if split in groups)
    return TableFiles(
        {split: groups[split] for split in PARTS if split in groups}, f"files by name: {counts}{left_out}"
    )
