"""What each remat name recomputes: the scopes of the model that are traced again in the backward pass. No jax here.

A scope or a tag that the model does not have is an error (`offered.py` where the model says so, else `build.py`), and
so is one that tracing never met (`programs.py`), or that changes nothing (`effect.py`): a policy recomputes what its
name says, or it is refused. Where the policy is one of blocks and the model declares none, `block` names the class of
its repeated module; null: it is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval

from models import Model
from models.remat_plan import KeptOperations, RematPlan
from runner.config.explain import suggest_word
from runner.text import parse_size

BLOCK = frozenset({"block"})
Tags = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _OfBlocks:
    """Blocks are recomputed, save what `keeps` says."""

    block: str | None = None
    keeps: ClassVar[KeptOperations] = "nothing"

    @property
    def plan(self) -> RematPlan:
        """What is recomputed, and what of that is stored all the same."""
        return RematPlan(BLOCK, self.keeps)


@dataclass(frozen=True, kw_only=True)
class _OfScope:
    """One part of every block is recomputed."""

    scope: ClassVar[str]
    block: ClassVar[None] = None

    @property
    def plan(self) -> RematPlan:
        """What is recomputed."""
        return RematPlan(frozenset({self.scope}))


@dataclass(frozen=True, kw_only=True)
class NoRemat:
    """Store every intermediate value."""

    kind: Literal["none"] = "none"
    block: ClassVar[None] = None
    plan: ClassVar[RematPlan] = RematPlan()


@dataclass(frozen=True, kw_only=True)
class Full(_OfBlocks):
    """Recompute every block; store only what enters it (Chen et al. 2016, arXiv:1604.06174)."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class NothingSaveable(_OfBlocks):
    """The same by jax's name for it."""

    kind: Literal["nothing_saveable"] = "nothing_saveable"


@dataclass(frozen=True, kw_only=True)
class EverythingSaveable(_OfBlocks):
    """Store every value of every block. To see what the barriers around a block cost; else choose none."""

    kind: Literal["everything_saveable"] = "everything_saveable"
    keeps: ClassVar[KeptOperations] = "everything"


@dataclass(frozen=True, kw_only=True)
class Dots(_OfBlocks):
    """Of every block store the results of matrix products, convolutions and flash attention; recompute the rest."""

    kind: Literal["dots"] = "dots"
    keeps: ClassVar[KeptOperations] = "dots"


@dataclass(frozen=True, kw_only=True)
class DotsNoBatch(_OfBlocks):
    """The same without products over a batch, which attention scores are (and without convolutions)."""

    kind: Literal["dots_no_batch"] = "dots_no_batch"
    keeps: ClassVar[KeptOperations] = "dots_no_batch"


@dataclass(frozen=True, kw_only=True)
class EveryN(_OfBlocks):
    """Recompute the first of every n blocks; store the others."""

    kind: Literal["every_n"] = "every_n"
    n: Annotated[int, Ge(2)] = 2

    @property
    def plan(self) -> RematPlan:
        return RematPlan(BLOCK, every=self.n)


@dataclass(frozen=True, kw_only=True)
class Names(_OfBlocks):
    """Recompute every block, but store what the model tagged with these names."""

    kind: Literal["names"] = "names"
    save: Tags = ()

    @property
    def plan(self) -> RematPlan:
        return RematPlan(BLOCK, names=frozenset(self.save))


@dataclass(frozen=True, kw_only=True)
class Offload(_OfBlocks):
    """The same, and what is tagged with the names in `offload` waits in the host's memory. Not on a CPU."""

    kind: Literal["offload"] = "offload"
    offload: Tags = ()
    save: Tags = ()

    @property
    def plan(self) -> RematPlan:
        return RematPlan(BLOCK, names=frozenset(self.save), offload=frozenset(self.offload))


@dataclass(frozen=True, kw_only=True)
class AttentionOnly(_OfScope):
    """Recompute attention with its projections; store the rest."""

    kind: Literal["attention_only"] = "attention_only"
    scope: ClassVar[str] = "attention"


@dataclass(frozen=True, kw_only=True)
class AttentionCore(_OfScope):
    """Recompute scores, softmax and the mixing of values (Korthikanti et al. 2022, arXiv:2205.05198)."""

    kind: Literal["attention_core"] = "attention_core"
    scope: ClassVar[str] = "attention_core"


@dataclass(frozen=True, kw_only=True)
class FfnOnly(_OfScope):
    """Recompute the feed-forward parts; store the rest."""

    kind: Literal["ffn_only"] = "ffn_only"
    scope: ClassVar[str] = "ffn"


@dataclass(frozen=True, kw_only=True)
class AutoRemat(_OfBlocks):
    """The least recomputation that fits into a budget: `budget_bytes` (`8GB`), or `fraction` of the device's memory.

    The budget is for all that one device holds during a step: parameters, optimizer, batch and what is stored.
    """

    kind: Literal["auto"] = "auto"
    budget_bytes: Annotated[int, Ge(1)] | str | None = None
    fraction: Annotated[float, Interval(gt=0.0, le=1.0)] = 0.9

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and self.budget < 1:
            raise ValueError(f"budget_bytes={self.budget_bytes} must be a number of bytes, as 8000000000, 8GB or 7GiB")

    @property
    def budget(self) -> int:
        """In bytes; 0 where none is given."""
        return parse_size(self.budget_bytes or 0)


RematPolicy = (
    NoRemat
    | Full
    | NothingSaveable
    | EverythingSaveable
    | Dots
    | DotsNoBatch
    | EveryN
    | Names
    | Offload
    | AttentionOnly
    | AttentionCore
    | FfnOnly
    | AutoRemat
)


def format_policy(option: RematPolicy) -> str:
    """A remat option in a word: `dots`, `every_n(2)`, `names(qkv, ffn_pre)`, `offload(qkv; ffn_pre)`."""
    match option:
        case EveryN():
            return f"{option.kind}({option.n})"
        case Names():
            return f"{option.kind}({', '.join(option.save)})"
        case Offload():
            return f"{option.kind}({'; '.join(filter(None, (', '.join(option.offload), ', '.join(option.save))))})"
        case _:
            return option.kind


def check_model_supports(remat: RematPolicy, model: Model) -> None:
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
        near = suggest_word(unknown[0], list(model.tags)) or f" (it has: {tags})"
        raise ValueError(f"remat={remat.kind}: {what} tags no value '{unknown[0]}'{near}")
