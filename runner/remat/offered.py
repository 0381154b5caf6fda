"""Whether a model of ours has what a remat option asks for: known before jax starts, from what its option declares."""

from __future__ import annotations

from models import Model
from runner.explain import suggest
from runner.remat.policy import Names, Offload, Remat


def check(remat: Remat, model: Model) -> None:
    """Raises ValueError for a scope, a tag or a class of blocks that is not there, naming what is."""
    what, plan, tags = f"model={model.kind}", remat.plan, ", ".join(model.tags)
    if isinstance(remat, Names | Offload) and not plan.names | plan.offload:
        key = "remat.save" if isinstance(remat, Names) else "remat.offload"
        there = f"{what} tags {tags}" if tags else "those your model tags"
        raise ValueError(f"{key}: no value is named; name at least one ({there})")
    if model.kind == "external":
        return  # it is seen when it is built, and traced
    if remat.block is not None:
        raise ValueError(
            f"remat.block={remat.block} is for a model that does not say what its blocks are; {what} does: leave it out"
        )
    if unknown := sorted(plan.scopes - set(model.scopes)):
        raise ValueError(
            f"remat={remat.kind} recomputes the scope '{unknown[0]}', which {what} does not declare "
            f"(it has: {', '.join(model.scopes)}); choose another remat"
        )
    if unknown := sorted((plan.names | plan.offload) - set(model.tags)):
        near = suggest(unknown[0], list(model.tags)) or f" (it has: {tags})"
        raise ValueError(f"remat={remat.kind}: {what} tags no value '{unknown[0]}'{near}")
