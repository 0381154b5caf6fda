"""The seam between models and rematerialization: a model declares scopes, a plan decides which are recomputed.

A model author writes `@scope("attention")` above a method and knows nothing more. Without an active plan the mark is
the identity. The module lives with the models, because it is their vocabulary; the runner, which may import models,
turns its `remat=` choice into a `Plan` and activates it around tracing. The plan travels in a jax user context, which
is part of the key of every trace cache: an inner `jax.jit` traced under one plan is never reused under another
(a plain context variable would go stale there).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from flax import nnx

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Plan:
    """Which scopes are recomputed in the backward pass instead of stored. Hashable: it is part of jit's cache key."""

    scopes: frozenset[str] = frozenset()


_plan = jax.make_user_context(default_value=Plan())
_hits: ContextVar[set[str] | None] = ContextVar("remat_hits", default=None)
_scanned: ContextVar[bool] = ContextVar("remat_scanned", default=False)


@contextmanager
def active(plan: Plan) -> Iterator[set[str]]:
    """Trace under `plan`. Yields the set of scopes that were really wrapped, filled in while tracing."""
    hits: set[str] = set()
    token = _hits.set(hits)
    try:
        with _plan(plan):
            yield hits
    finally:
        _hits.reset(token)


@contextmanager
def scanned(length: int) -> Iterator[None]:
    """Tell the seam that what is traced here is the body of a scan of `length` iterations.

    There the barriers against common-subexpression elimination are not needed and cost speed; a scan of length 1 is
    inlined by XLA and does need them.
    """
    token = _scanned.set(length > 1)
    try:
        yield
    finally:
        _scanned.reset(token)


def scope(name: str) -> Callable[[Method], Method]:
    """Declare a method to be a region that a plan may recompute. Its arrays are arguments; keep statics on the module.

    Only the outermost wrapped scope counts: nested recomputation would do the work twice.
    """

    def declare(method: Method) -> Method:
        @functools.wraps(method)
        def call(module: nnx.Module, *args: Any) -> Any:
            plan: Plan = _plan.value
            if name not in plan.scopes:
                return method(module, *args)
            hits = _hits.get()
            if hits is not None:
                hits.add(name)
            return nnx.remat(_outermost(method), prevent_cse=not _scanned.get())(module, *args)

        return call  # type: ignore[return-value]

    return declare


def _outermost(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with every scope inside it switched off."""

    def call(*args: Any) -> Any:
        with _plan(Plan()):
            return method(*args)

    return call
