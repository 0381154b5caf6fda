"""Try a user's own program on abstract values, before anything is compiled: what does not fit is one line.

Each function is traced twice, as two processes would trace it: a run that goes on in another process is exact only
where both traces are the same. What is asked of the host while a step runs shows in no trace: then two steps are
computed and compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import UnexpectedTracerError
from jax.extend.core import ClosedJaxpr

from models import InvalidModelOrObjective
from models.objectives import describe_value
from models.user_program import UserProgram
from runner.trace.remat_trace import iterate_equations
from runner.trace.trace_digest import digest_trace
from runner.train.program_layout import ProgramLayout, lay_out
from runner.train.split_model import READS_VALUES
from runner.types import Batch, Tree

# Operations that ask the host for values; one that only prints gives none back.
ASKS_HOST = ("pure_callback", "io_callback")
WAY_OUT = (
    "what it computes must follow from its arguments alone: draw from its key, keep what changes in the state, read no "
    "clock, no file and no global"
)


@dataclass(frozen=True)
class BornState:
    """What `init` gives: the layout of the state, and whether it can be traced; else it runs as it is written.

    `numbers` are the positions of what it gives as numbers of Python's, whose type gives way (jax: weak type).
    """

    layout: ProgramLayout
    is_traceable: bool
    numbers: frozenset[int]


def look_at_init(program: UserProgram, key: jax.Array, example: Batch | None) -> BornState:
    """Return what a program's state is, without allocating it where `init` can be traced.

    Raises InvalidModelOrObjective where it is no state, or another one each time.
    """
    found: list[Tree] = []

    def begin(key: jax.Array, example: Batch | None) -> Tree:
        tree = program.init(key, example)
        lay_out(tree, program.weights)
        found.append(tree)
        return jax.tree.leaves(tree)

    try:
        first = jax.make_jaxpr(begin)(key, example)
    except READS_VALUES:
        # It reads a number that a trace does not have.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            begin(key, example)
        return BornState(lay_out(found[-1], program.weights), is_traceable=False, numbers=_find_numbers(found[-1]))
    second = jax.make_jaxpr(_forget(begin))(key, example)
    if digest_trace(first) != digest_trace(second):
        raise InvalidModelOrObjective(f"{program.target}: init is not pure, two calls differ: {WAY_OUT}")
    # Of the first trace: its tracers are dead, but shapes and structure are those of the state.
    layout = lay_out(_as_abstract(found[0]), program.weights)
    return BornState(layout, is_traceable=True, numbers=_find_numbers(found[0]))


def settle_numbers(program: UserProgram, born: BornState, batch: Batch | None, key: jax.Array) -> ProgramLayout:
    """Return the layout of a program's state in which numbers of `init` have the type that a step gives them.

    A return of 0 to which a step adds a reward of 0.5 is a fraction: so it is in a loop of Python's and in
    `jax.lax.scan`. `batch` is abstract. What is wrong with the step is told by who rehearses it.
    """
    layout = born.layout
    while len(layout.promoted) < len(born.numbers):
        leaves = [
            jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=place in born.numbers - layout.promoted)
            for place, kind in enumerate(layout.kinds)
        ]
        try:
            given, _ = jax.eval_shape(program.step, jax.tree.unflatten(layout.structure, leaves), batch, key)
            after, structure = jax.tree.flatten(given)
        except Exception:  # a step that cannot be traced is rehearsed next, and its error is told there
            return layout
        if structure != layout.structure:
            return layout
        new = {
            place: after[place].dtype
            for place in born.numbers - layout.promoted
            if after[place].dtype == jnp.promote_types(layout.kinds[place].dtype, after[place].dtype)
            and after[place].dtype != layout.kinds[place].dtype
        }
        if not new:
            return layout
        kinds = [jax.ShapeDtypeStruct(kind.shape, new.get(i, kind.dtype)) for i, kind in enumerate(layout.kinds)]
        layout = replace(layout, kinds=tuple(kinds), promoted=layout.promoted | new.keys())
    return layout


def rehearse_function(
    program: UserProgram, name: str, function: Callable[..., Any], arguments: tuple[Tree, ...]
) -> ClosedJaxpr:
    """Trace the function of this name of a program, as a run calls it, twice. `arguments` are abstract.

    Raises InvalidModelOrObjective where it gives what a run cannot work with, or something else in another process.
    """
    try:
        first = jax.make_jaxpr(function)(*arguments)
        second = jax.make_jaxpr(_forget(function))(*arguments)
    except UnexpectedTracerError:
        raise InvalidModelOrObjective(
            f"{program.target}: {name} is not pure, it keeps a value of an earlier call; {WAY_OUT}"
        ) from None
    except READS_VALUES as error:
        raise InvalidModelOrObjective(
            f"{program.target}: {name} reads the value of an array while it is traced ({_first_line(error)}); use "
            "jnp.where, jax.lax.cond or jax.lax.scan"
        ) from None
    if digest_trace(first) != digest_trace(second):
        raise InvalidModelOrObjective(f"{program.target}: {name} is not pure, two calls differ: {WAY_OUT}")
    # What an earlier trace left behind has no value: jax notices that when the step is called, and not before.
    if any(isinstance(constant, jax.core.Tracer) for constant in _list_constants(second)):
        raise InvalidModelOrObjective(
            f"{program.target}: {name} uses an array that init or another function has kept outside of the state (on "
            "self?); return it in the state, or make it where the object is made"
        )
    return first


def _list_constants(traced: ClosedJaxpr) -> list[Any]:
    inner = [
        each
        for equation in iterate_equations(traced.jaxpr)
        for value in equation.params.values()
        for each in (value if isinstance(value, tuple | list) else (value,))
        if isinstance(each, ClosedJaxpr)
    ]
    return [constant for each in (traced, *inner) for constant in each.consts]


def asks_host(traced: ClosedJaxpr) -> bool:
    """Return whether a traced function asks the host for values while it runs."""
    return any(equation.primitive.name in ASKS_HOST for equation in iterate_equations(traced.jaxpr))


def compare_two_calls(program: UserProgram, step: Callable[..., Any], make_arguments: Callable[[], Any]) -> None:
    """Compute a function twice and compare every bit. `make_arguments` makes them anew for each call.

    Raises InvalidModelOrObjective where they differ.
    """
    jitted = jax.jit(step)
    first, second = ([_as_bytes(leaf) for leaf in jax.tree.leaves(jitted(*make_arguments()))] for _ in range(2))
    if first != second:
        raise InvalidModelOrObjective(
            f"{program.target}: what the host is asked for in step differs from call to call; {WAY_OUT}"
        )


def _as_bytes(leaf: jax.Array) -> bytes:
    words = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(words).tobytes()


def _forget(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is traced anew: what jax remembers of the user's jitted functions is forgotten."""
    jax.clear_caches()

    def traced_again(*arguments: Any) -> Any:
        return function(*arguments)

    return traced_again


def _as_abstract(tree: Tree) -> Tree:
    """Return a tree with shapes and types in the place of its arrays; a number of Python's stays as it is."""

    def describe(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if is_key else jax.dtypes.canonicalize_dtype(leaf.dtype))

    return jax.tree.map(describe, tree)


def _find_numbers(tree: Tree) -> frozenset[int]:
    leaves = jax.tree.leaves(tree)
    return frozenset(
        place
        for place, leaf in enumerate(leaves)
        if getattr(
            leaf, "weak_type", isinstance(leaf, int | float | complex) and not isinstance(leaf, bool | np.generic)
        )
    )


def _first_line(error: Exception) -> str:
    return inspect.cleandoc(str(error)).partition("\n")[0][:120]


def check_pictures(program: UserProgram, made: Any) -> None:
    """Raise InvalidModelOrObjective where what `sample` gives, real or abstract, is no batch of pictures."""
    shape = getattr(made, "shape", None)
    if shape is None or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        shown = describe_value(made) if shape is None else f"an array of shape {tuple(shape)}"
        raise InvalidModelOrObjective(
            f"{program.target}: sample gave {shown}; expected pictures (count, height, width) or (count, height, "
            "width, 1 or 3), with values from 0 to 1"
        )
