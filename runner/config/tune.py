"""What of a model trains: all of it, chosen parts, or low-rank adapters beside it. Free of jax.

Patterns are looked up where the model is built (runner/train/tune_model.py): only there it is known what it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from models.name_patterns import Patterns


@dataclass(frozen=True, kw_only=True)
class NoTune:
    """Every parameter trains."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class FreezeTune:
    """Train chosen parameters and leave the others as they are: they have no gradient and no optimizer state.

    A pattern is a whole part of a parameter's path, in which `*` stands for anything: `head`, `attention.qkv`, `bias`,
    `blocks.11.*`. What lasts beside parameters (batch statistics) changes as in any training.

    Attributes:
        train: patterns of what trains, as `tune.train=[head,blocks.11.*]`.
    """

    kind: Literal["freeze"] = "freeze"
    train: Patterns = ()

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train: nothing is named, and nothing would train; say tune.train=[head] or the like")


@dataclass(frozen=True, kw_only=True)
class LoraTune:
    """Train low-rank adapters beside linear layers, and leave the model as it is (Hu et al. 2021, arXiv:2106.09685).

    A layer gives xW + (alpha / rank) · (xA)B. Adapters take a learning rate about ten times that of full training.

    Attributes:
        rank: numbers between A and B.
        alpha: the adapter's result is multiplied by alpha / rank.
        rslora: by alpha / √rank instead, for large ranks (Kalajdzievski 2023, arXiv:2312.03732).
        targets: patterns over paths and names of layers: `qkv`, `attn_out`, `ffn_*`, `head`, or `*` for all that are
            linear.
        train: patterns of parameters that train whole beside the adapters, as a fresh `head`.
    """

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0.0)] = 16.0
    rslora: bool = False
    targets: Annotated[Patterns, MinLen(1)] = ("*",)
    train: Patterns = ()

    @property
    def scale(self) -> float:
        """Return what an adapter's result is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


Tune = NoTune | FreezeTune | LoraTune
