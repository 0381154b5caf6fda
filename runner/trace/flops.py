"""Count the FLOPs of a traced computation from its jaxpr, also by part of the model. Pure; imports no jax.

Matrix products and convolutions are counted, with two operations for a multiply-add, and the body of a scan times its
length. Everything else is small beside them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

# cuDNN's flash attention is one operation. It holds so many products of queries × keys × features of a head: two in the
# forward pass, and in the backward pass, which computes the scores again, five (Dao et al. 2022, arXiv:2205.14135).
FLASH_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}

# Of these products the backward pass does one again, for the scores were not kept.
FLASH_PRODUCTS_AGAIN = {"dot_product_attention_bwd_wrapper": 1}

# What jax writes into the name of an operation that a checkpoint does a second time.
RECOMPUTED = "rematted_computation"

# What these compute is nowhere in a jaxpr, or not how often.
CALLBACKS = ("pure_callback", "io_callback")
OPAQUE = (*CALLBACKS, "pallas_call", "ffi_call", "custom_call", "tpu_custom_call", "triton_kernel_call")
DEPENDS_ON_VALUES = ("while",)

# The part of what is there before any weights: the batch.
OUTSIDE = ""


@dataclass
class FlopsByPart:
    """The FLOPs of a computation by part of the model, in the order of their use.

    Attributes:
        flops: The FLOPs of each part.
        made_by: For each output of the jaxpr the part that made it; None where it depends on no data.
        last: The part that data met last.
    """

    flops: Counter[str] = field(default_factory=Counter)
    made_by: list[str | None] = field(default_factory=list)
    last: str = OUTSIDE


@dataclass(frozen=True)
class FromWeights:
    """The origin of a value that depends on nothing but the weights of one part."""

    part: str


@dataclass(frozen=True)
class FromData:
    """The origin of a value that depends on data, and was made in a part."""

    part: str


# Where a value comes from; None: it is a constant.
Origin = FromWeights | FromData | None


def count_flops(jaxpr: Jaxpr) -> int:
    """Return the FLOPs of a jaxpr."""
    return attribute_flops(jaxpr, [FromData(OUTSIDE)] * len(jaxpr.invars)).flops.total()


def count_recomputed_flops(jaxpr: Jaxpr, *, inside: bool = False) -> int:
    """Return the FLOPs of a train step's jaxpr that are done again for the backward pass.

    They are those that jax names so. `inside`: the jaxpr is the body of such an operation.
    """
    total = 0
    for equation in jaxpr.eqns:
        is_again = inside or RECOMPUTED in str(equation.source_info.name_stack)
        total += _count_product(equation) if is_again else 0
        total += sum(times * count_recomputed_flops(body, inside=is_again) for body, times in inner_jaxprs(equation))
    return total


def count_useful_flops(jaxpr: Jaxpr) -> int:
    """Return the FLOPs of a train step's jaxpr without those that are done again for the backward pass.

    Neither what a checkpoint recomputes counts nor the scores that flash attention computes a second time.
    """
    total = 0
    for equation in jaxpr.eqns:
        if RECOMPUTED in str(equation.source_info.name_stack):
            continue
        name, product = equation.primitive.name, _count_product(equation)
        total += product - product * FLASH_PRODUCTS_AGAIN.get(name, 0) // FLASH_PRODUCTS.get(name, 1)
        total += sum(times * count_useful_flops(body) for body, times in inner_jaxprs(equation))
    return total


def find_uncounted(jaxpr: Jaxpr) -> list[str]:
    """Return the operations of a jaxpr, by their names, of which no trace tells how many FLOPs they take.

    They are kernels of one's own, loops that last as long as their values say, conditions with products on more than
    one side, and what is divided among devices by hand.
    """
    found: dict[str, None] = {}
    for equation in jaxpr.eqns:
        name, bodies = equation.primitive.name, [body for body, _ in inner_jaxprs(equation)]
        with_products = sum(count_flops(body) > 0 for body in bodies)
        if (
            name in OPAQUE
            or (name in DEPENDS_ON_VALUES and with_products)
            or (name == "cond" and with_products > 1)
            or (name == "shard_map" and with_products)
        ):
            found[name] = None
        for body in bodies:
            found |= dict.fromkeys(find_uncounted(body))
    return list(found)


def attribute_flops(jaxpr: Jaxpr, origins: Sequence[Origin]) -> FlopsByPart:
    """Return the FLOPs of a jaxpr by part of the model; `origins` says where each of its inputs comes from.

    Data that meets the weights of a part belongs to that part. So does all that follows, as attention scores do, until
    data meets the weights of another part.
    """
    found = FlopsByPart()
    outputs = _walk(jaxpr, origins, 1, found)
    found.made_by = [origin.part if isinstance(origin, FromData) else None for origin in outputs]
    return found


def _walk(jaxpr: Jaxpr, origins: Sequence[Origin], times: int, found: FlopsByPart) -> list[Origin]:
    """Add the FLOPs of a jaxpr that runs `times` times to what was found, and return the origins of its outputs."""
    known: dict[Var, Origin] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin_of(atom: Var | Literal) -> Origin:
        return None if hasattr(atom, "val") else known.get(atom)  # only a literal has a value

    for equation in jaxpr.eqns:
        inputs, inside = [origin_of(atom) for atom in equation.invars], inner_jaxprs(equation)
        parts = [each.part for each in inputs if isinstance(each, FromWeights)]
        is_stack = equation.primitive.name == "scan"
        # What goes round in a scan over layers is made inside of it from the second layer on, whatever entered it.
        if parts and is_stack:
            inputs = [FromData(parts[0]) if isinstance(each, FromData) else each for each in inputs]
        # An equation with a jaxpr inside (a jit, a checkpoint) is not where data meets weights: its body says where.
        if parts and (is_stack or not inside) and any(isinstance(each, FromData) for each in inputs):
            found.last = parts[0]
        found.flops[found.last] += times * _count_product(equation)
        outputs = [_join_origins(inputs, found.last)] * len(equation.outvars)
        for body, length in inside:
            # Where the inputs of the body are not those of the equation, one origin serves for all of them.
            fits = len(body.invars) == len(inputs)
            made = _walk(body, inputs if fits else [outputs[0]] * len(body.invars), times * length, found)
            is_same = fits and len(made) == len(outputs)
            outputs = made if is_same else [_join_origins(inputs, found.last)] * len(outputs)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [origin_of(atom) for atom in jaxpr.outvars]


def _join_origins(inputs: Sequence[Origin], part: str) -> Origin:
    """Return the origin of what a part makes of these: data wins over weights, weights over constants."""
    if any(isinstance(each, FromData) for each in inputs):
        return FromData(part)
    weights = [each for each in inputs if isinstance(each, FromWeights)]
    return weights[0] if weights else None


def inner_jaxprs(equation: JaxprEqn) -> list[tuple[Jaxpr, int]]:
    """Return the jaxprs inside an equation, each with how often it runs (a while loop: once, nobody knows)."""
    length = equation.params["length"] if equation.primitive.name == "scan" else 1
    found: list[tuple[Jaxpr, int]] = []
    # The branches of a condition are in a tuple, everything else is a parameter of its own.
    for parameter in equation.params.values():
        for value in parameter if isinstance(parameter, list | tuple) else [parameter]:
            # A checkpoint has a bare jaxpr; others have a closed one, which holds a bare one.
            jaxpr: Any = getattr(value, "jaxpr", value)
            if hasattr(jaxpr, "eqns"):
                found.append((jaxpr, length))
    return found


def _count_product(equation: JaxprEqn) -> int:
    """Return 2 × the multiply-adds of one operation, 0 where it is no product."""
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = _shape(equation.invars[0])
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[i] for i in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        # The gradient of a strided convolution has zeros between its inputs; nothing is multiplied there.
        zeros = math.prod(equation.params["lhs_dilation"])
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // (outputs * zeros)
    if equation.primitive.name in FLASH_PRODUCTS:
        # Both have the shape [batch, sequence, heads, features].
        queries, keys = _shape(equation.invars[0]), _shape(equation.invars[1])
        return FLASH_PRODUCTS[equation.primitive.name] * 2 * math.prod(queries) * keys[1]
    return 0


def _shape(atom: Var | Literal) -> tuple[int, ...]:
    # jax's type of abstract values is that of tokens too, which have no shape.
    aval: Any = atom.aval
    return tuple(aval.shape)
