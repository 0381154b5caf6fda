"""What is recomputed in the backward pass, as plain data: made by the runner from `remat=`, obeyed by the scopes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KeptOperations = Literal["nothing", "dots", "dots_no_batch", "everything"]


@dataclass(frozen=True)
class RematPlan:
    """Which scopes are recomputed, and what of them is stored all the same, beside what enters them.

    `keeps` speaks of operations, `names` of what the model tagged; `offload` are tags that wait in the host's memory.
    With `every=n` of the blocks only the first of each n is recomputed. Hashable: it is part of jit's cache key.
    """

    scopes: frozenset[str] = frozenset()
    keeps: KeptOperations = "nothing"
    names: frozenset[str] = frozenset()
    offload: frozenset[str] = frozenset()
    every: int = 1
