"""Read the product's Python files and answer what is written in them, without importing any."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGES = ("runner", "models", "data")
# Comments that are read by tools, not by people.
ORDERS = ("#!", "# noqa", "# type:", "# pragma", "# ruff:", "# mypy:", "# fmt:")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One module of the product that a module imports."""

    line: int
    target: str
    in_function: bool
    renamed: tuple[str, str] | None
    """The name and what it is called here, where the two differ."""


@dataclass(frozen=True)
class Definition:
    """A function or class, with the dotted name it has within its module."""

    node: Function | ast.ClassDef
    name: str
    in_class: bool


@dataclass(frozen=True)
class Module:
    """One file of the product."""

    name: str
    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Return the syntax tree."""
        return ast.parse(self.text, self.path)

    @cached_property
    def num_lines(self) -> int:
        """Return how many lines are not blank."""
        return sum(bool(line.strip()) for line in self.text.splitlines())

    @property
    def room(self) -> str:
        """Return the room that the file belongs to."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if parts[0] == "runner" else parts[0]

    @cached_property
    def definitions(self) -> list[Definition]:
        """Return all functions and classes, nested ones included."""
        return list(_definitions(self.tree, "", in_class=False))

    @property
    def functions(self) -> list[Definition]:
        """Return all functions and methods, nested ones included."""
        return [found for found in self.definitions if isinstance(found.node, Function)]

    @property
    def classes(self) -> list[Definition]:
        """Return all classes, nested ones included."""
        return [found for found in self.definitions if isinstance(found.node, ast.ClassDef)]

    @cached_property
    def comment_lines(self) -> list[int]:
        """Return the lines that hold a comment and nothing else."""
        return [
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type == tokenize.COMMENT
            and token.line.lstrip().startswith("#")
            and not token.string.startswith(ORDERS)
        ]

    def place(self, line: int, name: str = "") -> str:
        """Return how an offender is told: file:line name."""
        return f"{self.path}:{line} {name}".rstrip()


@dataclass(frozen=True)
class Product:
    """All files of the product."""

    root: Path
    modules: tuple[Module, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """Return the dotted names of all modules, and of the folders that hold them."""
        return frozenset(module.name for module in self.modules) | {*PACKAGES, "run"}

    @property
    def num_lines(self) -> int:
        """Return how many lines are not blank."""
        return sum(module.num_lines for module in self.modules)

    def imports(self, module: Module) -> list[Import]:
        """Return what a module imports from the product, in the order of the file."""
        inside = {
            id(node) for function in module.functions for node in ast.walk(function.node) if node is not function.node
        }
        found = []
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                targets = {target: renamed for target, renamed in self._targets(module, node)}
                found += [Import(node.lineno, target, id(node) in inside, new) for target, new in targets.items()]
        return sorted(found, key=lambda item: item.line)

    def _targets(
        self, module: Module, node: ast.Import | ast.ImportFrom
    ) -> Iterator[tuple[str, tuple[str, str] | None]]:
        """Yield each module of the product that a statement imports, and the renaming that it does."""
        for alias in node.names:
            renamed = (alias.name, alias.asname) if alias.asname and alias.asname != alias.name else None
            if isinstance(node, ast.Import):
                target = alias.name
            else:
                source = _source(module, node)
                # `from package import module` means the module, any other name the file that defines it.
                target = f"{source}.{alias.name}" if f"{source}.{alias.name}" in self.names else source
            if target.split(".")[0] in (*PACKAGES, "run"):
                yield target, renamed


def read_product(root: Path) -> Product:
    """Read the product's files from a checkout."""
    files = [path for folder in PACKAGES for path in (root / folder).rglob("*.py")]
    files += [root / "run.py"] * (root / "run.py").exists()
    paths = sorted(path.relative_to(root) for path in files)
    return Product(
        root,
        tuple(
            Module(".".join(path.with_suffix("").parts).removesuffix(".__init__"), str(path), (root / path).read_text())
            for path in paths
        ),
    )


def _source(module: Module, node: ast.ImportFrom) -> str:
    """Return the module that a `from` import reads, relative ones resolved."""
    if not node.level:
        return node.module or ""
    package = module.name.split(".") if module.path.endswith("__init__.py") else module.name.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _definitions(parent: ast.AST, prefix: str, *, in_class: bool) -> Iterator[Definition]:
    """Yield the functions and classes below a node, outermost first."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Function | ast.ClassDef):
            yield Definition(node, prefix + node.name, in_class)
            yield from _definitions(node, f"{prefix}{node.name}.", in_class=isinstance(node, ast.ClassDef))
        else:
            yield from _definitions(node, prefix, in_class=in_class)
