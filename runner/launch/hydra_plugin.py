"""What Hydra's sweepers call with the jobs of a sweep: all are composed and validated, and only then is any started.

Hydra accepts launchers from a package named `hydra_plugins` alone. Ours is registered under that name and lives here,
so that nobody has to install a second package, and none is found where this one is not asked for.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from runner.errors import ConfigError
from runner.launch.study import Search, Study
from runner.launch.submitit import Carry, Errand

PACKAGE = "hydra_plugins"
NAMESPACE = f"{PACKAGE}.holdfast"
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
INSTALL = 'pip install -c constraints.txt -e ".[search]"'

OPTUNA = {
    "_target_": f"{NAMESPACE}.HoldfastSearch",
    "sampler": {"seed": 0},  # another seed is another search
    **asdict(Search()),
    "custom_search_space": None,
    "params": None,
}

# One job: what it was composed to, and its overrides.
Job = tuple[DictConfig, tuple[str, ...]]


@dataclass(frozen=True)
class SweepJobs:
    """The jobs that a sweeper asks for at once, composed and not yet judged.

    Attributes:
        study: the search whose trials they are; None for a plain sweep.
        carry: has the launcher of another plugin take work to its workers.
    """

    jobs: Sequence[Job]
    study: Study | None
    carry: Carry


# → the score of each job, None where it has none.
Launch = Callable[[SweepJobs], Sequence[float | None]]


class HoldfastLauncher(Launcher):
    """Hands every job on to `launch`, which says the score of each; Hydra makes the object, so that is the class's."""

    launch_all: ClassVar[Launch]
    others: ClassVar[dict[str, type[Launcher]]] = {}  # those of other plugins, by the name a configuration has for them

    def __init__(self, **options: Any) -> None:  # ours are read from the composed configuration
        self._options = options
        self._config: DictConfig
        self.study: Study | None = None  # what the jobs are trials of

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One `JobReturn` a job, with its score; where it has none, NaN or, to a search, nothing."""
        jobs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            words = list(overrides) if self.study is None else self.study.words(overrides)
            composed = self._context.config_loader.load_sweep_config(self._config, words)
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = str(number), number
            jobs.append((composed, tuple(word.removeprefix("++") for word in filter_overrides(overrides))))
        scores = type(self).launch_all(SweepJobs(jobs, self.study, partial(self._carry, job_overrides)))
        none = math.nan if self.study is None else None  # Optuna takes a trial with a NaN for a mistake of its caller
        return [
            JobReturn(overrides=words, status=JobStatus.COMPLETED, _return_value=none if score is None else score)
            for (_, words), score in zip(jobs, scores, strict=True)
        ]

    def _carry(self, job_overrides: Sequence[Sequence[str]], errand: Errand, names: Mapping[int, str]) -> list[Any]:
        """Have the plugin's launcher that was chosen take the errand to workers, once for each of these jobs."""
        other = self.others[self._config.hydra.launcher._target_](**self._options)
        other.setup(hydra_context=self._context, task_function=errand, config=self._config)
        named = [[*job_overrides[number], f"hydra.job.name={name}"] for number, name in names.items()]
        return [returned.return_value for returned in other.launch(named, 0)]


class TidySweeper(Sweeper):
    """Hydra's own sweeper, without what that writes down before anything is checked."""

    basic: ClassVar[Any]

    def __init__(self, **options: Any) -> None:
        self._sweeper = self.basic(**options)

    def setup(self, *, config: DictConfig, **parts: Any) -> None:
        """Raises ConfigError where not all runs would be known before one is started."""
        if config.hydra.sweeper.max_batch_size is not None:
            raise ConfigError(
                "hydra.sweeper.max_batch_size: all runs are checked before any is started; leave it out "
                "(hydra.launcher.parallel=N: so many at once)"
            )
        self._config = config
        self._sweeper.setup(config=config, **parts)
        self._sweeper.validate_batch_is_legal = lambda batch: None  # composes all, as our launcher does: half the time

    def sweep(self, arguments: list[str]) -> Any:
        """Hand the product of all choices to the launcher."""
        try:
            return self._sweeper.sweep(arguments)
        finally:
            _tidy(Path(self._config.hydra.sweep.dir))


class HoldfastSearch(Sweeper):
    """`hydra/sweeper=optuna`, typed or in a YAML; what needs Optuna is imported where there is a search.

    It only hands itself on to `defer`: the search begins when Hydra is done with the command line.
    """

    defer: ClassVar[Callable[[Callable[[], None]], None]]

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._search: Sweeper

    def setup(self, **parts: Any) -> None:
        """Raises ConfigError where Optuna is not installed."""
        if not _has_optuna():
            raise ConfigError(f"hydra/sweeper=optuna: needs the extra `search`; {INSTALL}")
        from runner.launch.optuna_sweeper import OptunaSearch

        self._search = OptunaSearch(**self._options)
        self._search.setup(**parts)

    def sweep(self, arguments: list[str]) -> None:
        """Hand the search on, not begun."""
        type(self).defer(partial(self._search.sweep, arguments))


def call_back(launch: Launch) -> None:
    """Have the launcher hand the jobs of this process's sweep to `launch`."""
    HoldfastLauncher.launch_all = staticmethod(launch)


def register(launch: Launch, defer: Callable[[Callable[[], None]], None]) -> None:
    """Let Hydra find our launcher and our search, and have them hand on what they get: to `launch`, and to `defer`.

    The launcher stands in for every other one: whichever is chosen, all jobs are valid before any is started.
    """
    call_back(launch)
    HoldfastSearch.defer = staticmethod(defer)
    classes = Plugins.instance().class_name_to_class
    for name, found in classes.items():
        if issubclass(found, Launcher) and found is not HoldfastLauncher:
            HoldfastLauncher.others[name] = found
            classes[name] = HoldfastLauncher
    if classes[BASIC] is not TidySweeper:
        TidySweeper.basic, classes[BASIC] = classes[BASIC], TidySweeper
    _present(HoldfastLauncher)
    _register_search()
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:  # no other plugin is installed
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.holdfast = sys.modules[NAMESPACE] = sys.modules[__name__]  # type: ignore[attr-defined]


def _tidy(folder: Path) -> None:
    """Take away what Hydra wrote down, and the folders it made for that."""
    (folder / "multirun.yaml").unlink(missing_ok=True)
    with suppress(OSError):  # not empty: something was there before
        for empty in (folder, *list(folder.parents)[:2]):  # .sweep, NAME, ROOT: what is above was not made by it
            empty.rmdir()


def _register_search() -> None:
    """In the place of the plugin's own."""
    store, samplers = ConfigStore.instance(), [{"sampler": "tpe"}] if _has_optuna() else []
    store.store("optuna", {"defaults": [*samplers, "_self_"], **OPTUNA}, group="hydra/sweeper")
    if samplers:
        store.repo["hydra"]["sweeper"]["sampler"].pop("grid.yaml", None)  # a grid is a sweep: it needs no search
    _present(HoldfastSearch)


def _present(plugin: type[Launcher] | type[Sweeper]) -> None:
    """Let Hydra find a class of this module in its own namespace."""
    plugin.__module__ = NAMESPACE
    Plugins.instance().register(plugin)


def _has_optuna() -> bool:
    """Whether the plugin is installed: Hydra, which has looked for plugins by now, knows its samplers."""
    return "sampler" in ConfigStore.instance().repo["hydra"]["sweeper"]
