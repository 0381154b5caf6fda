"""Whether a remat option does anything here: a name that spares no product, or values that never leave, are refused.

jax would take both in silence: the first costs memory for nothing, the second promises memory that is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax

from models.plan import Plan
from models.scopes import active
from runner.errors import ConfigError
from runner.flops import count
from runner.remat.policy import Names, Offload, Remat
from runner.remat.seen import seen

if TYPE_CHECKING:
    from runner.build import Built

HOST_MEMORY = "S(5)"  # how a compiled program writes that an array lies there


def refuse_at_home(remat: Remat, platform: str) -> None:
    """Raises ConfigError where the memory of the device is that of the host: jax offloads nothing there."""
    if isinstance(remat, Offload) and platform == "cpu":
        kept = ",".join(dict.fromkeys(remat.offload + remat.save))
        raise ConfigError(
            f"remat=offload: on a CPU nothing is offloaded, for its memory is the host's; "
            f"choose remat=names remat.save=[{kept}]"
        )


def refuse_unmoved(remat: Remat, compiled: jax.stages.Compiled) -> None:
    """Raises ConfigError where the compiler gave no room in the host's memory to what was to wait there."""
    if not isinstance(remat, Offload):
        return
    memory = compiled.memory_analysis()
    if memory is not None and not memory.host_temp_size_in_bytes and HOST_MEMORY not in (compiled.as_text() or ""):
        raise ConfigError(
            f"remat=offload: the compiler moved nothing of {', '.join(remat.offload)} to the host's memory; "
            "choose other tags, or remat=names"
        )


def refuse_idle(remat: Remat, built: Built, batch: Mapping[str, Any]) -> None:
    """Raises ConfigError for a name without which nothing more would be recomputed. Traces once for each name."""
    if not isinstance(remat, Names | Offload):
        return
    plan, tags = built.plan, set[str]()

    def flops(plan: Plan) -> int:
        with active(plan):
            gradient = jax.value_and_grad(built.loss, has_aux=True)
            jaxpr = jax.make_jaxpr(gradient)(built.abstract["params"], built.abstract, batch).jaxpr
        tags.update(seen(jaxpr).tags)
        return count(jaxpr)

    whole = flops(plan)
    for name in sorted(plan.names | plan.offload):
        if flops(rest := _without(plan, name)) > whole:
            continue
        useful = [tag for tag in sorted(tags - plan.names - plan.offload) if flops(_with(rest, tag)) < whole]
        raise ConfigError(
            f"remat={remat.kind}: to store '{name}' spares no product{_beside(plan, name)}; leave it out"
            + (f" (these would: {', '.join(useful)})" if useful else " (no other tag would either)")
        )


def _without(plan: Plan, name: str) -> Plan:
    return replace(plan, names=plan.names - {name}, offload=plan.offload - {name})


def _with(plan: Plan, name: str) -> Plan:
    return replace(plan, names=plan.names | {name})


def _beside(plan: Plan, name: str) -> str:
    others: Iterable[str] = sorted((plan.names | plan.offload) - {name})
    return f" beside {', '.join(others)}" if others else ""
