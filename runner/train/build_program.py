"""Build the parts of a run from a program of the user's own, in the place of model, objective and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from data.sources import Sources
from data.user_target import restore_number_keys
from models.remat_plan import RematPlan
from models.user_arguments import Wanted
from models.user_program import UserProgram, make_user_program
from runner.config import user_code
from runner.config.evaluations import SamplesEvaluation
from runner.config.metric_names import list_chosen_metrics
from runner.config.program import ExternalProgram
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.mesh import find_local_rows, put_local_rows, put_whole, replicated_sharding, state_shardings
from runner.trace.trace_digest import digest_trace
from runner.train.build_steps import jit_train_step
from runner.train.built import Built, LoadedProgram
from runner.train.dataset import make_stream
from runner.train.evaluator import Evaluator
from runner.train.program_content import ProgramContent
from runner.train.program_layout import REST, WEIGHTS, join_name, name_path
from runner.train.program_steps import make_program_eval, make_program_init, make_program_step
from runner.train.rehearse_program import (
    BornState,
    asks_host,
    compare_two_calls,
    look_at_init,
    rehearse_function,
    settle_numbers,
)
from runner.train.step import TrainStep, is_finite, make_key
from runner.types import Batch, State, Tree


def build_program(config: Config, sources: Sources, devices: Sequence[jax.Device] | None = None) -> Built:
    """Put the parts together, for the devices of this machine unless others are given.

    Nothing is compiled, and no array is allocated, but where `init` reads values or a step asks the host for some.

    Raises ConfigError where the program is not what a run can work with.
    """
    option = config.program
    assert isinstance(option, ExternalProgram)
    has_data = config.data.kind != "none"
    mesh = config.mesh.build(config.data.batch_size if has_data else None, devices=devices)
    # Without data a batch is its number alone, one row that every device holds: so does every process.
    rows = find_local_rows(mesh, config.data.batch_size) if has_data else slice(0, 1)
    stream = make_stream(config.data, sources, config.seed, rows=rows)
    key = make_key(config.seed)
    example = sources.train.take(np.zeros(1, np.int64)) if has_data else None
    wanted = Wanted(
        sources.inputs if has_data else None, sources.num_outputs, num_steps=config.train.num_steps, part="program"
    )
    with user_code.as_config_error("program", option.target):
        program = make_user_program(option.target, restore_number_keys(option.options), wanted)
        born = look_at_init(program, key, example)
        batch = _describe_batch(config, sources)
        born = replace(born, layout=settle_numbers(program, born, batch if has_data else None, key))
    layout = born.layout
    init, abstract = _lay_out_init(program, born, key, example, partial(state_shardings, mesh))
    step = make_program_step(program, layout, has_data=has_data)
    evaluate = make_program_eval(program, layout, has_data=has_data)
    content = ProgramContent(program, layout, sources, config.seed)

    put = partial(put_local_rows, mesh, config.data.batch_size) if has_data else partial(put_whole, mesh)

    def first_arguments() -> tuple[Tree, ...]:
        indices = np.arange(config.data.batch_size)[rows] % len(sources.train)
        return init(), put(sources.train.take(indices)), jnp.zeros(())

    evaluator = Evaluator(
        config.eval,
        sources,
        content,
        put,
        config.data.batch_size,
        config.train.eval_batches,
        config.seed,
        list_chosen_metrics(config),
        rows=rows,
    )
    evaluator.check_content()
    with user_code.as_config_error("program", option.target):
        measures, traced = _rehearse(program, (step, evaluate), abstract, batch, first_arguments)
        if any(isinstance(each, SamplesEvaluation) for each in config.eval.values()):
            content.check_samples(abstract)
    return Built(
        sources=sources,
        stream=stream,
        beginning=stream.state(),
        mesh=mesh,
        init=init,
        abstract=abstract,
        loss=_refuse_loss,
        train_step=TrainStep(jit_train_step(step, abstract), 0.0, replicated_sharding(mesh)),
        eval_step=jax.jit(evaluate),
        model=lambda state: LoadedProgram(program.made, layout.unpack(state)),
        evaluator=evaluator,
        put=put,
        plan=RematPlan(),
        measures=measures,
        traced=traced,
    )


def _lay_out_init(
    program: UserProgram,
    born: BornState,
    key: jax.Array,
    example: Batch | None,
    shardings: Callable[[State], Tree],
) -> tuple[Callable[[], State], State]:
    """Return a function that makes the fresh state where it belongs, and the abstract state."""
    fresh = make_program_init(program, born.layout)
    layout = born.layout

    def shape() -> State:
        tree = jax.tree.unflatten(layout.structure, [jnp.zeros(kind.shape, kind.dtype) for kind in layout.kinds])
        return {"step": jnp.zeros((), jnp.int32), "rng": key, **layout.pack(tree, "init")}

    shapes = jax.eval_shape(shape)
    where = shardings(shapes)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, where
    )
    traced = jax.jit(fresh, out_shardings=where)

    def run_init() -> State:
        if born.is_traceable:
            state = traced(key, example)
        else:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                # Copies: an array that is in the state twice could not be given to the step twice.
                state = jax.device_put(jax.tree.map(jnp.copy, fresh(key, example)), where)
        _refuse_nan(program, state)
        return state

    return run_init, abstract


def _refuse_nan(program: UserProgram, state: State) -> None:
    """Raise ConfigError where a fresh state holds NaN: it would count as one that has diverged, and never be saved."""
    # Compiled: on several hosts nobody holds all of an array.
    if not jax.jit(is_finite)(state):
        sections = {name: state[name] for name in (WEIGHTS, REST)}
        names = [
            join_name(name_path(path)[1:])
            for path, leaf in jax.tree_util.tree_leaves_with_path(sections)
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and jax.jit(lambda x: jnp.isnan(x).any())(leaf)
        ]
        raise ConfigError(
            f"program.target: {program.target}: init gave a state in which {names[0]} is NaN; expected numbers, as a "
            "state with NaN counts as diverged and is never saved; begin with 0 or jnp.inf"
        )


def _describe_batch(config: Config, sources: Sources) -> Batch:
    """Return an abstract batch, as an evaluation gives it."""
    example = sources.eval.take(np.zeros(config.data.batch_size, np.int64))
    return jax.eval_shape(lambda: jax.tree.map(jnp.asarray, dict(example)))


def _rehearse(
    program: UserProgram,
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    abstract: State,
    batch: Batch,
    first_arguments: Callable[[], tuple[Tree, ...]],
) -> tuple[tuple[str, ...], str]:
    """Return what an evaluation measures, and a digest of what a step computes.

    Raises InvalidModelOrObjective where the program does not fit.
    """
    step, evaluate = functions
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract)
    lr = jax.ShapeDtypeStruct((), jnp.float32)
    traced = rehearse_function(program, "step", step, (state, batch, lr))
    if asks_host(traced):
        compare_two_calls(program, step, first_arguments)
    if program.evaluate is None:
        return (), digest_trace(traced)
    weights = jax.ShapeDtypeStruct((len(jax.tree.leaves(batch)[0]),), jnp.float32)
    rehearse_function(program, "evaluate", evaluate, (state, batch, weights))
    return tuple(jax.eval_shape(evaluate, state, batch, weights)), digest_trace(traced)


def _refuse_loss(*arguments: Any) -> NoReturn:
    """Raise ConfigError: what is differentiated is known to the program alone."""
    raise ConfigError("program: what is recomputed is a program's own business (jax.checkpoint); choose a model")
