"""What each remat name recomputes: the scopes of the model that are traced again in the backward pass. No jax here.

A scope that the model does not declare is an error (`config.py`), and so is one that tracing never met (`build.py`):
a policy recomputes what its name says, or it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class NoRemat:
    """Store every intermediate value."""

    kind: Literal["none"] = "none"
    scopes: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Full:
    """Recompute every block; store only what enters it."""

    kind: Literal["full"] = "full"
    scopes: ClassVar[frozenset[str]] = frozenset({"block"})


@dataclass(frozen=True, kw_only=True)
class AttentionOnly:
    """Recompute attention; store the rest."""

    kind: Literal["attention_only"] = "attention_only"
    scopes: ClassVar[frozenset[str]] = frozenset({"attention"})


@dataclass(frozen=True, kw_only=True)
class FfnOnly:
    """Recompute the feed-forward parts; store the rest."""

    kind: Literal["ffn_only"] = "ffn_only"
    scopes: ClassVar[frozenset[str]] = frozenset({"ffn"})


Remat = NoRemat | Full | AttentionOnly | FfnOnly
