"""Prepare a model for a plan: check the scopes that it declares, or find its blocks where it declares none.

A model of the user's own need not know models/scopes.py. If it keeps its blocks in a list, their class can be found (or
is named by `remat.block`), and its call is declared to be a block here.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from flax import nnx

from models.remat_plan import RematPlan, RematPlanError
from models.scopes import EXEMPT, scope


def apply_plan(model: nnx.Module, plan: RematPlan, block: str | None) -> None:
    """Make a model obey a plan once it is traced; in place, and before nnx.split.

    Where the model declares no scope "block" and the plan is about blocks, each module of the class named `block`
    becomes one. Without a name it is the class that is repeated in a list and has most of the parameters.

    Raises:
        RematPlanError: The plan asks for a scope or a class that the model does not have, or no block is found.
    """
    if not plan.scopes:
        return
    offered = declared_scopes(model)
    if plan.scopes == {"block"} and "block" not in offered:
        _declare_blocks(model, _choose_block_class(model, block))
    elif missing := sorted(plan.scopes - offered):
        raise RematPlanError(f"the model declares no scope '{missing[0]}' (it has: {_join_names(offered)})")
    elif block is not None:
        raise RematPlanError(f"the model says itself what its blocks are; leave remat.block={block} out")
    if plan.every > 1:
        _exempt_all_but_every_nth(model, plan.every)


def declared_scopes(model: nnx.Module) -> set[str]:
    """Return the names of the scopes that the modules of a model declare."""
    return {name for _, module in nnx.iter_modules(model) for name in scopes_of_class(type(module))}


def scopes_of_class(kind: type) -> set[str]:
    """Return the names of the scopes that the methods of a class declare."""
    # Names that begin with two underscores are Python's own, except for the call.
    methods: list[Any] = [
        getattr(kind, name, None) for name in dir(kind) if not name.startswith("__") or name == "__call__"
    ]
    return {method.remat_scope for method in methods if hasattr(method, "remat_scope")}


def _choose_block_class(model: nnx.Module, block: str | None) -> type:
    """Return the class of that name, or the one that is repeated in a list and has most of the parameters."""
    present = {type(module).__name__: type(module) for _, module in nnx.iter_modules(model)}
    own = [name for name, kind in present.items() if kind is not type(model) and not _is_from_flax(kind)]
    if block is not None and block not in present:
        raise RematPlanError(
            f"remat.block={block}: the model has no module of that class (it has: {_join_names(present)})"
        )
    if block is not None:
        return present[block]
    sizes = Counter[type]()
    for kind, module in _find_repeated_modules(model):
        sizes[kind] += sum(math.prod(leaf.shape) for leaf in _find_parameters(module))
    if not sizes:
        raise RematPlanError(
            "the model declares no scope, and no module of its own is repeated in a list; mark one with "
            f'@scope("block"), or name its class: remat.block=NAME ({_join_names(own or present)})'
        )
    return sizes.most_common(1)[0][0]


def _find_repeated_modules(model: nnx.Module) -> list[tuple[type, nnx.Module]]:
    """Return, with its class, each module that lies in a list beside another one of its class."""
    found = []
    for path, module in nnx.iter_modules(model):
        # Flax's own layers are too small to be blocks.
        if path and str(path[-1]).isdecimal() and not _is_from_flax(type(module)):
            found.append((path[:-1], type(module), module))
    beside = Counter((where, kind) for where, kind, _ in found)
    return [(kind, module) for where, kind, module in found if beside[where, kind] > 1]


def _find_parameters(module: nnx.Module) -> list[Any]:
    return [variable.get_value() for _, variable in nnx.iter_graph(module) if isinstance(variable, nnx.Param)]


def _is_from_flax(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "flax"


def _declare_blocks(model: nnx.Module, kind: type) -> None:
    """Give each module of a class, in place, the class whose call is declared a block."""
    for _, module in list(nnx.iter_modules(model)):
        if type(module) is kind:
            # flax's own __setattr__ would keep the class as an attribute of the module's graph.
            object.__setattr__(module, "__class__", _with_block_scope(kind))


@functools.cache
def _with_block_scope(kind: Any) -> type:
    """Return a subclass whose call is declared a block."""
    # A subclass, for the user's class may have modules elsewhere, which must stay as they are. It is cached, so that
    # modules of one class are of one class again: their type is part of flax's graph definition, hence of jit's key.
    own = {"__call__": scope("block")(kind.__call__), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), own)


def _exempt_all_but_every_nth(model: nnx.Module, every: int) -> None:
    """Assign each block its number in their order, and exempt all but the first of each `every` from the plan."""
    blocks = [module for _, module in nnx.iter_modules(model) if "block" in scopes_of_class(type(module))]
    # A single block may be a stack of many, which models.scopes.layers divides into groups itself.
    for number, module in enumerate(blocks if len(blocks) > 1 else []):
        setattr(module, EXEMPT, number % every > 0)


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
