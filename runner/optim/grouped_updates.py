"""Update groups of parameters with learning rates and weight decays of their own (`optim.groups`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import optax

from models.name_patterns import find_unused, match_pattern, suggest_names
from runner.errors import ConfigError
from runner.optim.clip import clip_by_known_norm
from runner.optim.optimizers import Groups
from runner.types import Params

if TYPE_CHECKING:
    from runner.optim.optimizers import ParameterGroup

# The label of what no group names. No group can be called so: a name has no spaces around it.
REST = ""


def build_optimizer(option: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return the transformation of an option: of all parameters alike, or with its groups apart.

    With groups the gradient is clipped to its norm as a whole, as it is without them.
    """
    if not getattr(option, "groups", {}):
        alone: optax.GradientTransformation = option.build(schedule)
        return alone
    alike = replace(option, groups={}, clip_norm=None)
    parts = {name: _build_group(alike, group, schedule) for name, group in option.groups.items()}
    grouped = optax.partition(
        {REST: alike.build(schedule), **parts}, lambda params: label_groups(option.groups, params)
    )
    return grouped if option.clip_norm is None else optax.chain(clip_by_known_norm(option.clip_norm), grouped)


def _build_group(option: Any, group: ParameterGroup, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = option.weight_decay if group.weight_decay is None else group.weight_decay
    transformation: optax.GradientTransformation = replace(option, weight_decay=decay).build(
        lambda step: group.lr * schedule(step)
    )
    return transformation


def label_groups(groups: Groups, params: Params) -> Any:
    """Return a tree like the parameters with the name of each one's group; REST where none names it."""
    labels = {
        path: next((name for name, group in groups.items() if _is_in_group(group, path)), REST)
        for path in _list_paths(params)
    }
    return jax.tree_util.tree_map_with_path(lambda path, _: labels[_join_path(path)], params)


def check_groups(groups: Groups, params: Params) -> None:
    """Raise ConfigError where a pattern names no parameter, or two groups have the same one.

    Args:
        groups: by name.
        params: the parameters that train, abstract.
    """
    paths = _list_paths(params)
    for name, group in groups.items():
        if (pattern := find_unused(group.match, paths)) is not None:
            raise ConfigError(
                f"optim.groups.{name}: no parameter that trains is called '{pattern}'{suggest_names(pattern, paths)}"
            )
    for path in paths:
        if len(found := [name for name, group in groups.items() if _is_in_group(group, path)]) > 1:
            raise ConfigError(
                f"optim.groups: {path} is in {found[0]} and in {found[1]}; narrow the patterns of one of them"
            )


def _is_in_group(group: ParameterGroup, path: str) -> bool:
    return any(match_pattern(pattern, path) for pattern in group.match)


def _list_paths(params: Params) -> list[str]:
    return [_join_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _join_path(path: Iterable[Any]) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)
