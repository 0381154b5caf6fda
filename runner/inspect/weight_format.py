"""What a format of exported weights is, for the verb and for the page that describes what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WeightFormat:
    """A format of `--to`.

    Attributes:
        file: the name of the file.
        write: write arrays to a path, and return the type that each of them has there.
        import_line: Python that imports what reads it.
        load_call: Python that reads it, as a dictionary; as a live model where `makes_model`.
        makes_model: whether what is read is a model of another library, under names of its own.
        head: lines at the top of the page, before its title.
    """

    file: str
    write: Callable[[Path, Mapping[str, Any]], dict[str, str]]
    import_line: str
    load_call: str
    makes_model: bool = False
    head: tuple[str, ...] = ()
