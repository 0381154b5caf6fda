"""Config → the live objects of a run: the only file that knows every concrete class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from data.pipeline import Stream
from data.sources import Sources
from models.declared import prepare
from models.plan import Plan
from models.scopes import Misplaced
from runner import external
from runner import step as steps
from runner.checkpoint import store
from runner.checkpoint.checkpointer import Checkpointer, Policy, Saved, preflight
from runner.checkpoint.record import PROGRESS, STATE, save_seconds
from runner.checkpoint.strategy import Failures
from runner.checkpoint.transfer import Report, transfer
from runner.config import Config
from runner.dataset import advice, read, stream_of
from runner.errors import ConfigError
from runner.evaluate import Text, cadences, due
from runner.evaluate.measure import Evaluator
from runner.identity import fingerprint
from runner.ledger import Attempt, interruptions
from runner.log import Fanout, Logger, Wandb, reached
from runner.log.console import Console
from runner.log.jsonl import Jsonl, Until, cut
from runner.loop import Cadence, Parts, Reached
from runner.mesh import batched, replicated
from runner.moment import Values
from runner.preempt.ahead import Ahead
from runner.preempt.grace import Grace
from runner.preempt.watch import Watcher, begin
from runner.programs import Programs
from runner.roles import is_stacked
from runner.rundir import Run
from runner.waiting import Fed

State = steps.State


@dataclass(frozen=True)
class Built:
    """What a configuration becomes. Nothing is compiled, allocated or written yet, but the data is read."""

    sources: Sources
    stream: Stream
    beginning: Mapping[str, Any]  # the position of the data at step 0
    mesh: jax.sharding.Mesh
    init: Callable[[], State]
    abstract: State
    loss: steps.MeanLoss  # what is differentiated
    train_step: steps.Rated  # not compiled yet
    eval_step: jax.stages.Wrapped
    model: Callable[[State], nnx.Module]
    evaluator: Evaluator
    put: Callable[[Any], Any]
    plan: Plan


def build(config: Config, sources: Sources | None = None, devices: Sequence[jax.Device] | None = None) -> Built:
    """Put the parts together, for the devices of this machine unless others are given; read the data unless it is.

    Raises ConfigError where the data, the machine or what is the user's own does not fit.
    """
    external.bring(config)
    with external.told("data"):
        sources = sources or read(config.data)
    own = external.fit(config, sources.eval)
    mesh = config.mesh.build(config.data.batch_size, config.train.microbatches, devices)
    stream = stream_of(config.data, sources, config.seed)

    def make_model(key: jax.Array) -> nnx.Module:
        try:
            return config.model.build(sources.inputs, sources.num_outputs, nnx.Rngs(key))
        except ValueError as error:
            if config.model.kind == "external":
                raise  # a bug of the user's, with its traceback
            raise ConfigError(f"model={config.model.kind}: {error}") from error

    with external.told("model"):
        network = steps.take_apart(lambda: make_model(jax.random.key(config.seed)), partial(_prepared, config))
    objective = config.objective.build(own)
    update = steps.Update(config.train.precision, config.train.microbatches, config.optim.ema)

    def optimizer(lr: Any) -> tuple[Any, Any]:
        schedule = config.schedule.build(lr, config.train.steps)
        return config.optim.build(schedule), schedule

    def fresh(key: jax.Array) -> State:
        return steps.init(partial(make_model, key), optimizer(config.optim.lr)[0], ema=update.ema is not None)

    init, abstract = steps.place(fresh, config.seed, replicated(mesh))
    sharding = batched(mesh)

    def model(state: State) -> nnx.Module:
        return steps.assemble(network.eval, network, state)

    def put(batch: Any) -> Any:
        return jax.device_put(batch, sharding)

    evaluator = Evaluator(
        config.eval, sources, model, put, config.data.batch_size, config.train.eval_batches, config.seed
    )
    evaluator.admit(nnx.merge(network.eval, *network.variables))
    return Built(
        sources=sources,
        stream=stream,
        beginning=stream.state(),
        mesh=mesh,
        init=init,
        abstract=abstract,
        loss=steps.mean_loss(network, objective, update.precision),
        train_step=steps.rated(network, objective, optimizer, update, config.optim.lr, replicated(mesh)),
        eval_step=jax.jit(steps.eval_step(network, objective, update.precision)),
        model=model,
        evaluator=evaluator,
        put=put,
        plan=config.remat.plan,
    )


def _prepared(config: Config, model: nnx.Module) -> None:
    try:
        prepare(model, config.remat.plan, config.remat.block)
    except Misplaced as error:
        raise ConfigError(f"remat={config.remat.kind}: {error}") from None


def restore(built: Built, checkpoint: Path) -> State:
    """The train state of a checkpoint. Raises RefusedError where it is not one of this configuration."""
    return store.read(checkpoint, built.abstract)


def warm(built: Built, checkpoint: Path, *, partial: bool) -> tuple[State, Report]:
    """A fresh state with the weights of another run's checkpoint, and what did not fit."""
    state, report = transfer(built.init(), checkpoint, partial=partial, stacked=is_stacked)
    return steps.averaging(state) if "ema" in state else state, report


@contextmanager
def live(
    config: Config,
    built: Built,
    programs: Programs,
    run: Run,
    attempt: Attempt,
    console: Console,
    watcher: Watcher,
    start: Reached,
) -> Iterator[Parts]:
    """Everything the loop works with, open; closed in reverse, the checkpoints durable, whatever happens."""
    until = Until(start.step, start.owes)
    with ExitStack() as opened:
        opened.enter_context(closing(built.stream))  # its workers end last: a save must not wait for that
        timing = opened.enter_context(closing(_jsonl(run.timing, until, attempt.number, console)))
        truth = _jsonl(run.metrics, until, attempt.number, console)
        logger = opened.enter_context(
            closing(Fanout(truth, _mirrors(config, run, attempt, console, until), console.say))
        )
        if warning := preflight(run.checkpoints, num_bytes(built), config.retention, config.train.steps):
            console.say(warning)
        grace = Grace(watcher, config.preempt.shortest_notice, console.say, save_seconds(run.checkpoints))
        saver = opened.enter_context(closing(_checkpointer(config, run, attempt, console, timing, grace)))
        is_finite, kept = jax.jit(steps.is_finite), built.abstract.keys() & {"params", "ema", "extra"}
        waits = built.sources.waits or built.stream.waits
        data = opened.enter_context(closing(Ahead(built.stream, watcher))) if waits else built.stream
        fed = Fed(data, built.train_step.bound(programs.train.result()), console.say, advice(config.data))
        yield Parts(
            cadence=Cadence(config.train.steps, config.train.log_steps, cadences(config.eval, config.train.eval_steps)),
            train_step=fed.train,
            evaluate=partial(_evaluate, built, config, programs, run, attempt, watcher),
            is_finite=lambda state: bool(is_finite({name: state[name] for name in kept})),
            items=partial(_items, built, attempt),
            data=fed,
            epoch_steps=len(built.sources.train) / config.data.batch_size,
            saver=saver,
            last=config.ckpt.last,
            logger=logger,
            timing=timing.write,
            progress=console,
            ledger=attempt,
            time=grace,
        )


def _items(built: Built, attempt: Attempt, at: Reached, position: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds."""
    progress = {"position": position, "data": built.sources.fingerprint, "best": attempt.best}
    return {STATE: at.state, PROGRESS: {**progress, "owes_evaluation": at.owes}}


def _evaluate(
    built: Built,
    config: Config,
    programs: Programs,
    run: Run,
    attempt: Attempt,
    watcher: Watcher,
    state: State,
    step: int,
) -> dict[str, Values]:
    """The evaluations due at a step, with signs of life. A thread does them, for a stop does not wait for one."""

    def between() -> None:
        watcher.check()
        attempt.pulse.phase("eval")

    names = due(config.eval, config.train.eval_steps, step, config.train.steps)
    program = watcher.wait_for(programs.eval)
    work = partial(built.evaluator, names, state, program, run.path, f"media/{{}}/{step:08}", between)
    return watcher.wait_for(begin(work, "evaluation"))


def _jsonl(path: Path, until: Until, attempt: int, console: Console) -> Jsonl:
    """A log, cut back to the restored step: what is logged from here on comes once."""
    cut(path, until, path.with_name(f"{path.stem}.cut-{attempt}.jsonl"))
    return Jsonl(path, console.say)


def _mirrors(config: Config, run: Run, attempt: Attempt, console: Console, until: Until) -> list[Logger]:
    """The other sinks that can be had, each with every line that metrics.jsonl has."""
    mirrors: list[Logger] = [console]
    if config.log.tensorboard:
        mirrors += reached("tensorboard", partial(_tensorboard, run, attempt, until), console.say)
    if (option := config.log.wandb) is not None:
        mirrors += reached("wandb", partial(_wandb, config, option, run, attempt, console), console.say)
    return mirrors


def _tensorboard(run: Run, attempt: Attempt, until: Until) -> Logger:
    from runner.log.tensorboard import TensorBoard

    return TensorBoard(run.tensorboard, run.metrics, until, f"cut-{attempt.number}.events")


def _wandb(config: Config, option: Wandb, run: Run, attempt: Attempt, console: Console) -> Logger:
    from runner.log import wandb

    # With another learning rate, or without a batch, steps that are done again come out different.
    lineage = f"{fingerprint(config.document)} {attempt.skipped}"
    identity = wandb.Identity(option.project, option.mode, run.path.name, config.document, lineage)
    return wandb.WandbLogger(run.wandb, run.metrics, identity, console.say)


def _checkpointer(
    config: Config, run: Run, attempt: Attempt, console: Console, timing: Jsonl, grace: Grace
) -> Checkpointer:
    background, verify = config.ckpt.write == "background", config.ckpt.verify
    policy = Policy(config.ckpt.save, config.retention, config.score, background, verify)

    def told(saved: Saved) -> None:
        stall, durable = round(saved.stall_seconds, 6), round(saved.durable_seconds, 6)
        event = {"step": saved.record.step, "event": "save", "stall": stall, "durable": durable}
        grace.learn(saved.durable_seconds)
        timing.write({**event, "bytes": saved.bytes, "reason": saved.record.reason})

    failures = Failures(*interruptions(run))
    return Checkpointer(run.checkpoints, policy, store, console.say, told, failures, attempt.pulse.writing)


def showcase(built: Built, state: State) -> str | None:
    """How a language model goes on after a text it has not seen; None for a model, or data, without words."""
    model = built.model(state)
    if not built.evaluator.goes_on(model):
        return None
    ((prompt, text),) = built.evaluator.written(Text(count=1, new_tokens=240), model)
    return "".join(char if char.isprintable() or char == "\n" else "·" for char in prompt + text)  # a terminal obeys


def num_bytes(built: Built) -> int:
    """The size of one train state, in bytes."""
    return sum(store.as_leaf(leaf).num_bytes for leaf in jax.tree.leaves(built.abstract))


def describe(built: Built, config: Config) -> str:
    """One line: the model, its size, and the data."""
    count = sum(leaf.size for leaf in jax.tree.leaves(built.abstract["params"]))
    model, data = (getattr(part, "target", part.kind) for part in (config.model, config.data))
    size = f"{count / 1e6:.2f} M" if count >= 10_000 else f"{count}"
    return f"{model}, {size} parameters · {data}, {built.sources.summary}"


def hardware(built: Built) -> str:
    """The devices of the mesh: `1 × cpu`."""
    return f"{built.mesh.size} × {built.mesh.devices.flat[0].device_kind}"
