"""Say what is measured, what it was and what is wanted; `LAWS` names the rows that the tests hold the code to."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import PurePath

from tests.house import road, street
from tests.house.source import Definition, Function, Module, Product

# Rows (by key) whose limit a test enforces. The others are figures to look at.
LAWS: tuple[str, ...] = ("back", "knot", "classes", "files", "readme")

RIDDLE = re.compile(r"(What|Whether|How|Where|Why|Which|When|Who|Whose|A|An|As|One|The same)\b")
MANY_FILES, MANY_LINES, MANY_FUNCTION_LINES, MANY_PARAMETERS, MANY_FIELDS = 3, 400, 80, 6, 14


@dataclass(frozen=True)
class Figure:
    """What a row gives: a number (or a word instead), and the places that it counts."""

    value: float | str
    places: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Return the value as it stands in the table."""
        return self.value if isinstance(self.value, str) else f"{self.value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    key: str
    title: str
    was: str
    limit: float
    measure: Callable[[Product], Figure]
    unit: str = ""
    at_least: bool = False
    partial: bool = True
    """Whether it can be measured for some files alone."""

    @property
    def want(self) -> str:
        """Return the limit as it stands in the table."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{self.unit}" if self.limit else "0"

    def is_reached(self, figure: Figure) -> bool | None:
        """Return whether the figure is within the limit; None where it is no number."""
        if isinstance(figure.value, str):
            return None
        return figure.value >= self.limit if self.at_least else figure.value <= self.limit


def _per_1000(places: list[str], product: Product) -> Figure:
    return Figure(1000 * len(places) / max(product.num_lines, 1), places)


def _share(places: list[str], total: int) -> Figure:
    return Figure(100 * len(places) / max(total, 1), places)


def _functions(product: Product) -> Iterable[tuple[Module, Definition, Function]]:
    for module in product.modules:
        for found in module.functions:
            assert isinstance(found.node, Function)
            yield module, found, found.node


def count_frames(_: Product) -> Figure:
    """Count the frames from `run.py` to the call of the compiled step."""
    return Figure(road.count_frames()[0])


def count_compile_frames(_: Product) -> Figure:
    """Count the frames in the compile thread down to `train_step`."""
    return Figure(road.count_frames()[1])


def count_rooms(product: Product) -> Figure:
    """Count the rooms, with the files in each."""
    rooms: dict[str, int] = defaultdict(int)
    for module in product.modules:
        rooms[module.room] += 1
    return Figure(len(rooms), [f"{room}: {count} files" for room, count in sorted(rooms.items())])


def count_floors(product: Product) -> Figure:
    """Count the rooms on the longest path."""
    arrows = street.draw_arrows(product)
    back = street.find_back_arrows(arrows, street.read_order(product))
    path = street.find_longest_path(set(arrows) - set(back))
    return Figure(len(path), path)


def count_arrows(product: Product) -> Figure:
    """Count the pairs of rooms of which one imports the other."""
    arrows = street.draw_arrows(product)
    return Figure(len(arrows), [f"{a} → {b}: {len(imports)}" for (a, b), imports in sorted(arrows.items())])


def count_back_arrows(product: Product) -> Figure:
    """Count the arrows that run back up, with the imports that make them."""
    arrows = street.draw_arrows(product)
    back = street.find_back_arrows(arrows, street.read_order(product))
    return Figure(len(back), [f"{a} → {b}: {', '.join(arrows[a, b])}" for a, b in back])


def count_rooms_in_a_knot(product: Product) -> Figure:
    """Count the rooms of the largest knot."""
    knots = street.find_knots(street.draw_arrows(product))
    return Figure(max(map(len, knots), default=0), [", ".join(sorted(knot)) for knot in knots])


def count_names_on_the_road(product: Product) -> Figure:
    """Count the names of ours in the functions on the road."""
    found, missing = road.find_road(product)
    names = road.find_names_of_ours(product, found)
    if missing:
        return Figure(f"{len(names)} without {', '.join(missing)}", sorted(names.values()))
    return Figure(len(names), sorted(names.values()))


def find_one_word_names(product: Product) -> Figure:
    """Find the functions whose name is one word, dunder methods apart."""
    named = [
        (module, found)
        for module, found, node in _functions(product)
        if not (node.name.startswith("__") and node.name.endswith("__"))
    ]
    places = [
        module.place(found.node.lineno, found.name) for module, found in named if "_" not in found.node.name.strip("_")
    ]
    return _share(places, len(named))


def find_riddles(product: Product) -> Figure:
    """Find the docstrings of functions that open with a word of `RIDDLE`."""
    places, total = [], 0
    for module, found, node in _functions(product):
        if text := ast.get_docstring(node):
            total += 1
            if RIDDLE.match(text):
                places.append(module.place(node.lineno, f"{found.name}: {text.splitlines()[0]}"))
    return _share(places, total)


def count_comments(product: Product) -> Figure:
    """Count the comments on lines of their own; the places are the files that lack most."""
    limit = ROWS["comments"].limit / 1000
    lacking = []
    for module in product.modules:
        have, due = len(module.comment_lines), round(module.num_lines * limit)
        if have < due:
            lacking.append((have - due, f"{module.path}: {have} comments in {module.num_lines} lines, {due} wanted"))
    total = sum(len(module.comment_lines) for module in product.modules)
    return Figure(1000 * total / max(product.num_lines, 1), [text for _, text in sorted(lacking)])


def find_lazy_imports(product: Product) -> Figure:
    """Find the imports of the product inside functions."""
    places = [
        module.place(item.line, item.target)
        for module in product.modules
        for item in product.imports(module)
        if item.in_function
    ]
    return _per_1000(places, product)


def find_renames(product: Product) -> Figure:
    """Find the imports of the product under another name."""
    places = [
        module.place(item.line, " as ".join(item.renamed))
        for module in product.modules
        for item in product.imports(module)
        if item.renamed
    ]
    return Figure(len(places), places)


def find_repeated_names(product: Product) -> Figure:
    """Find the names of functions and classes that three or more files define at their top level."""
    files: dict[str, list[str]] = defaultdict(list)
    for module in product.modules:
        for node in module.tree.body:
            if isinstance(node, Function | ast.ClassDef):
                files[node.name].append(module.place(node.lineno))
    return _repeated(files, MANY_FILES)


def find_repeated_classes(product: Product) -> Figure:
    """Find the class names that are defined more than once."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in product.modules:
        for found in module.classes:
            places[found.node.name].append(module.place(found.node.lineno))
    return _repeated(places, 2)


def find_repeated_files(product: Product) -> Figure:
    """Find the file names that are used more than once."""
    places: dict[str, list[str]] = defaultdict(list)
    for module in product.modules:
        name = PurePath(module.path).stem
        if not name.startswith("__"):
            places[name].append(module.path)
    return _repeated(places, 2)


def _repeated(places: dict[str, list[str]], least: int) -> Figure:
    found = sorted((-len(where), name, where) for name, where in places.items() if len(where) >= least)
    return Figure(len(found), [f"{name} ({-count}): {', '.join(where)}" for count, name, where in found])


def count_readme_lines(product: Product) -> Figure:
    """Count the lines of README.md."""
    path = product.root / "README.md"
    return Figure(len(path.read_text().splitlines()) if path.exists() else 0)


def find_any(product: Product) -> Figure:
    """Find the mentions of `Any`."""
    places = [
        module.place(node.lineno)
        for module in product.modules
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.Attribute) and node.attr == "Any")
    ]
    return _per_1000(places, product)


def find_long_functions(product: Product) -> Figure:
    """Find the functions of too many lines."""
    places = [
        module.place(node.lineno, f"{found.name} {_length(node)} lines")
        for module, found, node in _functions(product)
        if _length(node) > MANY_FUNCTION_LINES
    ]
    return Figure(len(places), places)


def _length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def find_long_files(product: Product) -> Figure:
    """Find the files of too many lines."""
    lengths = {module.path: len(module.text.splitlines()) for module in product.modules}
    places = [f"{path} {length} lines" for path, length in lengths.items() if length > MANY_LINES]
    return Figure(len(places), places)


def find_many_parameters(product: Product) -> Figure:
    """Find the functions that take too many parameters."""
    places = []
    for module, found, node in _functions(product):
        given = node.args
        names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        names += [arg.arg for arg in (given.vararg, given.kwarg) if arg]
        if found.in_class and names and names[0] in ("self", "cls"):
            names = names[1:]
        if len(names) > MANY_PARAMETERS:
            places.append(module.place(node.lineno, f"{found.name} {len(names)} parameters"))
    return Figure(len(places), places)


def find_wide_dataclasses(product: Product) -> Figure:
    """Find the dataclasses of too many fields."""
    places = []
    for module in product.modules:
        for found in module.classes:
            if any("dataclass" in ast.unparse(decorator) for decorator in found.node.decorator_list):
                fields = [
                    item
                    for item in found.node.body
                    if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)
                ]
                if len(fields) >= MANY_FIELDS:
                    places.append(module.place(found.node.lineno, f"{found.name} {len(fields)} fields"))
    return Figure(len(places), places)


def find_packed_stars(product: Product) -> Figure:
    """Find the literals that are unpacked where they stand."""
    places = [
        module.place(node.lineno)
        for module in product.modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Starred) and isinstance(node.value, ast.Tuple | ast.List | ast.Set)
    ]
    return Figure(len(places), places)


_ROWS = (
    Row("frames", "frames of ours on the main thread", "10", 5, count_frames, partial=False),
    Row("frames-compile", "frames of ours in the compile thread", "7", 5, count_compile_frames, partial=False),
    Row("road", "names of ours on the road", "112", 45, count_names_on_the_road, partial=False),
    Row("rooms", "rooms", "46", 26, count_rooms, partial=False),
    Row("floors", "floors", "16", 11, count_floors, partial=False),
    Row("arrows", "arrows between rooms", "208", 110, count_arrows, partial=False),
    Row("back", "arrows back up", "13", 0, count_back_arrows, partial=False),
    Row("knot", "rooms in one knot", "14", 0, count_rooms_in_a_knot, partial=False),
    Row("one-word", "function names of one word", "83 %", 50, find_one_word_names, " %"),
    Row("riddles", "docstrings that open What, How, The same …", "34 %", 5, find_riddles, " %"),
    Row("comments", "comment lines per 1,000", "2.4", 30, count_comments, at_least=True),
    Row("lazy", "imports of ours in functions per 1,000", "5.4", 1.5, find_lazy_imports),
    Row("names", "names defined in 3 or more files", "28", 3, find_repeated_names, partial=False),
    Row("classes", "class names used for two things", "27", 3, find_repeated_classes, partial=False),
    Row("files", "file names used for two things", "13", 3, find_repeated_files, partial=False),
    Row("renames", "neighbours renamed on import", "12", 0, find_renames),
    Row("readme", "README, lines", "762", 200, count_readme_lines, partial=False),
    Row("any", "`Any` per 1,000", "30", 8, find_any),
    Row("long-functions", f"functions over {MANY_FUNCTION_LINES} lines", "0", 0, find_long_functions),
    Row("long-files", f"files over {MANY_LINES} lines", "0", 0, find_long_files),
    Row("parameters", f"functions with more than {MANY_PARAMETERS} parameters", "7", 0, find_many_parameters),
    Row("fields", f"dataclasses with {MANY_FIELDS} or more fields", "4", 0, find_wide_dataclasses),
    Row("stars", "literals unpacked where they stand", "12", 0, find_packed_stars),
)
ROWS = {row.key: row for row in _ROWS}
