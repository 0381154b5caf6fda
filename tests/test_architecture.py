"""The plan of the house, read from the imports: who may know whom, which library has which room, and how large."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

FILES = sorted(
    path
    for folder in ("runner", "models", "data")
    for path in (REPO / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
MODULES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*FILES, REPO / "run.py"]
}

# One third-party library, one room (prefixes of module names).
FENCES = {
    "hydra": ("runner.compose", "runner.sweep.plugin", "runner.sweep.submitit", "runner.sweep.sweeper"),
    "omegaconf": ("runner.config", "runner.compose", "runner.sweep.plugin", "runner.sweep.sweeper"),
    "optuna": ("runner.sweep.sweeper",),
    "pydantic": ("runner.config",),
    "yaml": ("runner.config", "runner.tools.settings"),
    "orbax": ("runner.checkpoint.store",),
    "tensorstore": ("runner.checkpoint.arrays",),
    "safetensors": ("runner.tools.export",),
    "grain": ("data.workers", "data.records"),
    "sklearn": ("data.built_in",),
    "pyarrow": ("data.parquet",),
    "datasets": ("data.hub",),
    "tokenizers": ("data.encodings",),
    "tiktoken": ("data.encodings",),
    "wandb": ("runner.log.wandb",),
    "tensorboardX": ("runner.log.tensorboard",),
    "rich": ("runner.log.console", "runner.sweep.table"),
    "PIL": ("runner.evaluate.media", "data.images"),
    "jinja2": ("runner.report.page",),
    "fcntl": ("runner.rundir",),
    "matplotlib": ("runner.drill.picture", "runner.remat.picture", "runner.tools.timeline"),
    "flax": ("models", "runner.step", "runner.build", "runner.evaluate.measure"),
    "optax": ("runner.optim", "runner.schedule", "runner.step", "models.objectives"),
}
# Modules that must answer without jax: they are imported before the configuration is valid, or by tools that only look.
NO_JAX = (
    *("run", "runner", "runner.compose", "runner.config", "runner.explain", "runner.errors", "runner.experiment"),
    *("runner.identity", "runner.schedule", "runner.external", "runner.trust"),
    *("runner.rundir", "runner.ledger", "runner.readme", "runner.moment", "runner.optim", "runner.mesh"),
    *("runner.training", "runner.compiled", "runner.crashes", "runner.provenance", "runner.pulse"),
    *("runner.stopwatch", "runner.garbage"),
    *("runner.checkpoint", "runner.checkpoint.record", "runner.checkpoint.digest", "runner.checkpoint.strategy"),
    *("runner.checkpoint.retention", "runner.checkpoint.checkpointer", "runner.checkpoint.restore"),
    *("runner.checkpoint.arrays", "runner.remat.policy", "runner.remat.offered", "runner.remat.needs", "models.plan"),
    *("runner.preempt", "runner.preempt.sources"),
    *("runner.child", "runner.sweep", "runner.sweep.slurm", "runner.sweep.local", "runner.sweep.together"),
    "runner.sweep.search",
    *("runner.sweep.array", "runner.sweep.jobs", "runner.sweep.submitit"),
    *("runner.log", "runner.log.console", "runner.evaluate", "runner.evaluate.media", "models", "data"),
    *("data.own", "data.fields", "data.sources", "data.pipeline", "data.tokenize", "runner.dataset"),
    "runner.tools.tokenize",
    *("runner.__main__", "runner.tools", "runner.tools.place", "runner.tools.settings", "runner.tools.text"),
    *("runner.tools.ls", "runner.tools.show", "runner.tools.diff", "runner.tools.verify", "runner.tools.why"),
    *("runner.tools.pin", "runner.tools.prune", "runner.tools.digest", "runner.tools.export", "runner.tools.card"),
    *("runner.tools.eval", "runner.tools.model", "runner.flops"),
    *("runner.tools.remat", "runner.remat.report", "runner.remat.target", "runner.remat.picture"),
    *("runner.tools.supervise", "runner.tools.rerun", "runner.tools.recipe"),
    *("runner.tools.drill", "runner.drill", "runner.drill.plan", "runner.drill.attack", "runner.drill.evidence"),
    *("runner.drill.diagnose", "runner.drill.story", "runner.drill.picture"),
    *("runner.tools.goodput", "runner.tools.account", "runner.tools.timeline"),
    *("runner.tools.report", "runner.report", "runner.report.facts", "runner.report.frontier", "runner.report.page"),
)
EVERYONE = ("runner.errors", "runner.moment")  # the two rooms that everyone may know
VALUES = ("runner.checkpoint.record", "runner.rundir")  # plain values and names that leaves may know as well
# Beyond that, runner modules know: (module, or package with a dot) → what it may import from us.
MAY_KNOW = {
    "run": ("runner.compose", "runner.garbage", "runner.config", "runner.experiment", "runner.sweep"),
    "runner": ("runner.tools.load",),
    "runner.__main__": ("runner.explain",),  # and each verb by its name, when it is asked for
    "runner.compose": (
        *("runner.external", "runner.trust"),
        *("runner.config", "runner.explain", "runner.provenance", "runner.sweep"),
    ),
    "runner.config": (
        *(
            "data",
            "models",
            "runner.checkpoint.checkpointer",
            "runner.checkpoint.retention",
            "runner.checkpoint.strategy",
            "runner.explain",
            "runner.evaluate",
            "runner.log",
        ),
        *("runner.mesh", "runner.optim", "runner.preempt", "runner.remat.offered", "runner.remat.policy"),
        "runner.schedule",
    ),
    "runner.experiment": (
        *(
            "runner.config",
            "runner.crashes",
            *("runner.identity", "runner.schedule", "runner.external", "runner.trust"),
            "runner.ledger",
            "runner.log.console",
            "runner.preempt",
        ),
        *("runner.evaluate", "runner.provenance", "runner.readme", "runner.training"),
    ),
    "runner.training": (
        *("runner.build", "runner.checkpoint.restore", "runner.compiled", "runner.config", "runner.garbage"),
        *("data.sources", "runner.dataset", "runner.evaluate", "runner.ledger"),
        *("runner.log.console", "runner.loop", "runner.preempt.watch", "runner.programs", "runner.readme"),
        "runner.remat",
    ),
    "runner.build": (
        *("data", "models", "runner.checkpoint", "runner.config", "runner.identity", "runner.ledger", "runner.log"),
        *("runner.dataset", "runner.evaluate", "runner.external", "runner.loop"),
        *("runner.mesh", "runner.preempt", "runner.programs", "runner.roles", "runner.step", "runner.waiting"),
    ),
    "runner.evaluate.measure": ("data", "runner.evaluate", "runner.step"),
    "runner.evaluate.again": (
        *("runner.build", "runner.checkpoint.restore", "runner.compiled", "runner.config", "runner.dataset"),
        "runner.programs",
    ),
    "runner.optim": ("runner.roles",),
    "runner.dataset": ("data",),
    "runner.waiting": (),
    "runner.tools.tokenize": ("data.tokenize", "runner.tools"),
    "runner.external": ("data", "models", "runner.explain", "runner.trust"),
    "runner.programs": (
        *("models", "runner.compiled", "runner.config", "runner.external", "runner.mesh", "runner.preempt.watch"),
        *("runner.remat.effect", "runner.remat.needs", "runner.remat.policy", "runner.remat.seen"),
    ),
    "runner.remat.needs": ("runner.flops", "runner.remat.seen"),
    "runner.loop": ("runner.log", "runner.preempt.watch"),  # protocols, and what ends a wait; no concrete class
    "runner.ledger": ("runner.provenance", "runner.pulse", "runner.stopwatch"),
    "runner.stopwatch": ("runner.pulse",),
    "runner.readme": ("runner.ledger",),
    "runner.checkpoint.checkpointer": (
        *("runner.checkpoint.digest", "runner.checkpoint.retention", "runner.checkpoint.strategy"),
    ),
    "runner.checkpoint.restore": ("runner.checkpoint.digest",),
    "runner.checkpoint.store": ("runner.checkpoint.arrays",),
    "runner.checkpoint.transfer": (
        *("runner.checkpoint.arrays", "runner.checkpoint.digest", "runner.checkpoint.store"),
    ),
    "runner.preempt": (
        *("runner.preempt.aws", "runner.preempt.azure", "runner.preempt.gce", "runner.preempt.machine"),
        "runner.preempt.slurm",
    ),
    "runner.preempt.aws": ("runner.preempt.line", "runner.preempt.notice", "runner.preempt.reading"),
    "runner.preempt.azure": ("runner.preempt.line", "runner.preempt.notice", "runner.preempt.reading"),
    "runner.preempt.gce": ("runner.preempt.line", "runner.preempt.notice"),
    "runner.preempt.line": ("runner.preempt.notice",),
    "runner.preempt.reading": ("runner.preempt.notice",),
    "runner.preempt.slurm": ("runner.preempt.notice",),
    "runner.preempt.sources": ("runner.preempt", "runner.preempt.notice", "runner.preempt.watch"),
    "runner.preempt.signals": ("runner.preempt.watch",),
    "runner.preempt.ahead": ("runner.preempt.watch",),
    "runner.preempt.grace": ("runner.preempt.watch",),
    "runner.preempt.guard": ("runner.preempt.watch", "runner.pulse"),
    "runner.log.console": ("runner.ledger",),
    "runner.log.tensorboard": ("runner.log.jsonl",),  # the truth, from which the mirrors are filled in
    "runner.log.wandb": ("runner.log.jsonl",),
    # The drill: a run is a process and a directory to it; it compares checkpoints as `diff` does.
    "runner.drill.plan": ("runner.pulse",),
    "runner.drill.attack": ("runner.drill.plan", "runner.pulse"),
    "runner.drill.evidence": ("runner.checkpoint.arrays", "runner.checkpoint.digest", "runner.tools"),
    "runner.drill.diagnose": ("runner.drill.evidence",),
    "runner.drill.story": ("runner.drill", "runner.tools.text"),
    "runner.drill.picture": ("runner.drill", "runner.tools.text"),
    "runner.tools.drill": ("runner.drill", "runner.ledger", "runner.pulse", "runner.tools"),
    # Beside each other (runner.tools); of checkpoints only what reads them, and what deletes one.
    "runner.tools.settings": ("runner.checkpoint.retention",),
    "runner.tools.place": ("runner.checkpoint.digest", "runner.ledger"),
    "runner.tools.ls": ("runner.checkpoint.restore", "runner.checkpoint.retention", "runner.tools"),
    "runner.tools.show": ("runner.checkpoint.arrays", "runner.tools"),
    "runner.tools.diff": ("runner.checkpoint.arrays", "runner.checkpoint.digest", "runner.identity", "runner.tools"),
    "runner.tools.verify": ("runner.tools",),
    "runner.tools.why": ("runner.checkpoint.digest", "runner.checkpoint.restore", "runner.tools"),
    "runner.tools.pin": ("runner.checkpoint.digest", "runner.tools"),
    "runner.tools.prune": (
        *("runner.checkpoint.checkpointer", "runner.checkpoint.restore", "runner.checkpoint.retention", "runner.tools"),
    ),
    "runner.tools.digest": ("runner.checkpoint.arrays", "runner.tools"),
    "runner.tools.eval": ("runner.trust", "runner.compose", "runner.config", "runner.evaluate", "runner.tools"),
    "runner.tools.model": (*("runner.build", "runner.compose", "runner.config", "runner.summary", "runner.tools"),),
    "runner.remat.policy": ("models",),
    "runner.remat.seen": ("models", "runner.flops"),
    "runner.remat.offered": ("models", "runner.explain", "runner.remat.policy"),
    "runner.remat.effect": ("models", "runner.flops", "runner.remat.policy", "runner.remat.seen"),
    "runner.remat.measure": (
        *("data", "models", "runner.build", "runner.config", "runner.flops", "runner.programs", "runner.remat"),
    ),
    "runner.remat.report": ("runner.remat.needs", "runner.remat.policy"),
    "runner.remat.target": (),
    "runner.remat.picture": ("runner.remat.report", "runner.tools.text"),
    "runner.remat.weigh": ("data", "runner.build", "runner.config", "runner.remat"),
    "runner.tools.remat": ("runner.compose", "runner.config", "runner.dataset", "runner.remat", "runner.tools"),
    "runner.remat.blocks": (*("data", "models", "runner.build", "runner.config", "runner.flops", "runner.remat"),),
    "runner.remat.auto": ("data", "models", "runner.config", "runner.remat", "runner.tools.text"),
    "runner.remat.chosen": (
        *("runner.build", "runner.compiled", "runner.config", "runner.external", "runner.identity"),
        *("runner.provenance", "runner.remat"),
    ),
    "runner.summary": ("models", "runner.build", "runner.config", "runner.flops", "runner.programs"),
    "runner.tools.export": ("runner.checkpoint.arrays", "runner.tools"),
    # A sweep: a run is a process and a directory to it, and a configuration that is valid already.
    "runner.sweep.members": ("runner.config", "runner.experiment", "runner.tools.rerun"),
    "runner.sweep.local": ("runner.child", "runner.preempt", "runner.sweep"),
    "runner.sweep.table": ("runner.sweep", "runner.tools.text"),
    "runner.sweep.summary": ("runner.sweep",),
    "runner.sweep.search": ("runner.config", "runner.sweep"),
    "runner.sweep.plugin": ("runner.sweep",),
    "runner.sweep.sweeper": ("runner.child", "runner.sweep"),
    "runner.sweep.slurm": ("runner.sweep.jobs",),
    "runner.sweep.array": ("runner.sweep",),
    "runner.sweep.submitit": ("runner.child", "runner.preempt.slurm", "runner.sweep"),
    "runner.sweep.together": ("runner.compose", "runner.config", "runner.experiment", "runner.sweep"),
    "runner.tools.supervise": (
        *("runner.child", "runner.preempt"),
        "runner.tools",
    ),
    "runner.tools.recipe": ("runner.explain", "runner.tools"),
    "runner.tools.card": ("runner.checkpoint.arrays", "runner.ledger", "runner.tools"),
    "runner.tools.goodput": ("runner.ledger", "runner.pulse", "runner.tools"),
    "runner.tools.timeline": ("runner.tools",),
    "runner.report.differ": ("runner.identity",),
    "runner.report.facts": (
        *("runner.checkpoint.retention", "runner.report.thin", "runner.tools.account", "runner.tools.goodput"),
        *("runner.ledger", "runner.remat.needs", "runner.tools.settings"),
    ),
    "runner.report.frontier": ("runner.remat.needs", "runner.report"),
    "runner.report.page": ("runner.report", "runner.tools.account", "runner.tools.text"),
    "runner.tools.report": ("runner.report", "runner.tools"),
    "runner.tools.load": (
        *("runner.build", "runner.config", "runner.dataset", "runner.mesh", "runner.step"),
        *("runner.tools", "runner.trust"),
    ),
}


def _imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Modules that a file imports: at import time only, or with those inside functions. Type checking does not count."""
    tree = ast.parse(path.read_text())
    nodes: Iterator[ast.AST] = ast.walk(tree) if lazy else _at_import(tree)
    guarded = {id(node) for test in ast.walk(tree) if _is_type_checking(test) for node in ast.walk(test)}
    for node in nodes:
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def _at_import(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _at_import(node)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def test_there_is_something_to_check() -> None:
    assert {"run", "runner.loop", "models.gpt", "data.pipeline"} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_third_party_libraries_keep_to_their_rooms(module: str) -> None:
    for imported in _imports(MODULES[module], lazy=True):
        library = imported.split(".")[0]
        assert library not in FENCES or _within(module, FENCES[library]), f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_who_knows_whom(module: str) -> None:
    for imported in set(_imports(MODULES[module], lazy=True)) & MODULES.keys():
        if module.split(".")[0] in ("models", "data"):
            assert imported.split(".")[0] == module.split(".")[0], f"{module} imports {imported}"
        else:
            allowed = (*EVERYONE, *VALUES, *MAY_KNOW.get(module, ()))
            assert _within(imported, allowed), f"{module} imports {imported}"


def test_no_import_goes_round() -> None:
    """The catalogues of models and data import what they build inside a function; nobody else may close a loop so."""
    graph = {
        module: set(_imports(path, lazy=module.startswith("runner"))) & MODULES.keys() - {module}
        for module, path in MODULES.items()
    }
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert not graph


@pytest.mark.parametrize("module", NO_JAX)
def test_is_free_of_jax(module: str) -> None:
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for imported in _imports(MODULES[current], lazy=False):
            assert imported.split(".")[0] not in ("jax", "flax", "optax", "orbax", "grain"), (
                f"{module} → {current} → {imported}"
            )
            parents = [imported.rsplit(".", cut)[0] for cut in range(imported.count(".") + 1)]
            todo += [parent for parent in parents if parent in MODULES]


@pytest.mark.parametrize("path", [*FILES, REPO / "run.py"], ids=lambda path: str(path.relative_to(REPO)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "says nothing about itself"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_no_attic() -> None:
    forbidden = {"utils", "common", "helpers", "misc", "manager", "base"}
    assert not [path for path in FILES if path.stem in forbidden]


def test_configuration_files_are_short_and_say_when_to_choose_them() -> None:
    for path in (REPO / "conf").rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), path
        assert path.name == "config.yaml" or len(lines) <= 12, path
