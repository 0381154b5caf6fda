"""What a model can be trained for, as options: its own objective, one by name, or one of the user's. Free of jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from models.objectives import Objective as Function


class Unfit(TypeError):
    """What a user's own model or objective gave is not what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """An objective by name. `default`: the model's own; for a model of yours next_token on tokens, else classify."""

    kind: Literal["default", "classify", "next_token"] = "default"

    def build(self, own: str) -> Function:
        """The function that is trained for, where the model's own is `own`."""
        from models.objectives import OBJECTIVES

        return OBJECTIVES[own if self.kind == "default" else self.kind]


@dataclass(frozen=True, kw_only=True)
class ExternalObjective:
    """An objective of your own. `target` is `module:function`, called as

        target(model: nnx.Module, batch: dict[str, Array], **options) -> dict[str, Float[Array, "batch"]]

    It gives "loss", which is minimized, and any other metric: each with one value per example, not a mean.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, own: str) -> Function:
        """The function; it raises Unfit when it is traced and gives something else."""
        from models.external import objective

        return objective(self.target, self.options)


Objective = Named | ExternalObjective
READS = {"classify": ("inputs", "label"), "next_token": ("tokens",)}  # what a named objective needs of a batch
