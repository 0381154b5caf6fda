"""Do evaluations: numbers for the log, and files for the run's directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax

from data.pipeline import iterate_in_order
from data.sources import Source, Sources
from models.objectives import MergeableMetric
from runner import files, hosts
from runner.config.evaluations import Evaluation, Evaluations, ExternalEvaluation, MetricsEvaluation
from runner.config.explain import suggest_word
from runner.config.metric_names import ChosenMetric
from runner.errors import ConfigError
from runner.train.local_state import bring_here
from runner.train.step import make_key, with_weights
from runner.train.user_evaluation import (
    Asked,
    HeldOutBatches,
    UserFindings,
    call_user_evaluation,
    check_user_evaluation,
)
from runner.types import Batch, State, Tree
from runner.values import MetricValues, Say

# Sums over a batch, and `weight`; or values that know how they are put together, see `MergeableMetric`.
EvalStep: TypeAlias = Callable[[State, Batch, jax.Array], Mapping[str, Any]]


@dataclass(frozen=True)
class EvaluationRun:
    """How evaluations are run once, and where they leave their files.

    Attributes:
        eval_step: the compiled evaluation step.
        run_dir: the run's directory; files are named as seen from there.
        file: the name of a file without its suffix, with `{}` for that of the evaluation.
        between_batches: called before each batch; it may raise to end it all, and then nothing was measured.
        step: completed updates of what is evaluated.
        say: tells a person a line about what a function of the user's own gives.
        goes_on: whether what such a function does wrong is told, once, and the others go on; else it is raised.
    """

    eval_step: EvalStep
    run_dir: Path
    file: str
    between_batches: Callable[[], None] = lambda: None
    step: int = 0
    say: Say = lambda line: None
    goes_on: bool = False


class ContentMaker(Protocol):
    """Make the texts and pictures that evaluations ask of the thing that is trained."""

    def check_evaluation(self, name: str, option: Evaluation) -> None:
        """Raise ConfigError where an evaluation asks for what cannot be made."""

    def make_content(self, option: Evaluation, state: State) -> str | bytes:
        """Return a text, or a picture as PNG."""

    def sample_text(self, state: State) -> str | None:
        """Return a few lines to show at the end of training; None where what is trained makes no words."""

    def subject(self, state: State) -> Any:
        """Return what an evaluation of the user's own is given of a state: a live model, in evaluation mode.

        Its arrays are its own: what is changed, kept or donated to a computation does nothing to the state.
        """


@dataclass(frozen=True)
class Evaluator:
    """Does evaluations by name, of what is trained, on one set of data, in batches of one size.

    Attributes:
        maker: makes texts and pictures of a state.
        put: lays a batch on the devices, of which it is given the rows that this process makes.
        batches: evaluate on so many batches where an evaluation does not say how many.
        seed: of the random numbers that a function of the user's own is given.
        chosen: what something is chosen by.
        told: what was told already of functions of the user's own: once in a process.
        rows: which rows of a batch this process makes; None: all.
    """

    named: Evaluations
    sources: Sources
    maker: ContentMaker
    put: Callable[[Tree], Tree]
    batch_size: int
    batches: int
    seed: int = 0
    chosen: Sequence[ChosenMetric] = ()
    told: set[str] = field(default_factory=set)
    rows: slice | None = None

    def check_content(self) -> None:
        """Raise ConfigError where an evaluation asks for what cannot be made."""
        for name, option in self.named.items():
            self.maker.check_evaluation(name, option)
            if isinstance(option, ExternalEvaluation):
                check_user_evaluation(name, option)

    def check_splits(self) -> None:
        """Raise ConfigError where an evaluation looks at a set that the data does not hold out."""
        there = ["eval", "train", *self.sources.held_out]
        for name, option in self.named.items():
            if isinstance(option, MetricsEvaluation) and option.split not in there:
                near = suggest_word(option.split, there)
                raise ConfigError(
                    f"eval.{name}.split={option.split}: the data has no such set; it has {', '.join(there)}"
                    f"{near or f'; leave eval.{name} out'}"
                )

    def list_metric_names(self, measured: Iterable[str]) -> dict[str, list[str]]:
        """Return what each evaluation measures, by its name, where this is what the objective does."""
        names = [name for name in measured if name != "weight"]
        if self.sources.bytes_per_token and "bits_per_token" in names:
            names.append("bits_per_byte")
        return {name: names for name, option in self.named.items() if isinstance(option, MetricsEvaluation)}

    def describe_samples(self) -> str:
        """Return which evaluations look at a part of their examples alone: nothing where each looks at all of them."""
        parts = []
        for name, option in self.named.items():
            if not isinstance(option, MetricsEvaluation):
                continue
            source = self._find_source(option)
            looked_at, num_examples = self._count_batches(option, source) * self.batch_size, len(source)
            if looked_at < num_examples:
                what = {"eval": "held-out examples", "train": "training examples"}.get(
                    option.split, f"examples of {option.split}"
                )
                which = "evaluates" if name == "eval" else f"eval.{name}"
                parts.append(f"{which} {looked_at:,} of {num_examples:,} {what}")
        return ", ".join(parts)

    def __call__(self, names: Sequence[str], state: State, how: EvaluationRun) -> dict[str, MetricValues]:
        """Return what each evaluation measured, or the name of the file that it left; none where there is nothing."""
        found = {name: self._evaluate(name, state, how) for name in names}
        return {name: values for name, values in found.items() if values}

    def _evaluate(self, name: str, state: State, how: EvaluationRun) -> MetricValues:
        option = self.named[name]
        state = with_weights(state, option.weights)
        how.between_batches()
        if isinstance(option, MetricsEvaluation):
            source = self._find_source(option)
            return self._measure(source, self._count_batches(option, source), state, how)
        # What is no computation of all devices is done by one process, which others would only repeat.
        state = bring_here(state)
        if not hosts.is_lead():
            return {}
        if isinstance(option, ExternalEvaluation):
            return self._ask_user(name, option, state, how)
        content = self.maker.make_content(option, state)
        return {"file": _write_file(how, name, ".txt" if isinstance(content, str) else ".png", content)}

    def _ask_user(self, name: str, option: ExternalEvaluation, state: State, how: EvaluationRun) -> MetricValues:
        """Return what a function of the user's own measured, and the names of the files it left."""
        sources = self.sources
        # Where others wait for this, a stop is agreed on when it is done.
        between_batches = how.between_batches if hosts.is_alone() else lambda: None
        batches = HeldOutBatches(sources.eval, self.batch_size, between_batches)
        key = jax.random.fold_in(make_key(self.seed), how.step)
        asked = Asked(batches, how.step, key, sources.decode, tuple(sources.classes))
        try:
            found = call_user_evaluation(name, option, partial(self.maker.subject, state), asked, self.seed)
        except ConfigError as error:
            if not how.goes_on:
                raise
            rest = f"eval.{name} logs nothing at this step, and is tried again when it is due; told once"
            self._tell_once(how, name, f"{error}; {rest}")
            return {}
        # A stop that was asked for while the function read nothing.
        between_batches()
        self._tell_doubts(name, option, found, how)
        return {
            key: value
            if isinstance(value, float)
            else _write_file(how, name, f"{'' if found.is_alone else f'-{key}'}{value.suffix}", value.content)
            for key, value in found.values.items()
        }

    def _tell_doubts(self, name: str, option: ExternalEvaluation, found: UserFindings, how: EvaluationRun) -> None:
        """Tell what is not as it was meant in what a function gave: a number to choose by that is not there."""
        for key, caution in found.cautions.items():
            self._tell_once(how, f"{name}/{key}", f"eval.{name}.target: {option.target}: {key!r} {caution}")
        numbers = [key for key, value in found.values.items() if isinstance(value, float)]
        for chosen in self.chosen:
            split, _, metric = chosen.metric.partition("/")
            if split == name and metric not in numbers:
                near = suggest_word(metric, numbers) or f"; it gives {', '.join(numbers) or 'none'}"
                line = f"{chosen.key}={chosen.metric}: nothing is chosen, for eval.{name} gives no such number{near}"
                self._tell_once(how, f"{chosen.key} {chosen.metric}", line)

    def _tell_once(self, how: EvaluationRun, about: str, line: str) -> None:
        if about not in self.told:
            self.told.add(about)
            how.say(f"warning: {line}")

    def _find_source(self, option: MetricsEvaluation) -> Source:
        if option.split == "train":
            return self.sources.train
        return self.sources.eval if option.split == "eval" else self.sources.held_out[option.split]

    def _count_batches(self, option: MetricsEvaluation, source: Source) -> int:
        if option.batches == "all":
            return math.ceil(len(source) / self.batch_size)
        return option.batches or self.batches

    def _measure(self, source: Source, num_batches: int, state: State, how: EvaluationRun) -> MetricValues:
        """Return every metric over batches of a source that lie evenly apart: its mean, or what it computes itself."""
        found: dict[str, Any] = {}
        batches = iterate_in_order(source, batch_size=self.batch_size, num_batches=num_batches, rows=self.rows)
        for batch, weights in batches:
            how.between_batches()
            # Sums stay on the device: nobody waits for a batch before the next one is dispatched.
            new = how.eval_step(state, self.put(batch), self.put(weights))
            found = {name: _merge(found[name], value) for name, value in new.items()} if found else dict(new)
        weight = float(found.pop("weight"))
        values = {
            name: float(value.compute()) if isinstance(value, MergeableMetric) else _divide(float(value), weight)
            for name, value in found.items()
        }
        if (size := self.sources.bytes_per_token) and "bits_per_token" in values:
            # Comparable between encodings.
            values["bits_per_byte"] = values["bits_per_token"] / size
        return values


def _write_file(how: EvaluationRun, name: str, suffix: str, content: str | bytes) -> str:
    """Write a file of an evaluation, and return its name as seen from the run's directory."""
    file = how.file.format(name) + suffix
    files.make_folder((how.run_dir / file).parent)
    files.replace_file(how.run_dir / file, content)
    return file


def _divide(value: float, weight: float) -> float:
    """Return a mean; NaN where there is nothing to take one of, for every label is one to be ignored."""
    return value / weight if weight else math.nan


def _merge(before: Any, new: Any) -> Any:
    """Return a sum, or a metric, over what both have seen. Nothing waits for the device."""
    return before.merge(new) if isinstance(before, MergeableMetric) else before + new
