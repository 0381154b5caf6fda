"""Read from a jaxpr what rematerialization did: the scopes it wrapped, the tags it met, the bytes it stores.

It is read from jaxprs and not from a record that tracing leaves: jax reuses traces, and then nothing would be recorded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from models.scopes import ATTENTION_CONTEXT, FLASH_FORWARD, CheckpointPolicy
from runner.trace.flops import inner_jaxprs

# The primitive that jax.ad_checkpoint.checkpoint_name leaves in a trace.
TAG = "name"
# In the name that jax gives an operation of the backward pass.
BACKWARD = "transpose("
# A value goes through these as it is: at most its shape is another.
TRANSPARENT_OPERATIONS = ("reduce_precision", "optimization_barrier", "sharding_constraint", "reshape", "squeeze")


@dataclass
class ScopesAndTags:
    """What models/scopes.py left in a trace.

    Attributes:
        scopes: How often each scope was wrapped in the text of the trace; the body of a scan is there once.
        tags: The tags that a plan could name.
    """

    scopes: Counter[str] = field(default_factory=Counter)
    tags: set[str] = field(default_factory=set)


def find_scopes_and_tags(jaxpr: Jaxpr) -> ScopesAndTags:
    """Return the scopes that were wrapped in a jaxpr, and the tags that a plan could name."""
    found = ScopesAndTags()
    for equation in iterate_equations(jaxpr):
        if isinstance(policy := equation.params.get("policy"), CheckpointPolicy):
            found.scopes[policy.scope] += 1
        if equation.primitive.name == TAG:
            found.tags.add(equation.params["name"])
        if equation.primitive.name == FLASH_FORWARD:
            found.tags.add(ATTENTION_CONTEXT)
    return found


def iterate_equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield every equation of a jaxpr, those inside of others as well."""
    for equation in jaxpr.eqns:
        yield equation
        for body, _ in inner_jaxprs(equation):
            yield from iterate_equations(body)


def count_stored_bytes(jaxpr: Jaxpr, outputs: int) -> Counter[str]:
    """Return the bytes, by tag, of the last `outputs` results of a jaxpr that are no inputs; `""` has no tag.

    Each value is counted once. What lies in the host's memory is left out.
    """
    return _count_bytes(jaxpr, jaxpr.outvars[len(jaxpr.outvars) - outputs :])


def count_bytes_kept_by_step(jaxpr: Jaxpr) -> Counter[str]:
    """Return the bytes, by tag, that a train step makes in its forward pass and uses in its backward pass.

    They are those of one microbatch. The step itself is read, in which jax names the operations of the backward pass,
    so nothing is traced for it. Constants that no compiler stores are not in it; `count_stored_bytes` finds them among
    what a backward pass asks for.
    """
    is_backward = [BACKWARD in str(equation.source_info.name_stack) for equation in jaxpr.eqns]
    # The two passes are in one jaxpr somewhere inside: in a jit, and with microbatches in a scan.
    if not any(is_backward):
        inside = [body for equation in jaxpr.eqns for body, _ in inner_jaxprs(equation)]
        return sum(map(count_bytes_kept_by_step, inside), Counter[str]())
    made, used = set[Var](), list[Var | Literal]()
    for equation, is_late in zip(jaxpr.eqns, is_backward, strict=True):
        if is_late:
            used += equation.invars
        else:
            made.update(equation.outvars)
    return _count_bytes(jaxpr, [atom for atom in used if not _is_literal(atom) and atom in made])


def _count_bytes(jaxpr: Jaxpr, atoms: Iterable[Var | Literal]) -> Counter[str]:
    """Return the bytes on the device of values that are not inputs, each once, by tag."""
    found, counted, makers = Counter[str](), set(jaxpr.invars), _find_makers(jaxpr)
    for atom in atoms:
        is_offloaded = getattr(atom.aval, "memory_space", None) == jax.memory.Space.Host
        if is_offloaded or _is_literal(atom):
            continue
        # Two variables may be one value, as before and after a barrier: it takes memory once.
        var, name = _trace_back(makers, atom)
        if var not in counted:
            counted.add(var)
            found[name] += count_bytes(atom)
    return found


def _find_makers(jaxpr: Jaxpr) -> dict[Any, JaxprEqn]:
    return {output: equation for equation in jaxpr.eqns for output in equation.outvars}


def _trace_back(makers: Mapping[Any, JaxprEqn], var: Any) -> tuple[Any, str]:
    """Return the variable that first had this value, and its tag (`""` where it has none)."""
    while (equation := makers.get(var)) is not None:
        operation, place = equation.primitive.name, equation.outvars.index(var)
        if operation == TAG:
            return var, equation.params["name"]
        if operation == FLASH_FORWARD:
            return var, ATTENTION_CONTEXT
        if operation in TRANSPARENT_OPERATIONS and not _is_literal(equation.invars[place]):
            var = equation.invars[place]
            continue
        # A jit, a checkpoint or a scan: its body knows the tag of what it returns.
        bodies = [body for body, _ in inner_jaxprs(equation)]
        if len(bodies) == 1 and len(bodies[0].outvars) == len(equation.outvars):
            result = bodies[0].outvars[place]
            return var, "" if _is_literal(result) else _trace_back(_find_makers(bodies[0]), result)[1]
        break
    return var, ""


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def count_bytes(atom: Var | Literal) -> int:
    """Return the bytes of a value in a jaxpr."""
    # jax's type of abstract values is that of tokens too, which have no shape.
    aval: Any = atom.aval
    return math.prod(aval.shape) * int(aval.dtype.itemsize)
