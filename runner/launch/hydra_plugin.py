"""Stand in for Hydra's launchers and sweepers: they compose the jobs of a sweep and hand them on, none is started.

Hydra accepts launchers from a package named `hydra_plugins` alone. Ours is registered under that name and lives here,
so that nobody has to install a second package, and none is found where this one is not asked for.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from runner.errors import ConfigError
from runner.launch.command_words import quote_target, spell_out
from runner.launch.hydra_keys import BASIC_SWEEPER, OPTUNA_SWEEPER, refuse_passing_values
from runner.launch.job_composer import JobComposer
from runner.launch.study import SearchOptions, Study
from runner.launch.submitit_sweep import RunOnWorkers, WorkerTask

PACKAGE = "hydra_plugins"
NAMESPACE = f"{PACKAGE}.holdfast"
# Each of them is composed and checked before the first is started, which takes about a quarter of a second.
MAX_RUNS = 10_000
INSTALL_SEARCH = 'pip install -c constraints.txt -e ".[search]"'

# The configuration of `hydra/sweeper=optuna`. Another seed of the sampler is another search.
OPTUNA_CONFIG = {
    "_target_": f"{NAMESPACE}.HoldfastSearch",
    "sampler": {"seed": 0},
    **asdict(SearchOptions()),
    "custom_search_space": None,
    "params": None,
}

# One job: what it was composed to, and its overrides.
ComposedJob = tuple[DictConfig, tuple[str, ...]]


@dataclass(frozen=True)
class SweepJobs:
    """The jobs that a sweeper asks for at once, composed and not yet judged.

    Attributes:
        jobs: one a run.
        study: the search whose trials they are; None for a plain sweep.
        run_on_workers: has the launcher of another plugin take tasks to its workers.
    """

    jobs: Sequence[ComposedJob]
    study: Study | None
    run_on_workers: RunOnWorkers


# Returns the score of each job, None where it has none.
Launch = Callable[[SweepJobs], Sequence[float | None]]


class HoldfastLauncher(Launcher):
    """Hand the jobs of a sweep to `launch_all`, which returns the score of each.

    Attributes:
        launch_all: what the jobs are handed to. Hydra makes the object, so it is the class's.
        replaced: the launchers of other plugins, by the name a configuration has for them.
        study: what the jobs are trials of; None for a plain sweep.
    """

    launch_all: ClassVar[Launch]
    replaced: ClassVar[dict[str, type[Launcher]]] = {}

    def __init__(self, **options: object) -> None:
        # Kept for the launcher of another plugin: ours are read from the composed configuration.
        self._options = options
        self._config: DictConfig
        self.study: Study | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands to a launcher."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose the jobs and hand them on. Return one `JobReturn` a job, with its score.

        The score of a job that has none is NaN or, to a search, None.
        """
        jobs, spelled, composer = [], [], JobComposer(self._context.config_loader, self._config)
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            words = list(overrides) if self.study is None else self.study.respell(overrides)
            words = [word for each in words for word in spell_out(each)]
            spelled.append(words)
            composed = composer.compose(words)
            refuse_passing_values({key: value for key, value in _to_unresolved(composed).items() if key != "hydra"})
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = str(number), number
            jobs.append(
                (composed, tuple(quote_target(word.removeprefix("++")) for word in filter_overrides(overrides)))
            )
        scores = type(self).launch_all(SweepJobs(jobs, self.study, partial(self._run_on_workers, spelled)))
        # Optuna takes a trial with a NaN for a mistake of its caller.
        none = math.nan if self.study is None else None
        return [
            JobReturn(overrides=words, status=JobStatus.COMPLETED, _return_value=none if score is None else score)
            for (_, words), score in zip(jobs, scores, strict=True)
        ]

    def _run_on_workers(
        self, job_overrides: Sequence[Sequence[str]], task: WorkerTask, names: Mapping[int, str]
    ) -> list[object]:
        """Have the other plugin's launcher that was chosen do the task on workers, once for each of these jobs."""
        launcher = self.replaced[self._config.hydra.launcher._target_](**self._options)
        launcher.setup(hydra_context=self._context, task_function=task, config=self._config)
        named = [[*job_overrides[number], f"hydra.job.name={name}"] for number, name in names.items()]
        return [returned.return_value for returned in launcher.launch(named, 0)]


class BoundedSweeper(Sweeper):
    """Hydra's own sweeper, for a number of runs that ends, and without the multirun.yaml that it writes at once."""

    basic: ClassVar[Any]

    def __init__(self, **options: object) -> None:
        self._sweeper = self.basic(**options)

    def setup(self, *, config: DictConfig, hydra_context: HydraContext, **parts: object) -> None:
        """Take what Hydra hands to a sweeper. Raises ConfigError where a sweep would be composed in batches."""
        if config.hydra.sweeper.max_batch_size is not None:
            raise ConfigError(
                "hydra.sweeper.max_batch_size: all runs are checked before any is started; leave it out "
                "(hydra.launcher.parallel=N: so many at once)"
            )
        self._context = hydra_context
        self._sweeper.setup(config=config, hydra_context=hydra_context, **parts)

    def sweep(self, arguments: list[str]) -> Any:
        """Hand the product of all choices to the launcher. Raises ConfigError where that is too many runs, or none."""
        words = [*(f"{key}={value}" for key, value in (self._sweeper.params or {}).items()), *arguments]
        overrides = OverridesParser.create(config_loader=self._context.config_loader).parse_overrides(words)
        # Where a key is there twice, the last one counts.
        counts = {override.get_key_element(): count_values(override) for override in overrides}
        if (runs := math.prod(counts.values())) > MAX_RUNS:
            raise ConfigError(
                f"a sweep of {runs:,} runs: {MAX_RUNS:,} are checked and started at most; name fewer values"
            )
        (jobs,) = self._sweeper.split_arguments(overrides, None)
        return self._sweeper.launcher.launch(jobs, 0)


class HoldfastSearch(Sweeper):
    """`hydra/sweeper=optuna`, typed or in a YAML: hand the search on to `defer`, not begun.

    It begins when Hydra is done with the command line.
    """

    defer: ClassVar[Callable[[Callable[[], None]], None]]

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._search: Sweeper

    def setup(self, **parts: Any) -> None:
        """Take what Hydra hands to a sweeper. Raises ConfigError where Optuna is not installed."""
        if not _has_optuna():
            raise ConfigError(f"hydra/sweeper=optuna: needs the extra `search`; {INSTALL_SEARCH}")
        # Optuna is an extra, and takes long to import: a sweep is begun without it.
        from runner.launch.optuna_sweeper import ReplayingSweeper

        self._search = ReplayingSweeper(**self._options)
        self._search.setup(**parts)

    def sweep(self, arguments: list[str]) -> None:
        """Hand the search on, not begun."""
        type(self).defer(partial(self._search.sweep, arguments))


def hand_jobs_to(launch: Launch) -> None:
    """Have the launcher hand the jobs of this process's sweep to `launch`."""
    HoldfastLauncher.launch_all = staticmethod(launch)


def register_plugins(launch: Launch, defer: Callable[[Callable[[], None]], None]) -> None:
    """Let Hydra find our launcher and our search, and have them hand on what they get: to `launch`, and to `defer`.

    The launcher stands in for every other one: whichever is chosen, all jobs are valid before any is started.
    """
    hand_jobs_to(launch)
    HoldfastSearch.defer = staticmethod(defer)
    classes = Plugins.instance().class_name_to_class
    for name, found in classes.items():
        if issubclass(found, Launcher) and found is not HoldfastLauncher:
            HoldfastLauncher.replaced[name] = found
            classes[name] = HoldfastLauncher
    # Once a process: of the second call (in tests) the class in its place is ours already.
    if classes[BASIC_SWEEPER] is not BoundedSweeper:
        BoundedSweeper.basic, classes[BASIC_SWEEPER] = classes[BASIC_SWEEPER], BoundedSweeper
    _register_class(HoldfastLauncher)
    _register_search()
    # A file that names the plugin's own sweeper, as its manual does, gets ours.
    if OPTUNA_SWEEPER in classes:
        classes[OPTUNA_SWEEPER] = HoldfastSearch
    try:
        package = importlib.import_module(PACKAGE)
    # No other plugin is installed, so the package is not there.
    except ImportError:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.holdfast = sys.modules[NAMESPACE] = sys.modules[__name__]  # type: ignore[attr-defined]


def count_values(override: Override) -> int:
    """Return how many values an override has in a sweep. Raises ConfigError where it has none, or no end of them."""
    value, shown = override.value(), str(override.input_line).lstrip("+")
    if not override.is_sweep_override():
        return 1
    if override.is_interval_sweep():
        raise ConfigError(f"{shown}: an interval is for a search; add hydra/sweeper=optuna, or name values")
    if not isinstance(value, RangeSweep):
        count = sum(1 for _ in override.sweep_string_iterator())
    else:
        # Not counted out: of `range(0,1e9)` Hydra makes a list.
        ends = (value.start, value.stop, value.step)
        if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends) or not value.step:
            raise ConfigError(f"{shown}: a range needs a start, a stop and a step other than 0")
        count = max(0, math.ceil((value.stop - value.start) / value.step))  # type: ignore[operator]
    if not count:
        raise ConfigError(f"{shown}: stands for no value; name those that you mean")
    return count


def _register_search() -> None:
    """Put our search in the place of the Optuna plugin's own, with that plugin's samplers."""
    store, samplers = ConfigStore.instance(), [{"sampler": "tpe"}] if _has_optuna() else []
    store.store("optuna", {"defaults": [*samplers, "_self_"], **OPTUNA_CONFIG}, group="hydra/sweeper")
    if samplers:
        # A grid is a sweep: it needs no search.
        store.repo["hydra"]["sweeper"]["sampler"].pop("grid.yaml", None)
    _register_class(HoldfastSearch)


def _register_class(plugin: type[Launcher] | type[Sweeper]) -> None:
    """Let Hydra find a class of this module in the namespace of plugins."""
    plugin.__module__ = NAMESPACE
    Plugins.instance().register(plugin)


def _to_unresolved(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return dict(plain)


def _has_optuna() -> bool:
    """Return whether the plugin is installed: Hydra, which has looked for plugins by now, knows its samplers."""
    return "sampler" in ConfigStore.instance().repo["hydra"]["sweeper"]
