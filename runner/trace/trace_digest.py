"""Tell whether two traces compute the same: a digest of operations, their wiring, their options and every constant."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

# Where a value lies in memory, in how Python shows it: another place each time.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def digest_trace(traced: ClosedJaxpr) -> str:
    """Return a SHA-256 of what a traced function computes, in hexadecimal; equal for two traces that do the same."""
    digest = hashlib.sha256()
    _add(digest, traced)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add a parameter of an operation, or a trace, to a digest."""
    if isinstance(value, ClosedJaxpr):
        _add_jaxpr(digest, value.jaxpr)
        for constant in value.consts:
            _add(digest, constant)
    elif isinstance(value, Jaxpr):
        _add_jaxpr(digest, value)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for each in value:
            _add(digest, each)
    elif isinstance(value, set | frozenset):
        # In another process they come in another order.
        _add(digest, sorted(map(str, value)))
    elif isinstance(value, jax.core.Tracer):
        # What an earlier trace left behind: a value of none that follows.
        digest.update(f"traced {id(value)}".encode())
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        # A random key is told from the words it is made of by its type.
        digest.update(f"{value.dtype}".encode())
        is_key = isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
        words: Any = jax.random.key_data(value) if is_key else value  # type: ignore[arg-type]
        array = np.asarray(words)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    else:
        digest.update(ADDRESS.sub("", repr(value)).encode())


def _add_jaxpr(digest: Any, jaxpr: Jaxpr) -> None:
    # A variable is known by the order in which it comes.
    numbers: dict[Any, int] = {}
    for var in (*jaxpr.constvars, *jaxpr.invars):
        numbers[var] = len(numbers)
    for equation in jaxpr.eqns:
        digest.update(equation.primitive.name.encode())
        for atom in equation.invars:
            _add_atom(digest, numbers, atom)
        for name in sorted(equation.params):
            digest.update(name.encode())
            _add(digest, equation.params[name])
        for var in equation.outvars:
            numbers[var] = len(numbers)
            digest.update(str(var.aval).encode())
    for atom in jaxpr.outvars:
        _add_atom(digest, numbers, atom)


def _add_atom(digest: Any, numbers: dict[Any, int], atom: Any) -> None:
    # A literal holds its value; a variable has been met before.
    if hasattr(atom, "val"):
        _add(digest, atom.val)
    else:
        digest.update(f"#{numbers[atom]}".encode())
