"""What a remat option costs, for this model and this batch: counted in the trace, and told by the compiler.

Counted bytes are those of the values that the backward pass finds stored: the same on every device, but no compiler
fuses there, and the working set of a block is not in them. The compiler's numbers are those of its device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax

from data.sources import Sources
from models.scopes import use_plan
from runner.config.remat_policies import RematPolicy
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.trace.flops import count_flops
from runner.trace.remat_trace import ScopesAndTags, count_stored_bytes, find_scopes_and_tags
from runner.trace.step_requirements import CompiledMemory, bytes_held, read_compiled_memory
from runner.train.build import build
from runner.train.compile import abstract_batch, trace_step

if TYPE_CHECKING:
    from runner.train.built import Built


@dataclass(frozen=True)
class Candidate:
    """An option, traced. `stored`: bytes that one device keeps for the backward pass, by tag (`""`: what has none)."""

    option: RematPolicy
    built: Built
    traced: jax.stages.Traced
    count_stored_bytes: Mapping[str, int]
    flops: int
    find_scopes_and_tags: ScopesAndTags
    bytes_held: int  # bytes of the state and the batch on one device

    @property
    def num_bytes(self) -> int:
        """Everything stored."""
        return sum(self.stored.values())

    @property
    def counted(self) -> int:
        """State, batch and what is stored: less is only enough where the compiler itself computes something again."""
        return self.held + self.num_bytes

    @property
    def platform(self) -> str:
        """What it is compiled for: `cpu`, `gpu`, `tpu`."""
        platform: str = self.built.mesh.devices.flat[0].platform
        return platform

    @property
    def is_loop(self) -> bool:
        """Blocks follow each other in the text of the program; under a scan they are one. Not known of `none`."""
        return max(self.seen.scopes.values(), default=0) > 1


def trace_candidate(
    config: Config, option: RematPolicy, sources: Sources, devices: Sequence[jax.Device] | None = None
) -> Candidate:
    """Trace the train step and its forward pass, for these devices or those of this machine.

    Raises ConfigError where the option does not fit the model.
    """
    try:
        config = replace(config, remat=option)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    built = build(config, sources, devices)
    traced = trace_step(built, config)
    jaxpr, parts = traced.jaxpr.jaxpr, built.mesh.size
    kept = {name: size // parts for name, size in _stored(built, config).items()}
    size = bytes_held(jax.tree.leaves(built.abstract), abstract_batch(built, config)[0], parts)
    return Candidate(option, built, traced, kept, count_flops(jaxpr), find_scopes_and_tags(jaxpr), size)


def read_memory(candidate: Candidate) -> CompiledMemory:
    """Compile it, and ask."""
    return compile_candidate(trace_candidate)[0]


def compile_candidate(candidate: Candidate) -> tuple[CompiledMemory, jax.stages.Compiled]:
    """Compile it, and ask; with the program."""
    began = time.perf_counter()
    program = trace_candidate.traced.lower().compile()
    found = read_compiled_memory(program, trace_candidate.platform, time.perf_counter() - began)
    if found is None:
        raise ConfigError(f"the compiler for {trace_candidate.platform} does not say what a program needs; only count")
    return found, program


def _stored(built: Built, config: Config) -> Mapping[str, int]:
    """What the forward pass on one microbatch keeps, by tag."""

    def kept(state: Any, batch: Any) -> list[Any]:
        _, pull, _ = jax.vjp(lambda params: built.loss(params, state, batch), state["params"], has_aux=True)
        return jax.tree.leaves(pull)

    with use_plan(built.plan):
        traced = jax.make_jaxpr(kept)(built.abstract, abstract_microbatch(built, config)).jaxpr
    return count_stored_bytes(traced, len(traced.outvars))


def abstract_microbatch(built: Built, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what goes through the model at once."""
    parts = config.train.microbatches
    return {
        name: jax.ShapeDtypeStruct((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in abstract_batch(built, config)[0].items()
    }
