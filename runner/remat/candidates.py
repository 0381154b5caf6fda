"""Trace and compile the train step under one remat policy, and count what it costs for this model and this batch.

Counted bytes are those of the values that the backward pass finds stored. They are the same on every device, but no
compiler fuses there, and the working set of a block is not in them. The compiler's numbers are those of its device.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import Jaxpr

from data.sources import Sources
from models.scopes import use_plan
from runner.config.remat_policies import (
    AttentionCore,
    AttentionOnly,
    Dots,
    DotsNoBatch,
    EveryN,
    FfnOnly,
    Full,
    NoRemat,
    RematPolicy,
)
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.mesh import batch_share, bytes_per_device
from runner.trace.flops import count_flops
from runner.trace.remat_trace import ScopesAndTags, count_stored_bytes, find_scopes_and_tags
from runner.trace.step_requirements import CompiledMemory, read_compiled_memory
from runner.train.build import build
from runner.train.built import Built
from runner.train.compile import abstract_batch, trace_step
from runner.types import Batch, State

# How XLA begins an error that says the device has too little memory.
NO_ROOM = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Candidate:
    """The train step, traced under one policy.

    Attributes:
        policy: The policy.
        built: The parts of the run under it.
        traced: The trace, ready to be lowered.
        stored: Bytes that one device keeps for the backward pass, by tag; `""` has none.
        flops: FLOPs of a step, on all devices.
        seen: The scopes and tags in the trace.
        held: Bytes of the state and the batch on one device.
    """

    policy: RematPolicy
    built: Built
    traced: jax.stages.Traced
    stored: Mapping[str, int]
    flops: int
    seen: ScopesAndTags
    held: int

    @property
    def num_bytes(self) -> int:
        """All bytes that one device keeps for the backward pass."""
        return sum(self.stored.values())

    @property
    def counted(self) -> int:
        """Bytes of state, batch and stored values; a program needs no less unless the compiler recomputes too."""
        return self.held + self.num_bytes

    @property
    def platform(self) -> str:
        """The platform it is compiled for: `cpu`, `gpu`, `tpu`."""
        platform: str = self.built.mesh.devices.flat[0].platform
        return platform

    @property
    def is_loop(self) -> bool:
        """True if blocks follow each other in the program; under a scan they are one. Not known of `none`."""
        return max(self.seen.scopes.values(), default=0) > 1


def list_fixed_policies(block: str | None, every: Sequence[int] = (2,)) -> list[RematPolicy]:
    """Return the policies that need no names, those that usually store most first.

    `block` is the class of the blocks where the model declares none; `every` has the n of `every_n`.
    """
    return [
        NoRemat(),
        AttentionCore(),
        AttentionOnly(),
        FfnOnly(),
        *(EveryN(n=n, block=block) for n in every),
        Dots(block=block),
        DotsNoBatch(block=block),
        Full(block=block),
    ]


def trace_candidate(
    config: Config, policy: RematPolicy, sources: Sources, devices: Sequence[jax.Device] | None = None
) -> Candidate:
    """Trace the train step and its forward pass under a policy, for these devices or those of this machine.

    Raises ConfigError where the policy does not fit the model.
    """
    # The configuration itself refuses scopes and tags that its model does not declare.
    try:
        config = replace(config, remat=policy)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    built = build(config, sources, devices)
    traced = trace_step(built, config)
    jaxpr, residuals = traced.jaxpr.jaxpr, trace_residuals(built, abstract_microbatch(built, config))
    stored = count_stored_bytes(residuals, len(residuals.outvars))
    return Candidate(
        policy=policy,
        built=built,
        traced=traced,
        # Stored values grow with the batch, which the devices share.
        stored={name: batch_share(built.mesh, size) for name, size in stored.items()},
        flops=count_flops(jaxpr),
        seen=find_scopes_and_tags(jaxpr),
        held=bytes_per_device((built.abstract, abstract_batch(built, config)[0])),
    )


def compile_candidate(candidate: Candidate) -> tuple[CompiledMemory, jax.stages.Compiled]:
    """Compile the train step, and return what the compiler says of its memory with the program.

    Raises ConfigError where the compiler says nothing, and jax.errors.JaxRuntimeError where it fails (is_no_room).
    """
    began = time.perf_counter()
    program = candidate.traced.lower().compile()
    found = read_compiled_memory(program, candidate.platform, time.perf_counter() - began)
    if found is None:
        raise ConfigError(f"the compiler for {candidate.platform} does not say what a program needs; only count")
    return found, program


def measure_memory(candidate: Candidate) -> CompiledMemory:
    """Compile the train step, and return what the compiler says of its memory."""
    return compile_candidate(candidate)[0]


def is_no_room(error: Exception) -> bool:
    """Return whether an error of the compiler or the device says that there is too little memory."""
    return NO_ROOM in str(error)


def trace_residuals(built: Built, batch: Batch) -> Jaxpr:
    """Return the jaxpr of the forward pass on a batch; its outputs are all that is kept for the backward pass."""

    def compute_residuals(state: State, batch: Batch) -> list[Any]:
        # The function that vjp returns is a pytree, whose leaves are the stored values (jax: residuals).
        _, pull_back, _ = jax.vjp(lambda params: built.loss(params, state, batch), state["params"], has_aux=True)
        return jax.tree.leaves(pull_back)

    with use_plan(built.plan):
        jaxpr: Jaxpr = jax.make_jaxpr(compute_residuals)(built.abstract, batch).jaxpr
    return jaxpr


def abstract_microbatch(built: Built, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what goes through the model at once."""
    parts = config.train.num_splits
    return {
        name: jax.ShapeDtypeStruct((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in abstract_batch(built, config)[0].items()
    }
