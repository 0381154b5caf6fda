"""Every option of remat that a model can be given: traced, compiled and timed; its tags; and what else there is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax

from data.sources import Sources
from runner.config.remat_policies import (
    AttentionCore,
    AttentionOnly,
    AutoRemat,
    Dots,
    DotsNoBatch,
    EveryN,
    EverythingSaveable,
    FfnOnly,
    Full,
    Names,
    NoRemat,
    RematPolicy,
    format_policy,
)
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.remat.candidates import Candidate, compile_candidate, trace_candidate
from runner.remat.cost_table import Alternative, PolicyCosts, SurveyReport, SurveySetting, TagWorth
from runner.train import compile
from runner.train.built import describe_run

NOT_DECLARED = "the model does not declare what they recompute"
NO_ROOM = "RESOURCE_EXHAUSTED"
LOSS_CHUNKS = 8
SIGN_OF_LIFE_SECONDS = 5.0
Tell = Callable[[str], None]


@dataclass(frozen=True)
class SurveyRequest:
    """`rounds`: so many steps with each are timed; `whole`: the whole menu; `budget`: in bytes, 0 for the device's."""

    compiles: bool = True
    rounds: int = 0
    whole: bool = False
    budget: int = 0


@dataclass(frozen=True)
class CandidateCache:
    """Traces options of one configuration, each once."""

    config: Config
    sources: Sources
    devices: Sequence[jax.Device] | None = None
    found: dict[RematPolicy, tuple[Candidate, float]] = field(default_factory=dict)

    def __call__(self, option: RematPolicy) -> Candidate:
        """Raises ConfigError where the option does not fit the model."""
        return self.timed(option)[0]

    def timed(self, option: RematPolicy) -> tuple[Candidate, float]:
        """With the seconds that it took."""
        if option not in self.found:
            began = time.perf_counter()
            traced = trace_candidate(self.config, option, self.sources, self.devices)
            compile.refuse_offload_on_cpu(option, traced.platform)
            self.found[option] = traced, time.perf_counter() - began
        return self.found[option]

    def of_blocks(self, option: RematPolicy) -> RematPolicy:
        """The option for the blocks that the configuration names."""
        block = self.config.remat.block
        if block is None or not any(each.name == "block" for each in fields(option)):
            return option
        return replace(option, block=block)  # type: ignore[arg-type]


def survey_policies(
    config: Config, sources: Sources, asked: SurveyRequest, devices: Sequence[jax.Device] | None, tell: Tell
) -> SurveyReport:
    """Everything there is to know, with a line for each thing that takes a while."""
    trace = CandidateCache(config, sources, devices)
    where, mine = describe_setting(trace), configured_policy(config)
    tell(where.model)
    tell(where.line)
    refused: dict[str, str] = {}
    try:
        found = measure_tags(trace)
    except ConfigError as error:
        found, refused = [], {"names": _why(error)}
    options = []
    for option in list_policies(trace, found, whole=asked.whole):
        try:
            trace(option)
            options.append(option)
        except ConfigError as error:
            if option == mine:
                raise
            refused[format_policy(option)] = NOT_DECLARED if hasattr(option, "scope") else _why(error)
    done = list(measure_policies(trace, options, asked, tell))
    budget, is_auto = _budget(trace, asked.budget), isinstance(config.remat, AutoRemat)
    report = SurveyReport(where, format_policy(mine), done, found, refused=refused, budget=budget, is_auto=is_auto)
    return replace(report, changes=measure_alternatives(trace, report))


def _why(error: ConfigError) -> str:
    """Without the option that it is about."""
    return re.sub(r"^remat=\w+: ", "", str(error))


def _budget(trace: CandidateCache, asked: int) -> int | None:
    """What is asked for, or the configuration's, or a part of the memory that the device has; None: it does not say."""
    auto = trace.config.remat if isinstance(trace.config.remat, AutoRemat) else AutoRemat()
    if own := asked or auto.budget:
        return own
    device = trace(NoRemat()).built.mesh.devices.flat[0]
    if trace.devices is not None or not (stats := device.memory_stats()):
        return None
    return int(auto.fraction * stats["bytes_limit"])


def configured_policy(config: Config) -> RematPolicy:
    """The option that a configuration has; for auto, which chooses among others, none."""
    return NoRemat() if isinstance(config.remat, AutoRemat) else config.remat


def measure_tags(trace: CandidateCache) -> list[TagWorth]:
    """What each tag costs and spares, those that spare nothing last. Raises ConfigError where no block is found."""
    bare = trace(trace.of_blocks(Full()))
    alone = [_alone(trace, name, bare) for name in sorted(bare.seen.tags)]
    useful = tuple(tag.name for tag in alone if tag.alone > 0)
    found = []
    for tag in alone:
        suggest_changes = tuple(name for name in useful if name != tag.name)
        with_it = _flops(trace, tuple(sorted((*suggest_changes, tag.name))))
        without = _flops(trace, suggest_changes) if suggest_changes else bare.flops
        found.append(replace(tag, last=max((without or 0) - with_it, 0) if with_it else 0))
    return sorted(found, key=lambda tag: (-tag.alone, tag.num_bytes))


def _alone(trace: CandidateCache, name: str, bare: Candidate) -> TagWorth:
    try:
        one = trace(trace.of_blocks(Names(save=(name,))))
    except ConfigError:  # it is refused, for it changes nothing
        return TagWorth(name, 0, 0, 0)
    return TagWorth(name, one.stored.get(name, 0), max(bare.flops - one.flops, 0), 0)


def _flops(trace: CandidateCache, names: tuple[str, ...]) -> int | None:
    try:
        return trace(trace.of_blocks(Names(save=names))).flops
    except ConfigError:
        return None


def list_policies(trace: CandidateCache, found: Sequence[TagWorth], *, whole: bool) -> list[RematPolicy]:
    """What there is to choose from, and what the configuration has."""
    options: list[RematPolicy] = [NoRemat(), EverythingSaveable()] if whole else [NoRemat()]
    options += [AttentionCore(), AttentionOnly(), FfnOnly(), EveryN(), Dots()]
    if useful := tuple(sorted(tag.name for tag in found if tag.pays)):
        options.append(Names(save=useful))
    options = [trace.of_blocks(option) for option in (*options, DotsNoBatch(), Full())]
    mine = configured_policy(trace.config)
    return options if format_policy(mine) in map(format_policy, options) else [*options, mine]


def measure_policies(
    trace: CandidateCache, options: Sequence[RematPolicy], asked: SurveyRequest, tell: Tell
) -> Iterator[PolicyCosts]:
    """A row for each option that the model can be given."""
    found, programs = [], {}
    for number, option in enumerate(options, 1):
        traced, seconds = trace.timed(option)
        row = PolicyCosts(format_policy(option), option, traced.stored, traced.counted, traced.flops, seconds)
        if asked.compiles:
            try:
                memory, program = compile_candidate(traced)
                compile.refuse_not_offloaded(option, program)
                programs[row.name] = traced.built.train_step.with_lr(program)
                row = replace(row, memory=memory)
                tell(f"  {number}/{len(options)}  {row.name}: compiled in {memory.seconds:.1f} s")
            except jax.errors.JaxRuntimeError as error:
                row = replace(row, trouble=_no_room(error))
                tell(f"  {number}/{len(options)}  {row.name}: {row.trouble}")
        found.append(row)
        if asked.rounds == 0:
            programs.clear()
    steps = time_steps(trace(NoRemat()), programs, asked.rounds, tell) if asked.rounds else {}
    for row in found:
        yield replace(row, step_seconds=tuple(steps.get(row.name, ())))


def _no_room(error: Exception) -> str:
    """What the compiler says where it finds no room. Raises anything else."""
    if NO_ROOM not in str(error):
        raise error
    return "does not fit: " + str(error).splitlines()[0].partition(":")[2].strip()


def time_steps(base: Candidate, programs: dict[str, Any], rounds: int, tell: Tell) -> dict[str, list[float]]:
    """Seconds of a step of each program: in rounds, each begun by another one, after a round that does not count.

    All of them go on from one state, for it is large. One that finds no room has none from then on.
    """
    built = base.built
    batch, state = built.put(next(built.stream)), built.init()
    found: dict[str, list[float]] = {name: [] for name in programs}
    told = time.monotonic()
    for turn in range(rounds + 1):
        names = list(found)
        first = turn % max(len(names), 1)
        for name in (*names[first:], *names[:first]):
            began = time.perf_counter()
            try:
                state, _ = jax.block_until_ready(programs[name](state, batch))
            except jax.errors.JaxRuntimeError as error:
                tell(f"  {name}: {_no_room(error)}")
                del found[name]
                state = built.init()  # the old one was given away
                continue
            if turn:
                found[name].append(time.perf_counter() - began)
        if time.monotonic() > told + SIGN_OF_LIFE_SECONDS:
            told = time.monotonic()
            tell(f"  {turn}/{rounds} steps with each")
    return found


def describe_setting(trace: CandidateCache) -> SurveySetting:
    """What is measured, and on what."""
    config, base = trace.config, trace(NoRemat())
    device = base.built.mesh.devices.flat[0]
    return SurveySetting(
        model=describe_run(base.built, config),
        backend=base.platform,
        device=device.device_kind,
        devices=base.built.mesh.size,
        blocks=_blocks(trace),
        precision=config.train.precision,
        batch_size=config.data.batch_size,
        microbatches=config.train.microbatches,
        attention=getattr(config.model, "attention", None),
    )


def _blocks(trace: CandidateCache) -> Any:
    try:
        return "loop" if trace(trace.of_blocks(Full())).is_loop else "scan"
    except ConfigError:
        return "unknown"


def measure_alternatives(trace: CandidateCache, report: SurveyReport) -> list[Alternative]:
    """What else would need less memory, counted: parts of the batch, precision, the loss; and the best options."""
    config = replace(trace.config, remat=report.row(report.now).option)
    found = [_change(words, other, trace) for words, other in suggest_changes(config)]
    counted = replace(report, rows=[replace(row, memory=None, trouble="", step_seconds=()) for row in report.rows])
    now = counted.row(report.now)
    best = [row for row in counted.frontier if row.num_bytes < now.num_bytes]
    picked = {row.name: row for row in (best[:1] + best[len(best) // 2 :][:1] + best[-1:])}
    cheapest = [Alternative(f"remat={name}", row.num_bytes, row.counted, row.flops) for name, row in picked.items()]
    return [change for change in found if change is not None] + cheapest


def suggest_changes(config: Config) -> Iterator[tuple[str, Config]]:
    """What else may need less memory, as a user would type it."""
    train, parts = config.train, config.train.microbatches
    for times in (2, 4):
        if config.data.batch_size % (parts * times) == 0:
            yield (
                f"train.microbatches={parts * times}",
                replace(config, train=replace(train, microbatches=parts * times)),
            )
    if train.precision == "fp32":
        yield "train.precision=bf16", replace(config, train=replace(train, precision="bf16"))
    if getattr(config.model, "loss_chunks", LOSS_CHUNKS) in (None, 0, 1):
        model: Any = config.model
        yield f"model.loss_chunks={LOSS_CHUNKS}", replace(config, model=replace(model, loss_chunks=LOSS_CHUNKS))


def _change(words: str, config: Config, trace: CandidateCache) -> Alternative | None:
    """None where the configuration cannot be changed so."""
    try:
        other = trace_candidate(config, config.remat, trace.sources, trace.devices)
    except ConfigError:
        return None
    return Alternative(words, other.num_bytes, other.counted, other.flops)
