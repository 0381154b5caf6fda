"""`model`: what the model of a configuration costs: parameters, FLOPs and stored bytes of each part, and of a step."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from runner.config.schema import Config
from runner.launch.compose import compose_run
from runner.text import format_scaled, format_table
from runner.values import Say, VerbResult

if TYPE_CHECKING:
    from runner.inspect.model_cost import ModelCost, ModelPart


def add_arguments(parser: ArgumentParser) -> None:
    """The configuration, as for run.py."""
    parser.usage = "python -m runner model [--json] [--] [key=value …]"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for run.py")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Compose, build, trace. Nothing is computed, and nothing written."""
    config = compose_run(arguments.overrides).config
    # The jax fence: a wrong configuration is answered without it.
    from runner.inspect.model_cost import summarize_model
    from runner.train.build import build
    from runner.train.built import describe_run

    built = build(config)
    found = summarize_model(built, config)
    say(describe_run(built, config))
    for line in _told(found, config):
        say(line)
    return VerbResult(_document(found))


def _document(found: ModelCost) -> dict[str, object]:
    parts = [asdict(part) for part in (*found.parts, found.total)]
    return {"parts": parts, "batch_size": found.batch_size, "step_flops": found.step_flops}


def _told(found: ModelCost, config: Config) -> list[str]:
    """A line for each part, and one for a step."""
    head = ("part", "parameters", "FLOPs", "stored")
    lines = format_table(head, [_row(part) for part in (*found.parts, found.total)], right=head[1:])
    forward, parts = found.total.flops * found.batch_size, config.train.microbatches
    at_once = f" at once, in {parts} microbatches" if parts > 1 else ""
    return [
        "",
        *lines,
        "",
        "FLOPs of the forward pass and bytes stored for the backward pass, each for one example "
        f"({config.train.precision}, remat={config.remat.kind}).",
        f"A step on {found.batch_size} examples: {format_scaled(found.step_flops)}FLOPs, {found.step_flops / forward:.2f} × "
        f"the forward pass; {format_scaled(found.total.stored_bytes * found.batch_size / parts)}B stored{at_once}.",
    ]


def _row(part: ModelPart) -> tuple[str, ...]:
    name = part.name or "(batch)"
    return name, f"{part.parameters:,}", format_scaled(part.flops), f"{format_scaled(part.stored_bytes)}B"
