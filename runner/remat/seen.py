"""What a trace tells of rematerialization: which scopes it wrapped, which tags it met, what it stores under which name.

Read from jaxprs, not from a record that tracing leaves: jax reuses traces, and then nothing would be recorded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from models.scopes import CONTEXT, FLASH, Kept
from runner.flops import bodies

TAG = "name"
# A value goes through these as it is: at most its shape is another.
THE_SAME = ("reduce_precision", "optimization_barrier", "sharding_constraint", "reshape", "squeeze")


@dataclass
class Seen:
    """`scopes`: how often each was wrapped in the text of the trace (the body of a scan is there once)."""

    scopes: Counter[str] = field(default_factory=Counter)
    tags: set[str] = field(default_factory=set)


def seen(jaxpr: Any) -> Seen:
    """The scopes that were wrapped, and the tags that a plan could name."""
    found = Seen()
    for equation in equations(jaxpr):
        if isinstance(kept := equation.params.get("policy"), Kept):
            found.scopes[kept.scope] += 1
        if equation.primitive.name == TAG:
            found.tags.add(equation.params["name"])
        if equation.primitive.name == FLASH:
            found.tags.add(CONTEXT)
    return found


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those inside of others as well."""
    for equation in jaxpr.eqns:
        yield equation
        for inner, _ in bodies(equation):
            yield from equations(inner)


def stored(jaxpr: Any, outputs: int) -> Counter[str]:
    """Bytes on the device of the last `outputs` results that are not inputs, each once, by tag; `""` has none."""
    found, counted = Counter[str](), set(jaxpr.invars)
    for atom in jaxpr.outvars[len(jaxpr.outvars) - outputs :]:
        is_away = getattr(atom.aval, "memory_space", None) == jax.memory.Space.Host
        if is_away or hasattr(atom, "val"):  # a literal
            continue
        var, name = _made(jaxpr, atom)
        if var not in counted:
            counted.add(var)
            found[name] += _num_bytes(atom.aval)
    return found


def _made(jaxpr: Any, var: Any) -> tuple[Any, str]:
    """The value that a variable is another name of, and its tag."""
    makers = {output: equation for equation in jaxpr.eqns for output in equation.outvars}
    while (equation := makers.get(var)) is not None:
        operation = equation.primitive.name
        if operation == TAG:
            return var, equation.params["name"]
        if operation == FLASH:
            return var, CONTEXT
        if operation in THE_SAME and not hasattr(equation.invars[equation.outvars.index(var)], "val"):
            var = equation.invars[equation.outvars.index(var)]
            continue
        place, inner = equation.outvars.index(var), [body for body, _ in bodies(equation)]
        if len(inner) == 1 and len(inner[0].outvars) == len(equation.outvars):
            result = inner[0].outvars[place]
            return var, "" if hasattr(result, "val") else _made(inner[0], result)[1]
        break
    return var, ""


def _num_bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
