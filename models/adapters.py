"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) beside the linear layers of any NNX model.

A layer gives y = xW + b + scale · (xA)B. It keeps its class, its name and its weights; A and B are two more variables
of it, `lora_a` and `lora_b`. The product AB is never added to W while it trains: so the gradient of W, as large as W
itself, is not computed. flax has layers of this kind (nnx.LoRA, nnx.LoRALinear), but they have to be chosen in the
constructor of a model, wrap what they adapt under another name, and have no scale.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from models.find_blocks import scopes_of_class
from models.name_patterns import list_some, match_pattern, suggest_names

LORA_A, LORA_B = "lora_a", "lora_b"


class AdapterError(ValueError):
    """An adapter is asked for where none can be."""


@dataclass(frozen=True)
class AdapterPlan:
    """Say which layers get an adapter, and of what size.

    Attributes:
        targets: patterns over the names of layers.
        rank: how many numbers there are between A and B.
        scale: what the adapter's result is multiplied by.
        layers: other names of layers, each with the end of the path that it stands for: {"attn_out": "attention.out"}.
    """

    targets: tuple[str, ...]
    rank: int
    scale: float
    layers: Mapping[str, str]


def add_adapters(model: nnx.Module, plan: AdapterPlan, key: jax.Array) -> list[str]:
    """Give the layers that a plan names their adapters, in place; return the paths of these layers.

    A starts as in the authors' code and in PEFT (uniform within ±1/√inputs), B at zero: at first the model computes
    what it computed without. Layers that are stacked for a scan get a stack of adapters.

    Raises AdapterError where a target names no layer, or one that can have none.
    """
    chosen = _choose_layers(model, plan)
    for path, module in chosen.items():
        # By its name: what else is adapted does not change how an adapter begins.
        _add_adapter(module, plan, jax.random.fold_in(key, zlib.crc32(path.encode())))
    return list(chosen)


def _choose_layers(model: nnx.Module, plan: AdapterPlan) -> dict[str, nnx.Module]:
    """Return by its path each layer that the targets name."""
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if path}
    scopes = {path: scopes_of_class(type(module)) for path, module in modules.items()}
    names = {path: _list_names(path, scopes, plan.layers) for path in modules}
    linear = {path for path, module in modules.items() if isinstance(module, nnx.Linear | nnx.LinearGeneral)}
    known = [name for path in modules if path in linear for name in names[path]]
    if not linear:
        raise AdapterError("the model has no linear layer (flax.nnx.Linear or LinearGeneral) that could get an adapter")
    chosen = set()
    for pattern in plan.targets:
        hit = {path for path in modules if any(match_pattern(pattern, name) for name in names[path])}
        if not hit:
            raise AdapterError(f"no layer is called '{pattern}'{suggest_names(pattern, known)}")
        if not hit & linear:
            path = min(hit)
            raise AdapterError(
                f"'{pattern}' is of type {type(modules[path]).__name__}; adapters are for linear layers "
                f"(it has: {list_some(sorted(linear))})"
            )
        chosen |= hit & linear
    return {path: modules[path] for path in modules if path in chosen}


def _list_names(path: str, scopes: Mapping[str, set[str]], layers: Mapping[str, str]) -> list[str]:
    """Return what a layer is called: its path, the same from each scope that it lies in, and its names in `layers`."""
    parts = path.split(".")
    above = {".".join(parts[:end]): ".".join(parts[end:]) for end in range(1, len(parts))}
    within = [f"{scope}.{rest}" for start, rest in above.items() for scope in sorted(scopes.get(start, ()))]
    return [path, *within, *(name for name, end in layers.items() if f".{path}".endswith(f".{end}"))]


def _add_adapter(module: Any, plan: AdapterPlan, key: jax.Array) -> None:
    kernel = module.kernel.get_value()
    inward, outward = _count_axes(module)
    stack = kernel.shape[: kernel.ndim - inward - outward]
    inputs = kernel.shape[len(stack) : len(stack) + inward]
    outputs = kernel.shape[len(stack) + inward :]
    bound = 1 / math.sqrt(math.prod(inputs))
    a = jax.random.uniform(key, (*stack, *inputs, plan.rank), kernel.dtype, -bound, bound)
    module.lora_a, module.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(jnp.zeros((*stack, plan.rank, *outputs), a.dtype))
    module.lora_scale = plan.scale
    # flax's own __setattr__ would keep the class as an attribute of the module's graph.
    kind: Any = type(module)
    object.__setattr__(module, "__class__", _with_adapter(kind))


def _count_axes(module: Any) -> tuple[int, int]:
    """Return how many axes of a layer's kernel go in, and how many out. Raises AdapterError for a batch of maps."""
    if isinstance(module, nnx.Linear):
        return 1, 1
    if module.batch_axis:
        raise AdapterError(
            f"a {type(module).__name__} with batch_axis can have no adapter; leave it out of the targets"
        )
    return len(module.in_features), len(module.out_features)


@functools.cache
def _with_adapter(kind: Any) -> type:
    """Return a subclass that adds the result of its adapter."""

    # A subclass, for the class may have modules elsewhere, which must stay as they are. It is cached, so that modules
    # of one class are of one class again: their type is part of flax's graph definition, hence of jit's key.
    def __call__(self: Any, inputs: jax.Array, *args: Any, **named: Any) -> jax.Array:
        out = kind.__call__(self, inputs, *args, **named)
        x, a, b = promote_dtype((inputs, self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
        axes = getattr(self, "axis", (-1,))
        low = jnp.tensordot(x, a, (axes, tuple(range(a.ndim - 1))))
        return out + self.lora_scale * jnp.tensordot(low, b, 1)

    own = {"__call__": __call__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), own)


def merge_adapters(params: Mapping[Any, Any], scale: float) -> dict[Any, Any]:
    """Return nested dicts of arrays in which each adapter is added to the kernel beside it, and is gone."""
    if not {"kernel", LORA_A, LORA_B} <= params.keys():
        return {
            key: merge_adapters(value, scale) if isinstance(value, dict) else value for key, value in params.items()
        }
    rest = {key: value for key, value in params.items() if key not in (LORA_A, LORA_B)}
    return {**rest, "kernel": add_product(params["kernel"], params[LORA_A], params[LORA_B], scale)}


def add_product(kernel: Any, a: Any, b: Any, scale: float) -> Any:
    """Return kernel + scale · AB in the kernel's type, for one layer or a stack of them, in float32 between."""
    # Of s stacking axes, i inward and o outward ones, A has s + i + 1, B has s + 1 + o and the kernel s + i + o.
    stack, rank = a.ndim + b.ndim - 2 - kernel.ndim, a.shape[-1]
    rows, columns = math.prod(a.shape[stack:-1]), math.prod(b.shape[stack + 1 :])
    left = a.reshape(*a.shape[:stack], rows, rank).astype("float32")
    right = b.reshape(*b.shape[:stack], rank, columns).astype("float32")
    product = (left @ right).reshape(kernel.shape)
    return (kernel.astype("float32") + scale * product).astype(kernel.dtype)
