"""What the backward pass recomputes, as plain data: made by the runner from `remat=`, obeyed by models/scopes.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeptOperations = Literal["nothing", "dots", "dots_no_batch", "everything"]


@dataclass(frozen=True)
class RematPlan:
    """Which scopes are recomputed, and which of their values are stored all the same.

    What enters a scope is always stored. It is hashable, for it is part of the key of jit's cache.

    Attributes:
        scopes: The names of the scopes that are recomputed. Empty: nothing is.
        keeps: The operations whose results are stored: none, matrix products ("dots"), those without a batch dimension
            ("dots_no_batch"), or all.
        names: The tags of values that are stored.
        offload: The tags of values that are stored in the host's memory.
        every: Of the blocks only the first of each `every` is recomputed.
    """

    scopes: frozenset[str] = frozenset()
    keeps: KeptOperations = "nothing"
    names: frozenset[str] = frozenset()
    offload: frozenset[str] = frozenset()
    every: int = 1


class RematPlanError(ValueError):
    """A plan asks for something that this model does not have."""
