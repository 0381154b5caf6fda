"""What a traced computation costs: the multiply-adds of its products, read from its jaxpr, by part of the model. Pure.

Data that meets the weights of a part belongs to that part, and so does all that follows (attention scores), until data
meets the weights of another one. Counted are matrix products and convolutions, two operations for a multiply-add, the
body of a scan times its length; everything else is small beside them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# cuDNN's flash attention is one operation: so many products of queries × keys × features of a head are in it; the
# backward pass computes the scores again (Dao et al. 2022, arXiv:2205.14135).
FLASH_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
AGAIN = "rematted_computation"  # in the name of an operation that a checkpoint does a second time
OUTSIDE = ""  # the part of what is there before any weights: the batch


@dataclass
class FlopsByPart:
    """FLOPs by part, in the order of use; for each output of the jaxpr the part that made it (None: no data in it)."""

    flops: Counter[str] = field(default_factory=Counter)
    made_by: list[str | None] = field(default_factory=list)
    last: str = OUTSIDE


@dataclass(frozen=True)
class FromWeights:
    """A value that depends on nothing but the weights of one part, and not on data."""

    part: str


@dataclass(frozen=True)
class FromData:
    """A value that depends on data, made in a part."""

    part: str


Origin = FromWeights | FromData | None  # None: a constant


def count_flops(jaxpr: Any) -> int:
    """The FLOPs of a jaxpr."""
    return attribute_flops(jaxpr, [FromData(OUTSIDE)] * len(jaxpr.invars)).flops.total()


def count_recomputed_flops(jaxpr: Any, *, inside: bool = False) -> int:
    """The FLOPs of what is computed again for the backward pass, as jax names it (a jaxpr with a backward pass)."""
    total = 0
    for equation in jaxpr.eqns:
        again = inside or AGAIN in str(equation.source_info.name_stack)
        total += _own(equation) if again else 0
        total += sum(length * count_recomputed_flops(inner, inside=again) for inner, length in inner_jaxprs(equation))
    return total


def attribute_flops(jaxpr: Any, origins: Sequence[Origin]) -> FlopsByPart:
    """The FLOPs of a jaxpr by part, when its inputs come from there."""
    found = FlopsByPart()
    outputs = _walk(jaxpr, origins, 1, found)
    found.made_by = [origin.part if isinstance(origin, FromData) else None for origin in outputs]
    return found


def _walk(jaxpr: Any, origins: Sequence[Origin], times: int, found: FlopsByPart) -> list[Origin]:
    """Where the outputs come from; FLOPs are added to what was found."""
    known: dict[Any, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(atom: Any) -> Origin:
        return None if hasattr(atom, "val") else known.get(atom)  # a literal has a value

    for equation in jaxpr.eqns:
        inputs, inside = [origin(atom) for atom in equation.invars], list(inner_jaxprs(equation))
        parts = [each.part for each in inputs if isinstance(each, FromWeights)]
        is_stack = equation.primitive.name == "scan"
        if parts and is_stack:  # what goes round is made in the stack from its second layer on
            inputs = [FromData(parts[0]) if isinstance(each, FromData) else each for each in inputs]
        if parts and (is_stack or not inside) and any(isinstance(each, FromData) for each in inputs):
            found.last = parts[0]
        found.flops[found.last] += times * _own(equation)
        outputs = [_joined(inputs, found.last)] * len(equation.outvars)
        for inner, length in inside:
            fits = len(inner.invars) == len(inputs)
            made = _walk(inner, inputs if fits else [outputs[0]] * len(inner.invars), times * length, found)
            outputs = made if fits and len(made) == len(outputs) else [_joined(inputs, found.last)] * len(outputs)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [origin(atom) for atom in jaxpr.outvars]


def _joined(inputs: Sequence[Origin], part: str) -> Origin:
    """What is made of these, in a part: data wins over weights, weights over constants."""
    if any(isinstance(each, FromData) for each in inputs):
        return FromData(part)
    weights = [each for each in inputs if isinstance(each, FromWeights)]
    return weights[0] if weights else None


def inner_jaxprs(equation: Any) -> list[tuple[Any, int]]:
    """The jaxprs inside an equation, each with how often it runs (a while loop: once, nobody knows)."""
    length = equation.params["length"] if equation.primitive.name == "scan" else 1
    values = [
        value for each in equation.params.values() for value in (each if isinstance(each, list | tuple) else [each])
    ]
    jaxprs = [getattr(value, "jaxpr", value) for value in values]
    return [(inner, length) for inner in jaxprs if hasattr(inner, "eqns")]


def _own(equation: Any) -> int:
    """2 × the multiply-adds of one product."""
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        zeros = math.prod(equation.params["lhs_dilation"])  # put between the inputs; nothing is multiplied there
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // (outputs * zeros)
    if equation.primitive.name in FLASH_PRODUCTS:
        queries, keys = (equation.invars[place].aval.shape for place in (0, 1))  # batch, sequence, heads, features
        return FLASH_PRODUCTS[equation.primitive.name] * 2 * math.prod(queries) * keys[1]
    return 0
