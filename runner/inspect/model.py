"""`model`: what the model of a configuration costs: parameters, FLOPs and stored bytes of each part, and of a step."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from runner.config.schema import Config
from runner.text import format_scaled, format_table
from runner.values import Answer, Say

if TYPE_CHECKING:
    from runner.inspect.model_cost import Part, Summary


def arguments(parser: ArgumentParser) -> None:
    """The configuration, as for run.py."""
    parser.usage = "python -m runner model [--json] [--] [key=value …]"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for run.py")


def run(arguments: Namespace, say: Say) -> Answer:
    """Compose, build, trace. Nothing is computed, and nothing written."""
    from runner.launch.command_line import Command
    from runner.launch.compose import compose

    document: dict[str, object] = {}

    def start(config: Config, command: Command) -> tuple[int, float | None]:
        from runner.inspect.model_cost import summary
        from runner.train.build import build
        from runner.train.built import describe

        built = build(config)
        found = summary(built, config)
        document.update(_document(found))
        say(describe(built, config))
        for line in _told(found, config):
            say(line)
        return 0, None

    return Answer(document, compose(arguments.overrides, start))


def _document(found: Summary) -> dict[str, object]:
    parts = [asdict(part) for part in (*found.parts, found.total)]
    return {"parts": parts, "batch_size": found.batch_size, "step_flops": found.step_flops}


def _told(found: Summary, config: Config) -> list[str]:
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


def _row(part: Part) -> tuple[str, ...]:
    name = part.name or "(batch)"
    return name, f"{part.parameters:,}", format_scaled(part.flops), f"{format_scaled(part.stored_bytes)}B"
