"""Survey the remat policies for one model and batch: trace each, compile it, time it; measure tags and other ways."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax

from data.sources import Sources
from runner.config.remat_policies import (
    AutoRemat,
    Dots,
    EverythingSaveable,
    Full,
    Names,
    NoRemat,
    RematPolicy,
    format_policy,
)
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.remat.candidates import Candidate, compile_candidate, list_fixed_policies, trace_candidate
from runner.remat.cost_table import Alternative, PolicyCosts, SurveyReport, SurveySetting, TagWorth
from runner.remat.step_times import Step, describe_no_room, time_steps
from runner.trace.step_requirements import BlockLayout
from runner.train.built import describe_run
from runner.train.compile import refuse_not_offloaded, refuse_offload_on_cpu
from runner.values import Say

NOT_DECLARED = "the model does not declare what they recompute"

# The number of loss chunks that is suggested where a model has that option and does not use it.
LOSS_CHUNKS = 8


@dataclass(frozen=True)
class SurveyRequest:
    """What to measure.

    Attributes:
        compiles: Whether to compile; else everything is only counted in the traces.
        rounds: How many steps to time with each policy.
        whole: Whether to survey `everything_saveable` as well, which only shows what barriers cost.
        budget: Bytes that a device has for a step; 0: the configuration's, or the device's.
    """

    compiles: bool = True
    rounds: int = 0
    whole: bool = False
    budget: int = 0


@dataclass(frozen=True)
class CandidateCache:
    """The policies of one configuration, each traced once; `devices` None: those of this machine."""

    config: Config
    sources: Sources
    devices: Sequence[jax.Device] | None = None
    traced: dict[RematPolicy, tuple[Candidate, float]] = field(default_factory=dict)

    def get(self, policy: RematPolicy) -> Candidate:
        """Return the traced policy. Raises ConfigError where it does not fit the model."""
        return self.get_timed(policy)[0]

    def get_timed(self, policy: RematPolicy) -> tuple[Candidate, float]:
        """Return the traced policy, and the seconds that tracing took. Raises ConfigError where it does not fit."""
        if policy not in self.traced:
            began = time.perf_counter()
            candidate = trace_candidate(self.config, policy, self.sources, self.devices)
            refuse_offload_on_cpu(policy, candidate.platform)
            self.traced[policy] = candidate, time.perf_counter() - began
        return self.traced[policy]

    def of_blocks(self, policy: RematPolicy) -> RematPolicy:
        """Return the policy for the class of blocks that the configuration names."""
        block = self.config.remat.block
        if block is None or not any(each.name == "block" for each in fields(policy)):
            return policy
        return replace(policy, block=block)  # type: ignore[arg-type]


def survey_policies(
    config: Config, sources: Sources, request: SurveyRequest, devices: Sequence[jax.Device] | None, say: Say
) -> SurveyReport:
    """Return all that is asked for, and say a line for each thing that takes a while.

    Raises ConfigError where the configuration's own policy does not fit the model.
    """
    cache = CandidateCache(config, sources, devices)
    setting, own = describe_setting(cache), configured_policy(config)
    say(setting.model)
    say(setting.line)
    refused: dict[str, str] = {}
    try:
        tags = measure_tags(cache)
    except ConfigError as error:
        tags, refused = [], {"names": _strip_policy(error)}
    policies = []
    for policy in list_policies(cache, tags, whole=request.whole):
        try:
            cache.get(policy)
            policies.append(policy)
        except ConfigError as error:
            if policy == own:
                raise
            # Policies of a scope fail for one reason, which is told once for all of them.
            refused[format_policy(policy)] = NOT_DECLARED if hasattr(policy, "scope") else _strip_policy(error)
    report = SurveyReport(
        setting,
        now=format_policy(own),
        rows=measure_policies(cache, policies, request, say),
        tags=tags,
        refused=refused,
        budget=_find_budget(cache, request.budget),
        is_auto=isinstance(config.remat, AutoRemat),
    )
    return replace(report, changes=measure_alternatives(cache, report))


def _strip_policy(error: ConfigError) -> str:
    """Return a message without the policy that it begins with."""
    return re.sub(r"^remat=\w+: ", "", str(error))


def _find_budget(cache: CandidateCache, asked: int) -> int | None:
    """Return what is asked for, or the configuration's, or a part of the device's memory; None: it does not say."""
    auto = cache.config.remat if isinstance(cache.config.remat, AutoRemat) else AutoRemat()
    if own := asked or auto.budget:
        return own
    device = cache.get(NoRemat()).built.mesh.devices.flat[0]
    # A device that is not here knows nothing of its memory, and the one that is here does not matter.
    if cache.devices is not None or not (stats := device.memory_stats()):
        return None
    return int(auto.fraction * stats["bytes_limit"])


def configured_policy(config: Config) -> RematPolicy:
    """Return the policy that a configuration has; for auto, which chooses among others, it is `none`."""
    return NoRemat() if isinstance(config.remat, AutoRemat) else config.remat


def measure_tags(cache: CandidateCache) -> list[TagWorth]:
    """Return what each tag costs and spares, those that spare nothing last.

    Raises ConfigError where no block is found.
    """
    bare = cache.get(cache.of_blocks(Full()))
    alone = [_measure_tag_alone(cache, name, bare) for name in sorted(bare.seen.tags)]
    useful = tuple(tag.name for tag in alone if tag.alone > 0)
    found = []
    for tag in alone:
        others = tuple(name for name in useful if name != tag.name)
        with_it = _count_step_flops(cache, tuple(sorted((*others, tag.name))))
        without = _count_step_flops(cache, others) if others else bare.flops
        found.append(replace(tag, last=max((without or 0) - with_it, 0) if with_it else 0))
    return sorted(found, key=lambda tag: (-tag.alone, tag.num_bytes))


def _measure_tag_alone(cache: CandidateCache, name: str, bare: Candidate) -> TagWorth:
    try:
        one = cache.get(cache.of_blocks(Names(save=(name,))))
    except ConfigError:
        # Refused, for to store it changes nothing.
        return TagWorth(name, 0, 0, 0)
    return TagWorth(name, one.stored.get(name, 0), max(bare.flops - one.flops, 0), 0)


def _count_step_flops(cache: CandidateCache, names: tuple[str, ...]) -> int | None:
    """Return the FLOPs of a step that stores these tags; None where one of them is refused."""
    try:
        return cache.get(cache.of_blocks(Names(save=names))).flops
    except ConfigError:
        return None


def list_policies(cache: CandidateCache, tags: Sequence[TagWorth], *, whole: bool) -> list[RematPolicy]:
    """Return the policies to survey: the fixed ones, the useful tags together, and what the configuration has."""
    policies = list_fixed_policies(cache.config.remat.block)
    if whole:
        policies.insert(1, cache.of_blocks(EverythingSaveable()))
    if useful := tuple(sorted(tag.name for tag in tags if tag.pays)):
        after_dots = policies.index(cache.of_blocks(Dots())) + 1
        policies.insert(after_dots, cache.of_blocks(Names(save=useful)))
    own = configured_policy(cache.config)
    return policies if format_policy(own) in map(format_policy, policies) else [*policies, own]


def measure_policies(
    cache: CandidateCache, policies: Sequence[RematPolicy], request: SurveyRequest, say: Say
) -> list[PolicyCosts]:
    """Return a row for each policy, all of which fit the model: counted, and as requested compiled and timed."""
    rows, programs = [], dict[str, Step]()
    for number, policy in enumerate(policies, 1):
        candidate, seconds = cache.get_timed(policy)
        row = PolicyCosts(
            format_policy(policy), policy, candidate.stored, candidate.counted, candidate.flops, trace_seconds=seconds
        )
        if request.compiles:
            try:
                memory, program = compile_candidate(candidate)
                refuse_not_offloaded(policy, program)
                row = replace(row, memory=memory)
                # Programs that nobody will run are not kept: each is large.
                if request.rounds:
                    programs[row.name] = candidate.built.train_step.with_lr(program)
                say(f"  {number}/{len(policies)}  {row.name}: compiled in {memory.seconds:.1f} s")
            except jax.errors.JaxRuntimeError as error:
                row = replace(row, trouble=describe_no_room(error))
                say(f"  {number}/{len(policies)}  {row.name}: {row.trouble}")
        rows.append(row)
    if not request.rounds:
        return rows
    steps = time_steps(cache.get(NoRemat()), programs, request.rounds, say)
    return [replace(row, step_seconds=tuple(steps.get(row.name, ()))) for row in rows]


def describe_setting(cache: CandidateCache) -> SurveySetting:
    """Return what is measured, and on what."""
    config, base = cache.config, cache.get(NoRemat())
    device = base.built.mesh.devices.flat[0]
    return SurveySetting(
        model=describe_run(base.built, config),
        backend=base.platform,
        device=device.device_kind,
        devices=base.built.mesh.size,
        blocks=_find_layout(cache),
        precision=config.train.precision,
        batch_size=config.data.batch_size,
        microbatches=config.train.num_splits,
        attention=getattr(config.model, "attention", None),
    )


def _find_layout(cache: CandidateCache) -> BlockLayout:
    # Only a plan for blocks leaves a trace of them.
    try:
        return "loop" if cache.get(cache.of_blocks(Full())).is_loop else "scan"
    except ConfigError:
        return "unknown"


def measure_alternatives(cache: CandidateCache, report: SurveyReport) -> list[Alternative]:
    """Return what else would need less memory, counted: parts of the batch, precision, the loss; the best policies."""
    config = replace(cache.config, remat=report.row(report.now).policy)
    found = [_measure_change(words, other, cache) for words, other in suggest_changes(config)]
    # Counted, as the changes are: numbers of the compiler are not to be compared with those.
    counted = replace(report, rows=[replace(row, memory=None, trouble="", step_seconds=()) for row in report.rows])
    now = counted.row(report.now)
    best = [row for row in counted.frontier if row.num_bytes < now.num_bytes]
    # The least change, one in the middle, and the most; of a short list they may be the same.
    picked = {row.name: row for row in (best[:1] + best[len(best) // 2 :][:1] + best[-1:])}
    policies = [Alternative(f"remat={name}", row.num_bytes, row.counted, row.flops) for name, row in picked.items()]
    return [change for change in found if change is not None] + policies


def suggest_changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield changes beside remat that may need less memory: as a user would type it, and the changed configuration."""
    train, parts = config.train, config.train.microbatches
    for times in (2, 4):
        if config.data.batch_size % (parts * times) == 0:
            smaller = replace(train, microbatches=parts * times)
            yield f"train.microbatches={parts * times}", replace(config, train=smaller)
    if train.precision == "fp32":
        yield "train.precision=bf16", replace(config, train=replace(train, precision="bf16"))
    if getattr(config.model, "loss_chunks", LOSS_CHUNKS) in (None, 0, 1):
        model: Any = config.model
        yield f"model.loss_chunks={LOSS_CHUNKS}", replace(config, model=replace(model, loss_chunks=LOSS_CHUNKS))


def _measure_change(words: str, config: Config, cache: CandidateCache) -> Alternative | None:
    """Return what a changed configuration costs; None where it does not fit the model."""
    try:
        other = trace_candidate(config, config.remat, cache.sources, cache.devices)
    except ConfigError:
        return None
    return Alternative(words, other.num_bytes, other.counted, other.flops)
