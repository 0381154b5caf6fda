"""The remat policies: what each name makes the backward pass compute again instead of storing. Free of jax.

A policy is turned into a plan (models/remat_plan.py), which the scopes of a model obey. It recomputes what its name
says or it is refused, at the earliest place that can know: `check_model_supports` where the model says which scopes and
tags it has, models/find_blocks.py when it is built, runner/train/compile.py when it is traced and compiled.

Policies of whole blocks have a field `block`: the name of the class whose modules are the blocks of a model that
declares none. Null: it is found.
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
class _BlockPolicy:
    """Blocks are recomputed, except for the results of the operations in `keeps`.

    Attributes:
        block: the name of the class whose modules are the blocks, in a model of your own that marks none; null: find
            it.
    """

    block: str | None = None
    keeps: ClassVar[KeptOperations] = "nothing"

    @property
    def plan(self) -> RematPlan:
        """The plan that a model obeys."""
        return RematPlan(BLOCK, self.keeps)


@dataclass(frozen=True, kw_only=True)
class _ScopePolicy:
    """One part of every block is recomputed."""

    scope: ClassVar[str]
    # No field, since a scope is declared and never searched for: to set it is an error.
    block: ClassVar[None] = None

    @property
    def plan(self) -> RematPlan:
        """The plan that a model obeys."""
        return RematPlan(frozenset({self.scope}))


@dataclass(frozen=True, kw_only=True)
class NoRemat:
    """Store every intermediate value."""

    kind: Literal["none"] = "none"
    block: ClassVar[None] = None
    plan: ClassVar[RematPlan] = RematPlan()


@dataclass(frozen=True, kw_only=True)
class Full(_BlockPolicy):
    """Recompute every block; store only what enters it (Chen et al. 2016, arXiv:1604.06174)."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class NothingSaveable(_BlockPolicy):
    """Recompute every block: `full` under the name that jax has for it."""

    kind: Literal["nothing_saveable"] = "nothing_saveable"


@dataclass(frozen=True, kw_only=True)
class EverythingSaveable(_BlockPolicy):
    """Store every value of every block. It shows what the barriers around a block cost; else choose none."""

    kind: Literal["everything_saveable"] = "everything_saveable"
    keeps: ClassVar[KeptOperations] = "everything"


@dataclass(frozen=True, kw_only=True)
class Dots(_BlockPolicy):
    """Of every block store the results of matrix products, convolutions and flash attention; recompute the rest."""

    kind: Literal["dots"] = "dots"
    keeps: ClassVar[KeptOperations] = "dots"


@dataclass(frozen=True, kw_only=True)
class DotsNoBatch(_BlockPolicy):
    """Of every block store the results of flash attention and of matrix products without a batch dimension.

    Attention scores have one, so they are recomputed, and so are convolutions (jax: dots_with_no_batch_dims_saveable).
    """

    kind: Literal["dots_no_batch"] = "dots_no_batch"
    keeps: ClassVar[KeptOperations] = "dots_no_batch"


@dataclass(frozen=True, kw_only=True)
class EveryN(_BlockPolicy):
    """Recompute the first of every n blocks; store the others.

    Attributes:
        n: 2 recomputes half of them.
    """

    kind: Literal["every_n"] = "every_n"
    n: Annotated[int, Ge(2)] = 2

    @property
    def plan(self) -> RematPlan:
        """The plan that a model obeys."""
        return RematPlan(BLOCK, every=self.n)


@dataclass(frozen=True, kw_only=True)
class Names(_BlockPolicy):
    """Recompute every block, but store what the model tagged with the names in `save`.

    Attributes:
        save: such names; `python -m runner remat` lists those of a model.
    """

    kind: Literal["names"] = "names"
    save: Tags = ()

    @property
    def plan(self) -> RematPlan:
        """The plan that a model obeys."""
        return RematPlan(BLOCK, names=frozenset(self.save))


@dataclass(frozen=True, kw_only=True)
class Offload(_BlockPolicy):
    """Recompute every block, but store some tags, and some others in the host's memory.

    Not on a CPU, whose memory is the host's.

    Attributes:
        offload: tags whose values wait in the host's memory.
        save: tags whose values are stored on the device.
    """

    kind: Literal["offload"] = "offload"
    offload: Tags = ()
    save: Tags = ()

    @property
    def plan(self) -> RematPlan:
        """The plan that a model obeys."""
        return RematPlan(BLOCK, names=frozenset(self.save), offload=frozenset(self.offload))


@dataclass(frozen=True, kw_only=True)
class AttentionOnly(_ScopePolicy):
    """Recompute attention with its projections; store the rest."""

    kind: Literal["attention_only"] = "attention_only"
    scope: ClassVar[str] = "attention"


@dataclass(frozen=True, kw_only=True)
class AttentionCore(_ScopePolicy):
    """Recompute scores, softmax and the mixing of values (Korthikanti et al. 2022, arXiv:2205.05198)."""

    kind: Literal["attention_core"] = "attention_core"
    scope: ClassVar[str] = "attention_core"


@dataclass(frozen=True, kw_only=True)
class FfnOnly(_ScopePolicy):
    """Recompute the feed-forward parts; store the rest."""

    kind: Literal["ffn_only"] = "ffn_only"
    scope: ClassVar[str] = "ffn"


@dataclass(frozen=True, kw_only=True)
class AutoRemat(_BlockPolicy):
    """The least recomputation that fits into a budget: a number of bytes, or a fraction of the device's memory.

    The budget is for all that one device holds during a step: parameters, optimizer, batch and what is stored.

    Attributes:
        budget_bytes: as `8GB`; null: the fraction counts.
        fraction: of the device's memory.
    """

    kind: Literal["auto"] = "auto"
    # A text is kept as it was typed, so that config.yaml says 8GB and not a number that nobody wrote.
    budget_bytes: Annotated[int, Ge(1)] | str | None = None
    fraction: Annotated[float, Interval(gt=0.0, le=1.0)] = 0.9

    def __post_init__(self) -> None:
        if self.budget_bytes is not None and self.budget < 1:
            raise ValueError(f"budget_bytes={self.budget_bytes} must be a number of bytes, as 8000000000, 8GB or 7GiB")

    @property
    def budget(self) -> int:
        """The budget in bytes; 0 where none is given."""
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


def format_policy(policy: RematPolicy) -> str:
    """Return a policy in a word: `dots`, `every_n(2)`, `names(qkv, ffn_pre)`, `offload(qkv; ffn_pre)`."""
    # `block` is not in it: a run has one model, and with it one class of blocks.
    match policy:
        case EveryN():
            return f"{policy.kind}({policy.n})"
        case Names():
            return f"{policy.kind}({', '.join(policy.save)})"
        case Offload():
            return f"{policy.kind}({'; '.join(filter(None, (', '.join(policy.offload), ', '.join(policy.save))))})"
        case _:
            return policy.kind


def check_model_supports(policy: RematPolicy, model: Model) -> None:
    """Raise ValueError for a scope, a tag or a class of blocks that the model does not have, naming what it has."""
    what, plan, tags = f"model={model.kind}", policy.plan, ", ".join(model.tags)
    if isinstance(policy, Names | Offload) and not plan.names | plan.offload:
        key = "remat.save" if isinstance(policy, Names) else "remat.offload"
        there = f"{what} tags {tags}" if tags else "those your model tags"
        raise ValueError(f"{key}: no value is named; name at least one ({there})")
    # What a model of the user's own has is seen only when it is built and traced.
    if model.kind == "external":
        return
    if policy.block is not None:
        raise ValueError(
            f"remat.block={policy.block} is for a model that does not say what its blocks are; {what} does: "
            "leave it out"
        )
    if unknown := sorted(plan.scopes - set(model.scopes)):
        raise ValueError(
            f"remat={policy.kind} recomputes the scope '{unknown[0]}', which {what} does not declare "
            f"(it has: {', '.join(model.scopes)}); choose another remat"
        )
    if unknown := sorted((plan.names | plan.offload) - set(model.tags)):
        near = suggest_word(unknown[0], list(model.tags)) or f" (it has: {tags})"
        raise ValueError(f"remat={policy.kind}: {what} tags no value '{unknown[0]}'{near}")
