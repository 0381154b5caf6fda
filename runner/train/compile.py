"""Compile the programs of a run in threads, while training has other things to wait for; refuse what the trace shows.

A configuration is judged before jax starts. What only a trace or a compiler can tell is judged here: a remat policy
that recomputes nothing, a name that is not in the model, an offload that moves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from models.objectives import CONSTANTS
from models.remat_plan import RematPlan, RematPlanError
from models.scopes import use_plan
from runner.config.remat_policies import Names, Offload, RematPolicy, format_policy
from runner.config.schema import Config
from runner.config.user_code import as_config_error
from runner.errors import ConfigError
from runner.mesh import batch_sharding, bytes_per_device, replicated_sharding
from runner.preempt.stop import run_in_thread
from runner.rundir.attempt_log import AttemptLog
from runner.trace.flops import count_flops
from runner.trace.remat_trace import find_scopes_and_tags
from runner.trace.step_requirements import StepRequirements, measure_requirements
from runner.train.built import Built
from runner.train.compile_cache import CacheStats
from runner.train.parts import CompiledParts
from runner.train.parts_evaluation import PartsEvaluation
from runner.train.speed import StepWork
from runner.train.step_work import count_work, describe_batch
from runner.types import Batch, State

# How the text of a compiled program says that an array lies in the host's memory.
HOST_MEMORY = "S(5)"
# Tracing the evaluation waits so long for the first step: on few cores it would make training begin later.
HEAD_START_SECONDS = 1.0

EvalStep: TypeAlias = Callable[[State, Batch, Any], Mapping[str, Any]]
# The compiled train step: one program, or those of a step in parts.
TrainProgram: TypeAlias = jax.stages.Compiled | CompiledParts


@dataclass(frozen=True)
class CompiledPrograms:
    """The compiled programs of a run; each is there when its thread is done.

    Attributes:
        train: the train step.
        eval: the evaluation step.
        counted: what a step does; done when the attempt's record says what it needs.
    """

    train: Future[TrainProgram]
    eval: Future[EvalStep]
    counted: Future[StepWork]


def start_compiling(
    built: Built, config: Config, remat: RematPolicy, attempt: AttemptLog, cache: CacheStats
) -> CompiledPrograms:
    """Start to compile: the train step first, for training waits for nothing else.

    `remat`: what is recomputed in this run, also where the configuration says auto.
    """
    train = run_in_thread(partial(_compile_training, built, config, attempt, cache), "compile")
    evaluation = run_in_thread(partial(_compile_evaluation, built, config, attempt, train), "compile evaluation")
    counted = run_in_thread(partial(_record_requirements, built, config, remat, attempt, train, evaluation), "count")
    return CompiledPrograms(train, evaluation, counted)


def _compile_training(built: Built, config: Config, attempt: AttemptLog, cache: CacheStats) -> TrainProgram:
    since = time.perf_counter()
    program = compile_step(built, config)
    attempt.record(compile_seconds=round(time.perf_counter() - since, 3), compile_cache=str(cache))
    return program


def _compile_evaluation(built: Built, config: Config, attempt: AttemptLog, train: Future[TrainProgram]) -> EvalStep:
    wait([train])
    attempt.first_step.wait(HEAD_START_SECONDS)
    return compile_eval(built, config)


def _record_requirements(
    built: Built,
    config: Config,
    remat: RematPolicy,
    attempt: AttemptLog,
    train: Future[TrainProgram],
    evaluation: Future[EvalStep],
) -> StepWork:
    # Nobody waits for this, so it comes last. It takes milliseconds: jax still has the trace.
    wait([evaluation])
    traced = trace_step(built, config)
    attempt.record(needs=measure_step(built, config, remat, train.result()).document())
    return count_work(describe_batch(built, config), config, traced, built.mesh)


def measure_step(built: Built, config: Config, remat: RematPolicy, program: TrainProgram) -> StepRequirements:
    """Measure what the compiled train step needs. Takes milliseconds: jax still has the trace."""
    size = bytes_per_device((built.abstract, abstract_batch(built, config)[0]))
    return measure_requirements(format_policy(remat), trace_step(built, config), program, built.mesh, size)


def compile_eval(built: Built, config: Config) -> EvalStep:
    """Compile the evaluation step for the shapes of this run."""
    if isinstance(built.eval_step, PartsEvaluation):
        # Its programs are compiled when a batch comes, one for each device.
        return built.eval_step
    return built.eval_step.lower(built.abstract, *abstract_batch(built, config)).compile()


def compile_step(built: Built, config: Config) -> TrainProgram:
    """Compile the train step for the shapes of this run. Raises ConfigError where remat does not do what it says."""
    refuse_offload_on_cpu(config.remat, built.mesh.devices.flat[0].platform)
    traced = trace_step(built, config)
    refuse_useless_names(config.remat, built, abstract_batch(built, config)[0])
    batch, _ = abstract_batch(built, config)
    with use_plan(built.plan):
        compiled = built.train_step.compile(traced, built.abstract, batch)
    refuse_not_offloaded(config.remat, compiled)
    return compiled


def trace_step(built: Built, config: Config) -> jax.stages.Traced:
    """Trace the train step under the remat plan of this configuration. Raises ConfigError where it is not obeyed."""
    batch, _ = abstract_batch(built, config)
    try:
        with use_plan(built.plan), as_config_error("objective"):
            traced = built.train_step.trace(built.abstract, batch)
    except RematPlanError as error:
        raise ConfigError(f"remat={config.remat.kind}: {error}") from None
    _refuse_missed(config, built.plan, traced)
    return traced


def abstract_batch(built: Built, config: Config) -> tuple[dict[str, Any], jax.ShapeDtypeStruct]:
    """Return the shapes of one batch and of its weights, with the shardings that they will have."""
    examples = built.sources.eval.take(np.zeros(config.data.batch_size, np.int64))
    sharding = replicated_sharding(built.mesh) if config.data.kind == "none" else batch_sharding(built.mesh)
    abstract: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(value.shape, jax.dtypes.canonicalize_dtype(value.dtype), sharding=sharding)
        for name, value in examples.items()
    }
    if built.teacher is not None:
        abstract[CONSTANTS] = built.teacher.abstract
    return abstract, jax.ShapeDtypeStruct((config.data.batch_size,), jnp.float32, sharding=sharding)


def _refuse_missed(config: Config, plan: RematPlan, traced: jax.stages.Traced) -> None:
    """Raise ConfigError where the model never entered a scope, or has no value of a name, that the plan asks for."""
    found = find_scopes_and_tags(traced.jaxpr.jaxpr)
    if missed := plan.scopes - found.scopes.keys():
        raise ConfigError(
            f"remat={config.remat.kind}: model={config.model.kind} never entered the scope '{min(missed)}', "
            "so nothing would be recomputed; mark it in the model, or choose remat=none"
        )
    if unknown := sorted((plan.names | plan.offload) - found.tags):
        tags = ", ".join(sorted(found.tags)) or "none"
        raise ConfigError(f"remat={config.remat.kind}: the model tags no value '{unknown[0]}' (it has: {tags})")


def refuse_offload_on_cpu(remat: RematPolicy, platform: str) -> None:
    """Raise ConfigError where the memory of the device is that of the host: jax would offload nothing, in silence."""
    if isinstance(remat, Offload) and platform == "cpu":
        kept = ",".join(dict.fromkeys(remat.offload + remat.save))
        raise ConfigError(
            f"remat=offload: on a CPU nothing is offloaded, for its memory is the host's; "
            f"choose remat=names remat.save=[{kept}]"
        )


def refuse_not_offloaded(remat: RematPolicy, compiled: TrainProgram) -> None:
    """Raise ConfigError where the compiler gave no room in the host's memory to what was to wait there."""
    if not isinstance(remat, Offload):
        return
    memory = compiled.memory_analysis()
    if memory is not None and not memory.host_temp_size_in_bytes and HOST_MEMORY not in (compiled.as_text() or ""):
        raise ConfigError(
            f"remat=offload: the compiler moved nothing of {', '.join(remat.offload)} to the host's memory; "
            "choose other tags, or remat=names"
        )


def refuse_useless_names(remat: RematPolicy, built: Built, batch: Mapping[str, Any]) -> None:
    """Raise ConfigError for a stored name without which nothing more would be recomputed: memory for nothing.

    Traces the gradient once for each name.
    """
    if not isinstance(remat, Names | Offload):
        return
    plan, tags = built.plan, set[str]()

    def gradient_flops(plan: RematPlan) -> int:
        with use_plan(plan):
            gradient = jax.value_and_grad(built.loss, has_aux=True)
            jaxpr = jax.make_jaxpr(gradient)(built.abstract["params"], built.abstract, batch).jaxpr
        tags.update(find_scopes_and_tags(jaxpr).tags)
        return count_flops(jaxpr)

    whole = gradient_flops(plan)
    for name in sorted(plan.names | plan.offload):
        rest = replace(plan, names=plan.names - {name}, offload=plan.offload - {name})
        if gradient_flops(rest) > whole:
            continue
        useful = [
            tag
            for tag in sorted(tags - plan.names - plan.offload)
            if gradient_flops(replace(rest, names=rest.names | {tag})) < whole
        ]
        others = sorted((plan.names | plan.offload) - {name})
        raise ConfigError(
            f"remat={remat.kind}: to store '{name}' spares no product"
            + (f" beside {', '.join(others)}" if others else "")
            + "; leave it out"
            + (f" (these would: {', '.join(useful)})" if useful else " (no other tag would either)")
        )
