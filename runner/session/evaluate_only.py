"""Evaluate a run once more, finished or not: it is only read, and what is found goes into a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from runner import files
from runner.checkpoint.proving_reader import ProvingReader
from runner.checkpoint.record import locate_checkpoint
from runner.checkpoint.restore import restore_exactly
from runner.config.schema import Config
from runner.rundir.layout import RunDir
from runner.rundir.numerics import adopt_numerics
from runner.text import display_path
from runner.train import broken_data, dataset
from runner.train.build import build, read_train_state
from runner.train.built import describe_run
from runner.train.compile import compile_eval
from runner.train.compile_cache import enable_compile_cache
from runner.train.evaluator import EvaluationRun
from runner.train.moved_data import read_moved_data
from runner.train.own_tokenizer import read_with_own_tokenizer
from runner.values import MetricValues


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured of one checkpoint, by evaluation.

    Attributes:
        run: whose it is.
        step: that of the checkpoint.
        values: by evaluation; files are named as seen from the run's directory, or from `folder` if that is elsewhere.
        folder: where the results lie.
    """

    run: RunDir
    step: int
    values: dict[str, MetricValues]
    folder: Path

    def score(self, metric: str) -> float | None:
        """Return the metric that says what is best, as `eval/loss`; None where it was not measured."""
        split, _, name = metric.partition("/")
        value = self.values.get(split, {}).get(name)
        return value if isinstance(value, float) else None


def evaluate_checkpoint(
    config: Config, run: RunDir, say: Callable[[str], None], folder: Path | None = None
) -> EvaluationResult:
    """Do every evaluation of a configuration on the checkpoint that `step=` names, or on the newest.

    What is found goes into `folder`, or into `eval/STEP` of the run where none is named.

    Raises RefusedError where that is not good or the data has changed, ConfigError where data or model does not fit.
    """
    checkpoint = locate_checkpoint(f"{run.path}@{config.step or 'newest'}")
    adopt_numerics(run, say)
    enable_compile_cache(config.compile_cache, say)
    # steps=0 asked for this evaluation; what is built for so many steps (a schedule, a program) is built as it was.
    steps = run.read_status().get("steps") or int(checkpoint.name)
    config = replace(config, train=replace(config.train, steps=steps, epochs=None))
    config = read_with_own_tokenizer(config, run)
    built = build(config, read_moved_data(config, run) or dataset.read_as_before(config.data, run))
    built.evaluator.check_splits()
    dataset.refuse_other_data(run, built.sources)
    broken_data.tell_skipped(run, built.sources, say)
    say(" · ".join(filter(None, [describe_run(built, config), built.evaluator.describe_samples()])))
    checksums = config.ckpt.verify != "off"
    reader = ProvingReader(partial(read_train_state, built), checksums=checksums)
    record, state = restore_exactly(checkpoint, reader.read, checksums=checksums, measure=reader.measure)
    program = compile_eval(built, config)
    where, name = (run.path, f"eval/{record.step}/{{}}") if folder is None else (folder, "{}")
    how = EvaluationRun(program, where, name, step=record.step, say=say)
    folder = folder or run.path / f"eval/{record.step}"
    values = built.evaluator(list(config.eval), state, how)
    found = EvaluationResult(run, record.step, values, folder)
    document = {"step": record.step, "results": values, "train.eval_batches": config.train.eval_batches}
    files.make_folder(folder)
    files.replace_file(folder / "results.json", files.format_json(document, indent=1) + "\n")
    for line in format_results(found):
        say(line)
    return found


def _loss_first(item: tuple[str, float | str]) -> tuple[bool, str]:
    return item[0] != "loss", item[0]


def format_results(found: EvaluationResult) -> list[str]:
    """Return what a person reads: one line an evaluation."""
    width = max(map(len, found.values), default=0)
    shown = [
        "  ".join(
            value if isinstance(value, str) else f"{name} {value:.6g}"
            for name, value in sorted(values.items(), key=_loss_first)
        )
        for values in found.values.values()
    ]
    return [
        f"{found.run}@{found.step}",
        *(f"  {name:<{width}}  {line}" for name, line in zip(found.values, shown, strict=True)),
        f"also in {display_path(found.folder / 'results.json')}",
    ]
