"""What Hydra's sweepers call with the jobs of a sweep: all are composed and validated, and only then is any started.

Hydra accepts launchers from a package named `hydra_plugins` alone. Ours is registered under that name and lives here,
so that nobody has to install a second package, and none is found where this one is not asked for.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

PACKAGE = "hydra_plugins"
NAMESPACE = f"{PACKAGE}.holdfast"

# One job: what it was composed to, and its overrides.
Job = tuple[DictConfig, tuple[str, ...]]
Launch = Callable[[Sequence[Job]], Sequence[float | None]]


class HoldfastLauncher(Launcher):
    """Hands every job on to `launch`, which says the score of each; Hydra makes the object, so that is the class's."""

    launch_all: ClassVar[Launch]

    def __init__(self, **_: Any) -> None:  # what it takes is read from the composed configuration
        self._config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One `JobReturn` a job, with its score; NaN where it has none, which an optimizer takes for a failure."""
        jobs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            composed = self._context.config_loader.load_sweep_config(self._config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = str(number), number
            jobs.append((composed, tuple(word.removeprefix("++") for word in filter_overrides(overrides))))
        before = HydraConfig.instance().cfg
        try:
            scores = type(self).launch_all(jobs)
        finally:
            HydraConfig.instance().cfg = before
        return [
            JobReturn(overrides=words, status=JobStatus.COMPLETED, _return_value=math.nan if score is None else score)
            for (_, words), score in zip(jobs, scores, strict=True)
        ]


def register(launch: Launch) -> None:
    """Let Hydra find the launcher, and have it hand the jobs of this process's sweep on to `launch`."""
    HoldfastLauncher.launch_all = staticmethod(launch)
    HoldfastLauncher.__module__ = NAMESPACE
    Plugins.instance().register(HoldfastLauncher)
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:  # no other plugin is installed
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.holdfast = sys.modules[NAMESPACE] = sys.modules[__name__]  # type: ignore[attr-defined]
