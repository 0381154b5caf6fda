"""Measure the road: what lies between `run.py` and the function that takes the gradient."""

from __future__ import annotations

import ast
import functools
import re
import tempfile
from pathlib import Path

from tests.house.source import Definition, Module, Product

# The functions on the road, as patterns of module and dotted name. The first road that is there in full is measured.
ROADS = (
    (
        r"runner\.launch\.main:main",
        r"runner\.session\.experiment:run",
        r"runner\.session\.attempt:(run_attempt|work)",
        r"runner\.train\.loop:train",
        r"runner\.train\.step:(.*\.)?train_step",
    ),
    (
        r"run:start",
        r"runner\.compose:compose",
        r"runner\.experiment:run",
        r"runner\.experiment:_worked_on",
        r"runner\.training:work",
        r"runner\.training:_trained",
        r"runner\.loop:train",
        r"runner\.waiting:Fed\.train",
        r"runner\.step:Rated\.bound",
        r"runner\.step:(.*\.)?train_step",
    ),
)

Place = tuple[Module, Definition]


@functools.cache
def count_frames() -> tuple[int | str, int | str]:
    """Return the frames of ours where the loop calls the step, and in the compile thread above `train_step`.

    Reading cannot tell: two short runs of this checkout are made, and their real stacks counted.
    """
    from tests.conftest import Door, write_corpus
    from tests.session.test_road import frames_above_the_step, frames_at_the_step

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder))
        door = Door(Path(folder))
        return max(map(len, frames_at_the_step(door, Path(folder)))), len(frames_above_the_step(door))


def find_road(product: Product) -> tuple[list[Place], list[str]]:
    """Return the functions on the road, and the patterns that no function fits (empty where a road is there)."""
    tries = []
    for patterns in ROADS:
        found: list[Place] = []
        missing = []
        for pattern in patterns:
            fitting = [
                (module, function)
                for module in product.modules
                for function in module.functions
                if re.fullmatch(pattern, f"{module.name}:{function.name}")
            ]
            found += fitting[:1]
            missing += [pattern] * (not fitting)
        if not missing:
            return found, []
        tries.append((found, missing))
    return min(tries, key=lambda tried: len(tried[1]))


def find_names_of_ours(product: Product, road: list[Place]) -> dict[str, str]:
    """Return the product's names that the functions mention, each with the first place; see the package's docstring."""
    defined = {name for module in product.modules for name in _top_level(module, constants=False)}
    found: dict[str, str] = {}
    for module, function in road:
        known = _top_level(module, constants=True) | _imported(product, module)
        unread = {id(node) for annotation in _annotations(function.node) for node in ast.walk(annotation)}
        for node in ast.walk(function.node):
            if id(node) in unread:
                continue
            if isinstance(node, ast.Name) and node.id in known:
                found.setdefault(node.id, module.place(node.lineno, node.id))
            elif isinstance(node, ast.Attribute) and node.attr in defined:
                found.setdefault(node.attr, module.place(node.lineno, f".{node.attr}"))
    return found


def _top_level(module: Module, *, constants: bool) -> set[str]:
    """Return the names of functions and classes (and constants) at the top level of a module."""
    names = set()
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif constants and isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif constants and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def _imported(product: Product, module: Module) -> set[str]:
    """Return the names that a module's imports from the product bind, those inside functions included."""
    lines = {item.line for item in product.imports(module)}
    return {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno in lines
        for alias in node.names
    }


def _annotations(function: ast.AST) -> list[ast.expr]:
    """Return the annotations of parameters and of what is returned, in a function and those inside it."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.annotation:
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns:
            found.append(node.returns)
    return found
