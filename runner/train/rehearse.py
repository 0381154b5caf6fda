"""Try a user's own model and objective on abstract values, before anything is compiled: what does not fit is one line.

Nothing is computed. A model of ours needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.call_roles import STREAMS, describe_signature_problem
from models.objectives import BatchObjective, MergeableMetric
from runner.errors import ConfigError
from runner.train.split_model import (
    SplitModel,
    Variables,
    abstract_variables,
    list_paths,
    merge_model,
    split_variables,
)
from runner.types import Batch

MAX_NAMED = 3


@dataclass(frozen=True)
class Rehearsal:
    """What a first look at a model and an objective shows.

    Attributes:
        metrics: the names of what is measured.
        warnings: what a person should know, one line each.
    """

    metrics: tuple[str, ...]
    warnings: tuple[str, ...]


def rehearse(network: SplitModel, objective: BatchObjective, batch: Batch, target: str | None) -> Rehearsal:
    """Call a model as training and as evaluation will, without computing anything.

    `batch` holds the shapes of a batch; `target` names the model where it is the user's own.

    Raises:
        ConfigError: it cannot be called with its inputs, or has nothing to train.
        InvalidModelOrObjective: what it, or the objective, returns is not what is asked of it.
    """
    name = target or "the model"
    variables = abstract_variables(network)
    if not jax.tree.leaves(variables[0]):
        raise ConfigError(
            f"{_where(target)}has nothing to train: no nnx.Param of floating-point numbers (an array that is a plain "
            "attribute lasts, but is not trained: wrap it in nnx.Param)"
        )
    findings = _Findings()

    def call(graphdef: nnx.GraphDef, note: Callable[[nnx.Module], Callable[[], None]]) -> Callable[..., Any]:
        def called(variables: Variables, batch: Batch) -> dict[str, Any]:
            params, rng, extra = variables
            model = merge_model(graphdef, network, {"params": params, "rng": rng, "extra": extra})
            if target and objective.calls_with_inputs and (problem := describe_signature_problem(model)):
                raise ConfigError(
                    f"{_where(target)}cannot be called with its inputs alone: {problem}; give its __call__ defaults, "
                    "or call it in an objective of your own (objective=my_file:my_loss)"
                )
            compare = note(model)
            size = len(next(iter(batch.values())))
            found = objective(model, batch, jnp.ones(size, jnp.float32))
            compare()
            findings.note_variables(model, variables)
            findings.metrics = tuple(found)
            # Objects with `merge` and `compute` need not be pytrees until an evaluation merges them.
            return {
                key: value.compute() if isinstance(value, MergeableMetric) else value for key, value in found.items()
            }

        return called

    # Training last: what its call does to variables is what counts, but for the names that an evaluation measures.
    jax.eval_shape(call(network.eval, lambda model: lambda: None), variables, batch)
    metrics = findings.metrics
    jax.eval_shape(call(network.train, findings.watch_training), variables, batch)
    if findings.untrained:
        raise ConfigError(
            f"{_where(target)}its call makes parameters ({_name_some(findings.untrained)}): new ones in every step, "
            "and none is trained; make its layers in __init__"
        )
    if findings.altered:
        raise ConfigError(
            f"{_where(target)}its call changes the variable {findings.altered[0]}; keep shape and type, as every step "
            "has the same variables"
        )
    if findings.lost:
        raise ConfigError(
            f"{_where(target)}its call removes the variable '{findings.lost[0]}'; keep it, as every step has the same "
            "variables"
        )
    return Rehearsal(metrics, findings.warnings(name))


class _Findings:
    """What the calls of a model change, as far as tracing them shows it."""

    def __init__(self) -> None:
        self.metrics: tuple[str, ...] = ()
        self.new: list[str] = []
        self.lost: list[str] = []
        self.untrained: list[str] = []
        self.altered: list[str] = []
        self.set_params: list[str] = []
        self._still: dict[str, list[str]] = {"BatchNorm": [], "Dropout": []}
        self._seen: dict[str, int] = {"BatchNorm": 0, "Dropout": 0}

    def note_variables(self, model: nnx.Module, before: Variables) -> None:
        """Note which variables a call makes or removes, and which have another shape or type after it."""
        after = split_variables(model)
        self.untrained = sorted(set(list_paths(after[0])) - set(list_paths(before[0])) - {""})
        self.set_params = _list_set(before[0], after[0])
        found, known = _list_types(after[2]), _list_types(before[2])
        self.new = sorted(found.keys() - known.keys())
        self.lost = sorted(known.keys() - found.keys())
        self.altered = [
            f"'{path}' from {known[path]} to {found[path]}"
            for path in sorted(found.keys() & known.keys())
            if known[path] != found[path]
        ]

    def watch_training(self, model: nnx.Module) -> Callable[[], None]:
        """Return a function that notes which layers with a training mode behaved as in evaluation since this call.

        In training a BatchNorm sets its statistics and a Dropout draws: their variables hold other values then.
        """
        norms = {
            ".".join(map(str, path)): module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, nnx.BatchNorm) and module.mean is not None
        }
        dropouts = {
            ".".join(map(str, path)): module
            for path, module in nnx.iter_modules(model)
            if isinstance(module, nnx.Dropout) and module.rate
        }
        own = {path: module.mean.get_value() for path, module in norms.items()}
        drawn = {path: _counts(module) for path, module in dropouts.items()}
        streams = _counts(getattr(model, STREAMS, None))

        def compare() -> None:
            self._seen = {"BatchNorm": len(norms), "Dropout": len(dropouts)}
            self._still["BatchNorm"] = [path for path, norm in norms.items() if norm.mean.get_value() is own[path]]
            others_drew = _differ(streams, _counts(getattr(model, STREAMS, None)))
            self._still["Dropout"] = [
                path
                for path, dropout in dropouts.items()
                if not others_drew and not _differ(drawn[path], _counts(dropout))
            ]

        return compare

    def warnings(self, name: str) -> tuple[str, ...]:
        """Return a line for each thing that a person should know."""
        lines = []
        did = {"BatchNorm": "moves its statistics", "Dropout": "drops anything"}
        for kind, still in self._still.items():
            if still:
                lines.append(
                    f"{name}: {len(still)} of {self._seen[kind]} {kind} layers never see training mode, so none of "
                    f"them {did[kind]} ({_name_some(still)}); where that is not meant, pass them a flag that follows "
                    "model.train(), or give the model's __call__ an argument `train`"
                )
        if self.set_params:
            lines.append(
                f"{name}: its call sets parameters ({_name_some(self.set_params)}), which the optimizer alone does "
                "here: what it sets is lost after the step; make them an nnx.Variable of another kind"
            )
        if self.new:
            lines.append(
                f"{name}: its call makes variables that last for that call alone ({_name_some(self.new)}); make one "
                "that is to be kept in __init__"
            )
        return tuple(lines)


def _list_set(before: Any, after: Any) -> list[str]:
    """Return the paths of parameters that hold other values after a call; none where all do, as after `nnx.jit`."""
    old, new = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (before, after))
    if [path for path, _ in old] != [path for path, _ in new]:
        return []
    changed = [path for (path, one), (_, other) in zip(old, new, strict=True) if one is not other]
    return [".".join(str(entry.key) for entry in path) for path in changed] if len(changed) < len(old) else []


def _list_types(tree: Any) -> dict[str, str]:
    """Return what each variable of nested dicts is, by its path: `{"norm.mean": "float32[4]"}`."""
    described = jax.tree.map(lambda leaf: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]", tree)
    leaves = jax.tree_util.tree_flatten_with_path(described)[0]
    return {".".join(str(entry.key) for entry in path): said for path, said in leaves}


def _counts(node: Any) -> list[Any]:
    """Return the counters of all random streams below a module."""
    if node is None:
        return []
    return [variable.get_value() for _, variable in nnx.iter_graph(node) if isinstance(variable, nnx.RngCount)]


def _differ(before: list[Any], now: list[Any]) -> bool:
    return any(old is not new for old, new in zip(before, now, strict=False))


def _where(target: str | None) -> str:
    return f"model.target: {target}: " if target else "the model "


def _name_some(names: list[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
