"""Hold what came of a run that was called from Python: how it ended, its measurements as arrays, its model. No jax."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from runner.errors import HoldfastError
from runner.installation import import_own_packages
from runner.log.jsonl import read_metric_lines
from runner.rundir.layout import RunDir
from runner.text import display_path
from runner.values import Ending

if TYPE_CHECKING:
    import numpy as np
    from flax import nnx

    from runner.config.schema import Config
    from runner.train.built import LoadedProgram
    from runner.train.step import Weights


class MetricSeries(NamedTuple):
    """One metric over the steps at which it was measured: `plt.plot(*result.metrics["eval/loss"])`.

    Attributes:
        steps: int64, in order.
        values: float64, one for each of them.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, repr=False)
class RunResult:
    """Hold what came of one run.

    Attributes:
        directory: where it lives, an absolute path.
        ending: `finished`, `preempted` (call it again to go on), `evaluated`; `diverged` and `failed` only in the
            `results` of a RunError.
        step: its last completed step.
        score: the best value of the metric that says what is best; for `evaluated` what was measured; None where
            nothing was.
        exit_code: that of its process, as the command has it.
    """

    directory: Path
    ending: Ending
    step: int
    score: float | None
    exit_code: int

    def __repr__(self) -> str:
        """Return a line for people; the directory as seen from here."""
        score = "None" if self.score is None else f"{self.score:.6g}"
        try:
            where = display_path(self.directory)
        # The working directory was deleted.
        except OSError:
            where = str(self.directory)
        return f"RunResult({where}: {self.ending}, step={self.step}, score={score})"

    @cached_property
    def metrics(self) -> Mapping[str, MetricSeries]:
        """Everything that the run has measured, by split and name, as `eval/loss`; read when it is first asked for.

        It is what metrics.jsonl holds, where an interruption leaves no trace. Names of files are in `media`.
        """
        import numpy as np

        numbers: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for step, name, value in self._measured:
            if not isinstance(value, str):
                numbers[name].append((step, value))
        series = {}
        for name, pairs in numbers.items():
            steps, values = zip(*pairs, strict=True)
            series[name] = MetricSeries(np.array(steps, np.int64), np.array(values, np.float64))
        return series

    @cached_property
    def media(self) -> Mapping[str, Mapping[int, Path]]:
        """The pictures, samples and other files that evaluations made: by name, then by step."""
        found: dict[str, dict[int, Path]] = defaultdict(dict)
        for step, name, value in self._measured:
            if isinstance(value, str):
                found[name][step] = self.directory / value
        return dict(found)

    def load(
        self, weights: Weights = "params", *, at: str | int = "newest", trust: bool = False
    ) -> tuple[nnx.Module | LoadedProgram, Config]:
        """Return the run's model, in evaluation mode on one device, and its configuration, as `holdfast.load` does.

        Args:
            weights: `"ema"` takes the average that `optim.ema` keeps.
            at: a step, `"newest"` or `"best"`.
            trust: whether code that the run names may be imported here: a model of your own.

        Raises RefusedError or ConfigError as `load` does, and RefusedError where that code was edited since an earlier
        call: Python would make the model with the old one.
        """
        import_own_packages()
        # Here, because it imports jax.
        from runner.inspect.load_model import load_model
        from runner.notebook.stale_modules import refuse_stale_modules

        model, config = load_model(f"{self.directory}@{at}", weights, trust=trust)
        refuse_stale_modules(config.document)
        return model, config

    @cached_property
    def _measured(self) -> list[tuple[int, str, float | str]]:
        """Every value with its step and its full name, in the order in which they were measured."""
        return [
            (step, f"{split}/{name}", value)
            for step, split, values in read_metric_lines(RunDir(self.directory).metrics)
            for name, value in values.items()
        ]


class RunError(HoldfastError):
    """Raised where a run, or one of a sweep, could not be worked on, crashed or diverged.

    Attributes:
        message: the line that the command says after `error: `; for a crash the end of its traceback.
        exit_code: what the process ended with; -N where signal N killed it. The contract's codes are in
            docs/guarantees.md.
        directory: where the run lives; None where there is none.
        results: how each run of the call stands, in order, those that failed among them.
    """

    def __init__(self, message: str, exit_code: int, directory: Path | None = None, results: Sequence[RunResult] = ()):
        super().__init__(message)
        self.message, self.exit_code, self.directory, self.results = message, exit_code, directory, tuple(results)

    def __reduce__(self) -> tuple[object, ...]:
        """Let it be pickled, for whoever calls from a pool of processes."""
        return RunError, (self.message, self.exit_code, self.directory, self.results)
