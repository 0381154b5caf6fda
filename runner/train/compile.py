"""The compiled programs of a run, made by threads while training has other things to wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax

from models.remat_plan import Plan
from models.scopes import active
from runner.config.remat import Names, Offload, Remat
from runner.errors import ConfigError
from runner.trace.flops import count
from runner.trace.stored import seen

if TYPE_CHECKING:
    from runner.train.built import Built

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.scopes import Misplaced
from runner.config.remat import named
from runner.config.schema import Config
from runner.config.user_code import told
from runner.mesh import batched
from runner.preempt.stop import begin
from runner.trace.requirements import Needs, held, needs_of
from runner.train import compile
from runner.train.compile_cache import Kept

if TYPE_CHECKING:
    from runner.rundir.attempts import AttemptLog
    from runner.train.built import Built

HOST_MEMORY = "S(5)"  # how a compiled program writes that an array lies there

HEAD_START_SECONDS = 1.0  # for the first step
State = dict[str, Any]
Batch = Mapping[str, Any]
EvalStep = Callable[[State, Batch, Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Programs:
    """The compiled programs of a run: each is there when its thread is done."""

    train: Future[jax.stages.Compiled]
    eval: Future[EvalStep]
    counted: Future[None]  # what a step needs is written down


def compile_all(built: Built, config: Config, remat: Remat, attempt: AttemptLog, kept: Kept) -> Programs:
    """Start to compile, in threads: the training step first, for training waits for nothing else.

    `remat`: what is recomputed in this run, also where the configuration says auto.
    """
    since = time.perf_counter()

    def compile_training() -> jax.stages.Compiled:
        program = compile_step(built, config)
        attempt.record(compile_seconds=round(time.perf_counter() - since, 3), compile_cache=str(kept))
        return program

    train = begin(compile_training, "compile")

    def compile_evaluation() -> EvalStep:
        wait([train])
        attempt.first_step.wait(HEAD_START_SECONDS)  # on few cores tracing would make training begin later
        return compile_eval(built, config)

    evaluation = begin(compile_evaluation, "compile evaluation")

    def count() -> None:
        wait([evaluation])  # which comes after training; this is only for the record
        attempt.record(needs=needed(built, config, remat, train.result()).document())

    return Programs(train, evaluation, begin(count, "count"))


def needed(built: Built, config: Config, remat: Remat, program: jax.stages.Compiled) -> Needs:
    """What the compiled train step needs. Takes milliseconds: jax still has the trace."""
    size = held(jax.tree.leaves(built.abstract), abstract_batch(built, config)[0], built.mesh.size)
    return needs_of(named(remat), trace_step(built, config), program, built.mesh, size)


def compile_eval(built: Built, config: Config) -> EvalStep:
    """The evaluation step, compiled for the shapes of this run."""
    return built.eval_step.lower(built.abstract, *abstract_batch(built, config)).compile()


def compile_step(built: Built, config: Config) -> jax.stages.Compiled:
    """The train step, compiled for the shapes of this run. Raises ConfigError where remat does not do what it says."""
    compile.refuse_at_home(config.remat, built.mesh.devices.flat[0].platform)
    traced = trace_step(built, config)
    compile.refuse_idle(config.remat, built, abstract_batch(built, config)[0])
    compiled = traced.lower().compile()
    compile.refuse_unmoved(config.remat, compiled)
    return compiled


def trace_step(built: Built, config: Config) -> jax.stages.Traced:
    """The train step, traced under the plan of this configuration. Raises ConfigError where that is not obeyed."""
    batch, _ = abstract_batch(built, config)
    remat = f"remat={config.remat.kind}"
    try:
        with active(built.plan), told("objective"):
            traced = built.train_step.trace(built.abstract, batch)
    except Misplaced as error:
        raise ConfigError(f"{remat}: {error}") from None
    found, plan = seen(traced.jaxpr.jaxpr), built.plan
    if missed := plan.scopes - found.scopes.keys():
        raise ConfigError(
            f"{remat}: model={config.model.kind} never entered the scope '{min(missed)}', "
            "so nothing would be recomputed; mark it in the model, or choose remat=none"
        )
    if unknown := sorted((plan.names | plan.offload) - found.tags):
        tags = ", ".join(sorted(found.tags)) or "none"
        raise ConfigError(f"{remat}: the model tags no value '{unknown[0]}' (it has: {tags})")
    return traced


def abstract_batch(built: Built, config: Config) -> tuple[Batch, jax.ShapeDtypeStruct]:
    """The shapes of one batch and of its weights, where they will lie."""
    examples = built.sources.eval.take(np.zeros(config.data.batch_size, np.int64))
    sharding = batched(built.mesh)
    examples["weights"] = np.zeros(config.data.batch_size, np.float32)
    abstract = {
        name: jax.ShapeDtypeStruct(value.shape, jax.dtypes.canonicalize_dtype(value.dtype), sharding=sharding)
        for name, value in examples.items()
    }
    return abstract, abstract.pop("weights")


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
