"""Search with Hydra's Optuna sweeper, but remember: its trials are runs, and a search that was killed goes on.

By itself the plugin asks for so many trials more at each start, and a trial that was killed never ends. Here each start
replays the search: the sampler is asked for every trial again, what was suggested before wins over what it says now,
and what is finished is read from disk. With a fixed seed a killed search suggests what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
from omegaconf import DictConfig, OmegaConf, open_dict
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from runner.errors import STOPPED
from runner.launch.child_process import handle_signals
from runner.launch.study import OPTIONS, Study, choose_direction, read_score, read_search_options, study_folder


class ReplayingSampler(optuna.samplers.BaseSampler):
    """Another sampler, whose suggestions are recorded, and give way to those that were recorded before."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, study: Study):
        self._sampler, self._study = sampler, study

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return what the other sampler samples together."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        """Return the values that are sampled together, by key."""
        # The sampler is asked also where its answer is not used: so its random stream stays where it would be.
        values = self._sampler.sample_relative(study, trial, search_space)
        return {key: self._study.recall_or_record(trial.number, key, value) for key, value in values.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        """Return the value of one key that is sampled by itself."""
        value = self._sampler.sample_independent(study, trial, param_name, param_distribution)
        return self._study.recall_or_record(trial.number, param_name, value)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Tell the other sampler what came of a trial."""
        self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Give the other sampler another seed."""
        self._sampler.reseed_rng()


class ReplayingSweeper(Sweeper):
    """A search with the plugin's options but for its database; `HoldfastSearch` hands on to it."""

    def __init__(self, sampler: optuna.samplers.BaseSampler, **options: object) -> None:
        self._sampler, self._options = sampler, options
        self._config: DictConfig
        self._context: HydraContext
        self._task: TaskFunction

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands to a sweeper."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Search until there are so many trials. Raises ConfigError before any of them where an option is wrong."""
        chosen: Any = OmegaConf.to_container(self._config.hydra.sweeper, resolve=True)
        options = read_search_options({key: chosen[key] for key in OPTIONS})
        if options.n_jobs is None:
            options = replace(options, n_jobs=self._config.hydra.launcher.get("parallel") or 1)
        composed = self._context.config_loader.load_sweep_config(self._config, _fixed_overrides(arguments))
        direction = choose_direction(options.direction, composed.score.mode)
        # What makes it this search and no other.
        description = [
            sorted(arguments),
            direction,
            chosen["sampler"],
            chosen["params"],
            chosen["custom_search_space"],
        ]
        folder = study_folder((Path(composed.root) / composed.name).resolve(), description)
        study = Study(folder, options, direction, arguments)
        # Between the batches as well, a request to stop ends the search.
        with study.lock, handle_signals(_exit_stopped):
            try:
                self._make_plugin(study).sweep(study.typed)
            except ValueError:
                # Optuna's complaint that there is no best among no scores: how it stands is said below.
                if any(read_score(member) is not None for member in study.members):
                    raise
            finally:
                if study.members:
                    print("\n".join(study.summary_lines()))

    def _make_plugin(self, study: Study) -> Any:
        """Return the plugin's own sweeper, set up for this study."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options = {**self._options, **asdict(study.options), "direction": study.direction, "max_failure_rate": 1.0}
        options |= {
            "sampler": ReplayingSampler(self._sampler, study),
            "storage": None,
            "study_name": None,
            "search_space": None,
        }
        plugin: Any = OptunaSweeper(**options)
        config = self._config.copy()
        with open_dict(config):
            # Where the plugin leaves its optimization_results.yaml.
            config.hydra.sweep.dir = str(study.folder)
        plugin.setup(hydra_context=self._context, task_function=self._task, config=config)
        plugin.sweeper.launcher.study = study
        return plugin


def _fixed_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the overrides that every trial has."""
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    return [word for word, override in zip(arguments, parsed, strict=True) if not override.is_sweep_override()]


def _exit_stopped(number: int, frame: FrameType | None) -> None:
    """End the process as a stopped run does: between batches nothing goes that would have to be saved."""
    raise SystemExit(STOPPED)
