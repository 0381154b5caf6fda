"""Print the table of the house, or what one of its rows counts."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tests.house.source import Product, read_product
from tests.house.table import ROWS

MARKS = {True: "yes", False: "no", None: ""}


def main(argv: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m tests.house", description=__doc__)
    parser.add_argument("paths", nargs="*", help="files and folders to look at, instead of the whole product")
    parser.add_argument("--list", dest="row", choices=list(ROWS), help="tell what a row counts")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="another checkout")
    options = parser.parse_args(argv)
    product = read_product(options.root)
    lines = list_places(product, options.row, options.paths) if options.row else draw_table(product, options.paths)
    # A reader that has seen enough (`| head`) is no error.
    with suppress(BrokenPipeError):
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        return 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def list_places(product: Product, key: str, paths: list[str]) -> list[str]:
    """Return what a row counts, as lines, those that name one of the paths (all without paths)."""
    places = ROWS[key].measure(product).places
    return [place for place in places if not paths or any(path.rstrip("/") in place for path in paths)]


def draw_table(product: Product, paths: list[str]) -> list[str]:
    """Return the table as lines; of some files alone, the rows that can be measured there."""
    if paths:
        roots = [Path(path) for path in paths]
        kept = [m for m in product.modules if any(Path(m.path).is_relative_to(root) for root in roots)]
        # Names are looked up in the whole product, or imports from outside the paths would count as foreign.
        part = replace(product, modules=tuple(kept))
        part.__dict__["names"] = product.names
        product = part
    lines = [("", "", "now", "was", "want", "reached")]
    for row in ROWS.values():
        if row.partial or not paths:
            figure = row.measure(product)
            text = figure.text + (row.unit if not isinstance(figure.value, str) else "")
            lines.append((row.key, row.title, text, row.was, row.want, MARKS[row.is_reached(figure)]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
