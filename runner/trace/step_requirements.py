"""What the train step of a run needs: bytes on one device, FLOPs on all, and what of these is computed again.

Memory is told twice, as the compiler says and as it is counted in the trace, for neither is true everywhere. Where
blocks follow each other in the program, XLA on a CPU takes apart what is recomputed, and its numbers then rank policies
backwards (jax 0.10). What is counted knows no fusion, and the working set of a block is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from runner.mesh import batch_share

if TYPE_CHECKING:
    import jax

# How the blocks of a model follow each other in its program; unknown where nothing is recomputed.
BlockLayout = Literal["loop", "scan", "unknown"]
# More bytes or FLOPs than this no step needs: what says so was not written here.
MOST = 1 << 80


class AnalysedProgram(Protocol):
    """A compiled program that says what memory it takes."""

    def memory_analysis(self) -> Any:
        """Return what the compiler says of its memory; None where it says nothing."""


@dataclass(frozen=True)
class CompiledMemory:
    """What the compiler says a program needs on one device, in bytes.

    Attributes:
        arguments: What goes in.
        outputs: What comes out.
        donated: The outputs that take the place of arguments.
        temporaries: What is there only in between.
        host: Temporaries in the host's memory.
        peak: The most at one time; None where the backend does not tell.
        seconds: The time that compiling took.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    host: int
    peak: int | None
    seconds: float = 0.0

    @property
    def footprint(self) -> int:
        """The bytes that are held at once: the peak, or the sum of what is in, out and between."""
        return self.peak or self.arguments + self.outputs - self.donated + self.temporaries


@dataclass(frozen=True, kw_only=True)
class StepRequirements:
    """What one compiled train step needs. Its fields are what attempts.jsonl keeps under `needs`.

    Attributes:
        remat: The policy in a word, also where the configuration says auto.
        backend: The platform of the devices: "cpu", "gpu", "tpu".
        devices: How many devices the mesh has.
        blocks: How the recomputed blocks follow each other.
        held: Bytes of the state and the batch on one device.
        stored: Bytes that one device keeps for the backward pass, counted in the trace.
        flops: FLOPs of a step, on all devices.
        recomputed: Those of them that are done again.
        compiled: What the compiler says; None where the backend does not tell.
    """

    remat: str
    backend: str
    devices: int
    blocks: BlockLayout
    held: int
    stored: int
    flops: int
    recomputed: int
    compiled: CompiledMemory | None

    @property
    def extra(self) -> float:
        """The FLOPs that are done again, as a part of all others: 0.24 is 24 %."""
        own = self.flops - self.recomputed
        return self.recomputed / own if own > 0 else 0.0

    def document(self) -> dict[str, Any]:
        """Return it as plain JSON values, as it is written down."""
        found = asdict(self)
        # How long it took to compile differs from attempt to attempt and is recorded elsewhere.
        if self.compiled is not None:
            del found["compiled"]["seconds"]
        return found


def read_compiled_memory(program: AnalysedProgram, backend: str, seconds: float = 0.0) -> CompiledMemory | None:
    """Return what the compiler says of its program's memory, or None where it says nothing."""
    found = program.memory_analysis()
    if found is None:
        return None
    return CompiledMemory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        donated=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        host=found.host_temp_size_in_bytes,
        # On a CPU the peak is that of arguments and outputs alone (jax 0.10).
        peak=None if backend == "cpu" else found.peak_memory_in_bytes,
        seconds=seconds,
    )


def measure_requirements(
    remat: str, traced: jax.stages.Traced, program: AnalysedProgram, mesh: jax.sharding.Mesh, held: int
) -> StepRequirements:
    """Return what a train step needs, read from its trace and asked of the compiler; nothing is traced or compiled.

    `held` is the bytes of the state and the batch on one device.
    """
    # These import jax, and this module is read where runs are only looked at.
    from runner.trace.flops import count_flops, count_recomputed_flops
    from runner.trace.remat_trace import count_bytes_kept_by_step, find_scopes_and_tags

    jaxpr, backend = traced.jaxpr.jaxpr, mesh.devices.flat[0].platform
    # In a loop each block is wrapped by itself; the body of a scan is there once.
    wrapped = max(find_scopes_and_tags(jaxpr).scopes.values(), default=0)
    return StepRequirements(
        remat=remat,
        backend=backend,
        devices=mesh.size,
        blocks="loop" if wrapped > 1 else "scan" if wrapped else "unknown",
        held=held,
        stored=batch_share(mesh, count_bytes_kept_by_step(jaxpr).total()),
        flops=count_flops(jaxpr),
        recomputed=count_recomputed_flops(jaxpr),
        compiled=read_compiled_memory(program, backend),
    )


def parse_requirements(found: Any) -> StepRequirements | None:
    """Return what StepRequirements.document wrote; None where it is absent, torn, or of a version with other fields."""
    try:
        memory = found["compiled"]
        needs = StepRequirements(**{**found, "compiled": None if memory is None else CompiledMemory(**memory)})
    except (TypeError, KeyError):
        return None
    texts = ("remat", "backend", "blocks", "compiled")
    numbers = [getattr(needs, each.name) for each in fields(StepRequirements) if each.name not in texts]
    numbers += [] if memory is None else [value for value in memory.values() if value is not None]
    are_counts = all(type(number) is int and 0 <= number < MOST for number in numbers)
    is_sound = (
        isinstance(needs.remat, str)
        and isinstance(needs.backend, str)
        and needs.blocks in get_args(BlockLayout)
        and are_counts
    )
    return needs if is_sound else None


def is_compiler_believable(each: Iterable[StepRequirements]) -> bool:
    """Return whether the compiler's bytes rank these steps: it told them all, and of no loop of blocks on a CPU."""
    steps = list(each)
    return all(step.compiled for step in steps) and not any(
        step.backend == "cpu" and step.blocks == "loop" for step in steps
    )


def bytes_at_once(step: StepRequirements, *, compiled: bool) -> int:
    """Return the bytes that one device holds at once, as counted; with `compiled` as the compiler says, if it does."""
    if compiled and step.compiled is not None:
        return step.compiled.footprint
    return step.held + step.stored
