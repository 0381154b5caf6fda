"""Looking at a run, or typing a wrong command, waits for no jax: which modules import it at once is known here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

MODULES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("runner", "models", "data")
    for path in sorted((REPO / folder).rglob("*.py"))
} | {"run": REPO / "run.py", "holdfast": REPO / "holdfast.py"}
# Each of these takes one to three seconds to import. They are imported inside a function, when work begins.
HEAVY_LIBRARIES = ("jax", "flax", "optax", "orbax", "grain")
# Whole rooms but for the modules after the dash, and single modules, that may import them at once.
MAY_IMPORT_JAX = {
    "models": ("models", "models.remat_plan"),
    "runner.train": (
        "runner.train",
        "runner.train.compile_cache",
        "runner.train.dataset",
        "runner.train.evaluation_files",
        "runner.train.loop",
        "runner.train.prefetch",
        "runner.train.run_context",
        "runner.train.starvation",
    ),
    "runner.remat": (
        "runner.remat",
        "runner.remat.cost_table",
        "runner.remat.memory_plot",
        "runner.remat.compile_target",
    ),
    "runner.session": ("runner.session", "runner.session.experiment", "runner.session.standing"),
    "runner.checkpoint.held_state": (),
    "runner.checkpoint.orbax_notes": (),
    "runner.checkpoint.store": (),
    "runner.checkpoint.shards": (),
    "runner.checkpoint.following_saver": (),
    "runner.checkpoint.transfer": (),
    "runner.inspect.load_model": (),
    "runner.inspect.model_cost": (),
    "runner.optim.clip": (),
    "runner.optim.grouped_updates": (),
    "runner.optim.parameter_groups": (),
    "runner.trace.remat_trace": (),
    "runner.trace.trace_digest": (),
    "data.workers": (),
}


def is_free(module: str) -> bool:
    """Whether a module has to answer without jax."""
    for room, light in MAY_IMPORT_JAX.items():
        if (module == room or module.startswith(f"{room}.")) and module not in light:
            return False
    return True


def imported_at_once(path: Path) -> Iterator[str]:
    """What importing a file imports: not what stands in its functions, nor what is for a type checker."""
    for node in nodes_run_at_import(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in full)


def nodes_run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_for_types:
            yield node
            yield from nodes_run_at_import(node)


def test_the_rooms_are_there() -> None:
    for room, light in MAY_IMPORT_JAX.items():
        assert {room, *light} <= MODULES.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if is_free(module)])
def test_is_free_of_jax(module: str) -> None:
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for imported in imported_at_once(MODULES[current]):
            assert imported.split(".")[0] not in HEAVY_LIBRARIES, f"{module} → {current} → {imported}"
            parents = [imported.rsplit(".", cut)[0] for cut in range(imported.count(".") + 1)]
            todo += [parent for parent in parents if parent in MODULES]
