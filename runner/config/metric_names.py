"""The metrics that a configuration chooses by: whether something measures them, and which of them mean better.

What our own objectives measure is known before jax starts. What a user's own measures is known once it is traced.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import OBJECTIVE_METRICS
from runner.checkpoint.record import Mode
from runner.checkpoint.retention import KeepBest
from runner.checkpoint.strategy import NewBest
from runner.config.evaluations import Evaluation, Evaluations, ExternalEvaluation, MetricsEvaluation
from runner.config.explain import suggest_word
from runner.errors import ConfigError

if TYPE_CHECKING:
    from runner.config.schema import Config

# What is better for metrics that mean the same everywhere.
BETTER: Mapping[str, Mode] = {
    "loss": "min",
    "accuracy": "max",
    "bits_per_byte": "min",
    "bits_per_token": "min",
    "absolute_error": "min",
}


@dataclass(frozen=True)
class ChosenMetric:
    """A metric that something is chosen by.

    Attributes:
        key: where the configuration has it, as `score.metric`.
        metric: its name, as `eval/loss`.
        mode: whether the least or the most of it is chosen.
    """

    key: str
    metric: str
    mode: Mode


def list_chosen_metrics(config: Config) -> list[ChosenMetric]:
    """Return every metric that the score, a rule of saving or retention, or early stopping looks at."""
    found = [ChosenMetric("score.metric", config.score.metric, config.score.mode)]
    rules = {f"ckpt.save.{name}": rule for name, rule in config.ckpt.save.items()} | {
        f"retention.{name}": rule for name, rule in config.retention.items()
    }
    for key, rule in rules.items():
        if isinstance(rule, NewBest | KeepBest):
            found.append(ChosenMetric(f"{key}.metric", rule.metric, rule.mode))
    if config.stop.metric is not None:
        found.append(ChosenMetric("stop.metric", config.stop.metric, config.stop.mode or config.score.mode))
    return found


def check_chosen_metrics(config: Config) -> None:
    """Raise ConfigError where something is chosen by a metric that no evaluation can give, as far as is known by now.

    What a user's own objective measures is not: see `check_metric_names`.
    """
    names = _find_possible_names(config)
    for chosen in list_chosen_metrics(config):
        _check_evaluation(chosen, config.eval)
        if names is not None and not _is_users_own(chosen, config.eval):
            _check_name(chosen, {split: names for split in _list_measuring(config.eval)})


def check_metric_names(config: Config, names_by_split: Mapping[str, Collection[str]]) -> None:
    """Raise ConfigError where something is chosen by a metric that is not measured.

    Args:
        config: the configuration, every evaluation of which is checked already.
        names_by_split: what each evaluation measures, by its name.
    """
    for chosen in list_chosen_metrics(config):
        # What a function of the user's own measures is known when it has been called.
        if not _is_users_own(chosen, config.eval):
            _check_name(chosen, names_by_split)


def warn_of_worst_as_best(config: Config) -> list[str]:
    """Return a warning for each metric of which the worst value would be chosen as the best."""
    lines: dict[tuple[str, Mode], str] = {}
    for chosen in list_chosen_metrics(config):
        meant = BETTER.get(chosen.metric.partition("/")[2])
        if meant is not None and meant != chosen.mode:
            key, extreme = chosen.key.removesuffix("metric") + "mode", {"min": "least", "max": "most"}[chosen.mode]
            # Rules take their metric from the score: told once.
            lines.setdefault(
                (chosen.metric, chosen.mode),
                f"warning: {key}={chosen.mode}: the {extreme} {chosen.metric} counts as the best; should it be the "
                f"other way round, say {key}={meant}",
            )
    return list(lines.values())


def _find_possible_names(config: Config) -> tuple[str, ...] | None:
    """Return every metric that the objective may measure; None where it is the user's own."""
    objective, model = config.objective.kind, config.model
    if objective in ("external", "program"):
        return None
    if objective != "default":
        return OBJECTIVE_METRICS[objective]
    # Which of several it becomes is known when the data is read.
    usual = getattr(config.data, "objective", "") or model.objective
    usual = usual or ("next_token" if config.data.gives == "tokens" else "")
    possible = {"classify": ("classify", "regress"), "": tuple(OBJECTIVE_METRICS)}.get(usual, (usual,))
    return tuple(dict.fromkeys(name for each in possible for name in OBJECTIVE_METRICS[each]))


def list_choosable(evaluations: Evaluations) -> list[str]:
    """Return the evaluations that something may be chosen by: none of a test set, and none that comes once."""
    return [name for name in _list_measuring(evaluations) if _may_choose(evaluations[name])]


def _list_measuring(evaluations: Evaluations) -> list[str]:
    return [name for name, option in evaluations.items() if _may_measure(option)]


def _may_measure(option: Evaluation | None) -> bool:
    return isinstance(option, MetricsEvaluation | ExternalEvaluation)


def _is_users_own(chosen: ChosenMetric, evaluations: Evaluations) -> bool:
    return isinstance(evaluations.get(chosen.metric.partition("/")[0]), ExternalEvaluation)


def _check_evaluation(chosen: ChosenMetric, evaluations: Evaluations) -> None:
    """Raise ConfigError where the evaluation that is to give a metric is not there, or may not be chosen by."""
    split, _, name = chosen.metric.partition("/")
    where, option = f"{chosen.key}={chosen.metric}", evaluations.get(split)
    fit = list_choosable(evaluations)
    if isinstance(option, ExternalEvaluation) and not name:
        raise ConfigError(f"{where}: expected the name of a number that it gives as well: {split}/NAME")
    if _may_choose(option):
        return
    instead = f"choose a metric of {', '.join(fit)}" if fit else "add one: eval=[metrics,…]"
    if isinstance(option, MetricsEvaluation) and option.looks_at_test_set:
        raise ConfigError(f"{where}: eval.{split} looks at the test set, and nothing is chosen by that; {instead}")
    if _may_measure(option):
        raise ConfigError(f"{where}: eval.{split}.steps=last: is measured once, so there is no choice; {instead}")
    if split == "train":
        way_out = f"say train_set/{name or 'loss'} and add eval=[metrics,train_set]"
        raise ConfigError(f"{where}: a step of training measures its own batch alone; {way_out}, or {instead}")
    # Without its split, or with the split of another tool.
    ours = [each for each in fit if isinstance(evaluations[each], MetricsEvaluation)]
    near = suggest_word(chosen.metric, [f"{each}/{known}" for each in ours for known in _all_names()])
    there = f"there is: {', '.join(fit)}" if fit else "add it: eval=[metrics,…]"
    raise ConfigError(f"{where}: no evaluation named '{split}' measures anything ({there}){near}")


def _may_choose(option: Evaluation | None) -> bool:
    if isinstance(option, MetricsEvaluation) and option.looks_at_test_set:
        return False
    return option is not None and _may_measure(option) and option.steps != "last"


def _check_name(chosen: ChosenMetric, names_by_split: Mapping[str, Collection[str]]) -> None:
    """Raise ConfigError where an evaluation does not measure what is asked of it."""
    split, _, name = chosen.metric.partition("/")
    names = names_by_split.get(split, ())
    if name in names:
        return
    near = suggest_word(chosen.metric, [f"{split}/{known}" for known in names])
    measured = f"it measures {', '.join(f'{split}/{known}' for known in names)}" if names else "it measures nothing"
    raise ConfigError(f"{chosen.key}={chosen.metric}: eval.{split} does not measure that; {measured}{near}")


def _all_names() -> list[str]:
    return list(dict.fromkeys(name for names in OBJECTIVE_METRICS.values() for name in names))
