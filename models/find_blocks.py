"""What a model offers to a plan: the scopes it declares, or the blocks that are found in it; and how it obeys."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

from flax import nnx

from models.remat_plan import RematPlan
from models.scopes import EXEMPT, RematPlanError, scope


def apply_plan(model: nnx.Module, plan: RematPlan, block: str | None) -> None:
    """Make a model obey a plan; in place, and before it is split.

    Where it declares no block, each module of the class named `block` becomes one; without a name, each of the class
    that is repeated in a list and has most of the parameters. Raises Misplaced where the plan asks for what is not
    there.
    """
    if not plan.scopes:
        return
    offered = declared_scopes(model)
    if plan.scopes == {"block"} and "block" not in offered:
        _mark(model, _chosen(model, block))
    elif missing := sorted(plan.scopes - offered):
        raise RematPlanError(f"the model declares no scope '{missing[0]}' (it has: {_listed(offered)})")
    elif block is not None:
        raise RematPlanError(f"the model says itself what its blocks are; leave remat.block={block} out")
    if plan.every > 1:
        _number(model, plan.every)


def declared_scopes(model: nnx.Module) -> set[str]:
    """The scopes that its modules declare."""
    return {name for _, module in nnx.iter_modules(model) for name in _scopes(type(module))}


def _scopes(kind: type) -> set[str]:
    methods: list[Any] = [
        getattr(kind, name, None) for name in dir(kind) if not name.startswith("__") or name == "__call__"
    ]
    return {method.remat_scope for method in methods if hasattr(method, "remat_scope")}


def _chosen(model: nnx.Module, block: str | None) -> type:
    """The class whose modules are the blocks."""
    present = {type(module).__name__: type(module) for _, module in nnx.iter_modules(model)}
    own = [name for name, kind in present.items() if kind is not type(model) and not _is_flax(kind)]
    if block is not None and block not in present:
        raise RematPlanError(f"remat.block={block}: the model has no module of that class (it has: {_listed(present)})")
    if block is not None:
        return present[block]
    sizes = Counter[type]()
    for kind, module in _in_lists(model):
        sizes[kind] += sum(math.prod(leaf.shape) for leaf in _leaves(module))
    if not sizes:
        raise RematPlanError(
            "the model declares no scope, and no module of its own is repeated in a list; mark one with "
            f'@scope("block"), or name its class: remat.block=NAME ({_listed(own or present)})'
        )
    return sizes.most_common(1)[0][0]


def _in_lists(model: nnx.Module) -> list[tuple[type, nnx.Module]]:
    """Modules that lie in a list beside another of their class; flax's own layers are too small to be blocks."""
    found = []
    for path, module in nnx.iter_modules(model):
        if path and str(path[-1]).isdecimal() and not _is_flax(type(module)):
            found.append((path[:-1], type(module), module))
    beside = Counter((where, kind) for where, kind, _ in found)
    return [(kind, module) for where, kind, module in found if beside[where, kind] > 1]


def _leaves(module: nnx.Module) -> list[Any]:
    return [variable.get_value() for _, variable in nnx.iter_graph(module) if isinstance(variable, nnx.Param)]


def _is_flax(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "flax"


def _mark(model: nnx.Module, kind: type) -> None:
    for _, module in list(nnx.iter_modules(model)):
        if type(module) is kind:
            object.__setattr__(module, "__class__", _marked(kind))


@functools.cache
def _marked(kind: Any) -> type:
    """The class with its call declared a block. A class of its own: nobody else's modules are changed."""
    own = {"__call__": scope("block")(kind.__call__), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), own)


def _number(model: nnx.Module, every: int) -> None:
    """Choose the first of each `every` blocks. One alone may be a stack of many: models.scopes.layers knows those."""
    blocks = [module for _, module in nnx.iter_modules(model) if "block" in _scopes(type(module))]
    for number, module in enumerate(blocks if len(blocks) > 1 else []):
        setattr(module, EXEMPT, number % every > 0)


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
