"""Make of `tune=` what a model needs for it: adapters in its layers, and the paths of what does not train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from models.adapters import LORA_A, LORA_B, AdapterError, AdapterPlan, add_adapters
from models.name_patterns import Patterns, match_pattern, suggest_names
from runner.config.schema import Config
from runner.config.tune import FreezeTune, LoraTune
from runner.errors import ConfigError
from runner.mesh import STACKED
from runner.text import format_count
from runner.train.frozen_layers import (
    FrozenLayers,
    iter_paths,
    join_frozen,
    leave_unchanged_out,
    nest_paths,
    split_frozen,
)
from runner.types import Params, State

if TYPE_CHECKING:
    from runner.train.built import Built

# Folded into the key of a model's weights: they are what they would be without adapters.
ADAPTER_STREAM = 0x4C6F5241


def adapt_model(model: nnx.Module, config: Config, key: jax.Array) -> None:
    """Give a fresh model its adapters, in place, where `tune=lora` asks for them. Raises ConfigError."""
    if not isinstance(tune := config.tune, LoraTune):
        return
    plan = AdapterPlan(tune.targets, tune.rank, tune.scale, getattr(config.model, "layers", {}))
    try:
        add_adapters(model, plan, jax.random.fold_in(key, ADAPTER_STREAM))
    except AdapterError as error:
        raise ConfigError(f"tune.targets: {error}") from None


def warn_of_fresh_base(config: Config) -> list[str]:
    """Return a warning where what does not train was trained by nobody."""
    if config.tune.kind == "none" or config.init_from.run is not None:
        return []
    return [
        f"tune={config.tune.kind} without init_from: what does not train stays as it is initialized; say init_from=RUN"
    ]


def choose_frozen(config: Config, params: Params) -> FrozenLayers:
    """Return which parameters do not train. Raises ConfigError where a pattern names none of them."""
    if not isinstance(tune := config.tune, FreezeTune | LoraTune):
        return {}
    sizes = {path: leaf.shape for path, leaf in iter_paths(params)}
    own = {path: shape for path, shape in sizes.items() if not is_adapter(path)}
    trained = find_trained(tune.train, own)
    frozen: dict[str, tuple[int, ...] | None] = {}
    for path, shape in own.items():
        layers = trained.get(path, ())
        if layers is not None and len(layers) < (shape[0] if layers else 1):
            frozen[path] = tuple(at for at in range(shape[0]) if at not in layers) if layers else None
    if not frozen:
        raise ConfigError(f"tune={tune.kind}: tune.train names every parameter; leave tune out")
    return frozen


def find_trained(patterns: Patterns, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...] | None]:
    """Return by its path each parameter that a pattern names: None for all of it, else those of its stacked layers.

    Layers that lie in one array have numbers as if they were a list: `blocks.3.attention.qkv.kernel`.

    Raises ConfigError where a pattern names nothing.
    """
    found: dict[str, tuple[int, ...] | None] = {}
    for pattern in patterns:
        hits = 0
        for path, shape in shapes.items():
            if match_pattern(pattern, path):
                found[path], hits = None, hits + 1
                continue
            layers = [at for at, name in enumerate(name_layers(path, shape)) if match_pattern(pattern, name)]
            hits += len(layers)
            before = found.get(path, ())
            if layers and before is not None:
                found[path] = tuple(sorted({*before, *layers}))
        if not hits:
            raise ConfigError(f"tune.train: no parameter is called '{pattern}'{_explain_names(pattern, shapes)}")
    return found


def name_layers(path: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names of the layers that lie in one array, `blocks.0.…` and so on; none where it is of one alone."""
    first, _, rest = path.partition(".")
    if first != STACKED or rest.partition(".")[0].isdecimal() or not shape:
        return []
    return [f"{first}.{at}.{rest}" for at in range(shape[0])]


def _explain_names(pattern: str, shapes: dict[str, Any]) -> str:
    counts = [len(names) for path, shape in shapes.items() if (names := name_layers(path, shape))]
    if counts and any(part.isdecimal() for part in pattern.split(".")):
        return f"; {STACKED} has {format_count(min(counts), 'layer')}, from {STACKED}.0 on"
    return suggest_names(pattern, shapes)


def gather_whole(state: State, frozen: FrozenLayers) -> tuple[State, Params]:
    """Return a state with all parameters of the model in one tree, as one that trains whole has it; and its adapters.

    The second is by path. What no step changes is left out.
    """
    if not frozen:
        return leave_unchanged_out(state), {}
    joined = join_frozen(state["params"], state["frozen"], frozen)
    adapters = {path: leaf for path, leaf in iter_paths(joined) if is_adapter(path)}
    whole = nest_paths({path: leaf for path, leaf in iter_paths(joined) if path not in adapters})
    return {**leave_unchanged_out(state), "params": whole}, adapters


def divide_whole(state: State, adapters: Params, built: Built) -> State:
    """Return the state that `gather_whole` was given, with the weights of this one, each array where it belongs."""
    if not built.frozen:
        return state
    whole = nest_paths({**dict(iter_paths(state["params"])), **adapters})
    params, frozen = split_frozen(whole, built.frozen)
    divided = {"params": params, "frozen": frozen}
    wanted = {name: built.abstract[name] for name in divided}
    return {**state, **jax.tree.map(_put_where_wanted, divided, wanted)}


def _put_where_wanted(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    # Layers that were taken out of a stack, or put together with others.
    return leaf if leaf.sharding == wanted.sharding else jax.device_put(leaf, wanted.sharding)


def is_adapter(path: str) -> bool:
    """Tell by its path whether a parameter is a matrix of an adapter."""
    return path.rpartition(".")[2] in (LORA_A, LORA_B)
