"""What a trace tells of rematerialization: which scopes it wrapped, which tags it met, what it stores under which name.

Read from jaxprs, not from a record that tracing leaves: jax reuses traces, and then nothing would be recorded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from models.scopes import ATTENTION_CONTEXT, FLASH_FORWARD, CheckpointPolicy
from runner.trace.flops import inner_jaxprs

TAG = "name"
BACKWARD = "transpose("  # in the name that jax gives an operation of the backward pass
# A value goes through these as it is: at most its shape is another.
THE_SAME = ("reduce_precision", "optimization_barrier", "sharding_constraint", "reshape", "squeeze")


@dataclass
class ScopesAndTags:
    """`scopes`: how often each was wrapped in the text of the trace (the body of a scan is there once)."""

    scopes: Counter[str] = field(default_factory=Counter)
    tags: set[str] = field(default_factory=set)


def find_scopes_and_tags(jaxpr: Any) -> ScopesAndTags:
    """The scopes that were wrapped, and the tags that a plan could name."""
    found = ScopesAndTags()
    for equation in iterate_equations(jaxpr):
        if isinstance(count_bytes_kept_by_step := equation.params.get("policy"), CheckpointPolicy):
            found.scopes[count_bytes_kept_by_step.scope] += 1
        if equation.primitive.name == TAG:
            found.tags.add(equation.params["name"])
        if equation.primitive.name == FLASH_FORWARD:
            found.tags.add(ATTENTION_CONTEXT)
    return found


def iterate_equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those inside of others as well."""
    for equation in jaxpr.eqns:
        yield equation
        for inner, _ in inner_jaxprs(equation):
            yield from iterate_equations(inner)


def count_stored_bytes(jaxpr: Any, outputs: int) -> Counter[str]:
    """Bytes on the device of the last `outputs` results that are not inputs, each once, by tag; `""` has none."""
    return _bytes(jaxpr, jaxpr.outvars[len(jaxpr.outvars) - outputs :])


def count_bytes_kept_by_step(jaxpr: Any) -> Counter[str]:
    """The same of what a training step makes in its forward pass and uses in its backward pass: one microbatch's.

    jax names the operations of the backward pass, so nothing is traced for it. Constants that no compiler stores are
    not in it, which `stored` finds among what a backward pass asks for.
    """
    is_backward = [BACKWARD in str(equation.source_info.name_stack) for equation in jaxpr.eqns]
    if not any(is_backward):
        inside = [inner for equation in jaxpr.eqns for inner, _ in inner_jaxprs(equation)]
        return sum(map(count_bytes_kept_by_step, inside), Counter[str]())
    passes = list(zip(jaxpr.eqns, is_backward, strict=True))
    made = {output for equation, late in passes if not late for output in equation.outvars}
    used = [atom for equation, late in passes if late for atom in equation.invars]
    return _bytes(jaxpr, [atom for atom in used if not hasattr(atom, "val") and atom in made])


def _bytes(jaxpr: Any, atoms: Iterable[Any]) -> Counter[str]:
    """Bytes on the device of values that are not inputs, each once, by tag."""
    found, counted, makers = Counter[str](), set(jaxpr.invars), _makers(jaxpr)
    for atom in atoms:
        is_away = getattr(atom.aval, "memory_space", None) == jax.memory.Space.Host
        if is_away or hasattr(atom, "val"):  # a literal
            continue
        var, name = _made(makers, atom)
        if var not in counted:
            counted.add(var)
            found[name] += _num_bytes(atom.aval)
    return found


def _makers(jaxpr: Any) -> dict[Any, Any]:
    return {output: equation for equation in jaxpr.eqns for output in equation.outvars}


def _made(makers: Mapping[Any, Any], var: Any) -> tuple[Any, str]:
    """The value that a variable is another name of, and its tag."""
    while (equation := makers.get(var)) is not None:
        operation = equation.primitive.name
        if operation == TAG:
            return var, equation.params["name"]
        if operation == FLASH_FORWARD:
            return var, ATTENTION_CONTEXT
        if operation in THE_SAME and not hasattr(equation.invars[equation.outvars.index(var)], "val"):
            var = equation.invars[equation.outvars.index(var)]
            continue
        place, inner = equation.outvars.index(var), [body for body, _ in inner_jaxprs(equation)]
        if len(inner) == 1 and len(inner[0].outvars) == len(equation.outvars):
            result = inner[0].outvars[place]
            return var, "" if hasattr(result, "val") else _made(_makers(inner[0]), result)[1]
        break
    return var, ""


def _num_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
