"""What the train step of a run needs: bytes of one device, FLOPs of all, and what of these is computed again. Values.

Two bytes are told, for neither is true everywhere: the compiler's, and what is counted in the trace. XLA on a CPU takes
apart what is recomputed where blocks follow each other in the program, and its numbers then rank policies backwards
(jax 0.10); nothing is fused where it is counted, and the working set of a block is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax

BlockLayout = Literal["loop", "scan", "unknown"]


@dataclass(frozen=True)
class CompiledMemory:
    """What the compiler says of one device, in bytes; `peak` is None where the backend does not tell."""

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    host: int
    peak: int | None
    seconds: float = 0.0  # that compiling took

    @property
    def footprint(self) -> int:
        """All that is held at once: the peak, or what is in, out and between."""
        return self.peak or self.arguments + self.outputs - self.donated + self.temporaries


@dataclass(frozen=True, kw_only=True)
class StepRequirements:
    """One compiled train step. `remat`: the policy in a word, also where the configuration says auto."""

    remat: str
    backend: str
    devices: int
    blocks: BlockLayout  # unknown where nothing is recomputed
    bytes_held: int  # bytes of the state and the batch on one device
    stored: int  # bytes that one device keeps for the backward pass, counted
    flops: int  # of a step, on all devices
    count_recomputed_flops: int  # of these
    compiled: CompiledMemory | None  # None where the backend does not tell

    @property
    def extra(self) -> float:
        """How much more is computed than without recomputation: 0.24 is 24 %."""
        own = self.flops - self.recomputed
        return self.recomputed / own if own > 0 else 0.0

    def document(self) -> dict[str, Any]:
        """As it is written down."""
        found = asdict(self)
        if self.compiled is not None:
            del found["compiled"]["seconds"]
        return found


def read_compiled_memory(program: jax.stages.Compiled, backend: str, seconds: float = 0.0) -> CompiledMemory | None:
    """What the compiler says of its program, where it says anything."""
    found = program.memory_analysis()
    if found is None:
        return None
    return CompiledMemory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        donated=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        host=found.host_temp_size_in_bytes,
        # On a CPU it is arguments and outputs alone (jax 0.10).
        peak=None if backend == "cpu" else found.peak_memory_in_bytes,
        seconds=seconds,
    )


def measure_requirements(
    remat: str, traced: jax.stages.Traced, program: jax.stages.Compiled, mesh: jax.sharding.Mesh, held: int
) -> StepRequirements:
    """Read from the trace and asked of the compiler; nothing is traced or compiled."""
    from runner.trace.flops import count_flops, count_recomputed_flops
    from runner.trace.remat_trace import count_bytes_kept_by_step, find_scopes_and_tags

    jaxpr, backend = traced.jaxpr.jaxpr, mesh.devices.flat[0].platform
    wrapped = max(find_scopes_and_tags(jaxpr).scopes.values(), default=0)
    return StepRequirements(
        remat=remat,
        backend=backend,
        devices=mesh.size,
        blocks="loop" if wrapped > 1 else "scan" if wrapped else "unknown",
        held=bytes_held,
        stored=count_bytes_kept_by_step(jaxpr).total() // mesh.size,
        flops=count_flops(jaxpr),
        recomputed=count_recomputed_flops(jaxpr),
        compiled=read_compiled_memory(program, backend),
    )


def parse_requirements(found: Any) -> StepRequirements | None:
    """What was written down; None where it is not, or torn, or of a version that wrote something else."""
    try:
        memory = found["compiled"]
        needs = StepRequirements(**{**found, "compiled": None if memory is None else CompiledMemory(**memory)})
    except (TypeError, KeyError):
        return None
    numbers = [
        getattr(needs, each.name)
        for each in fields(StepRequirements)
        if each.name not in ("remat", "backend", "blocks")
    ]
    numbers[-1:] = [] if memory is None else [value for value in memory.values() if value is not None]
    is_sound = isinstance(needs.remat, str) and all(type(number) is int and number >= 0 for number in numbers)
    return needs if is_sound else None


def is_compiler_believable(each: Iterable[StepRequirements]) -> bool:
    """Whether the compiler's bytes say which of these steps needs less: it told them, and not of a loop on a CPU."""
    steps = list(each)
    return all(step.compiled for step in steps) and not any(
        step.backend == "cpu" and step.blocks == "loop" for step in steps
    )


def bytes_at_once(step: StepRequirements, *, compiled: bool) -> int:
    """All that one device holds at once: as the compiler says, or as it was counted."""
    if compiled and step.compiled is not None:
        return step.compiled.footprint
    return step.held + step.stored


def bytes_held(state: Iterable[Any], batch: Mapping[str, Any], devices: int) -> int:
    """Bytes of the state, which each device has, and of its part of the batch."""
    return sum(map(_size, state)) + sum(map(_size, batch.values())) // devices


def _size(leaf: Any) -> int:
    return int(math.prod(leaf.shape) * leaf.dtype.itemsize)
