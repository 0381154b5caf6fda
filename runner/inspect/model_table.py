"""`model`: tell what a configuration's model costs: parameters, FLOPs and stored bytes of each part, and of a step."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from runner.config.program import ExternalProgram
from runner.config.schema import Config
from runner.launch.compose import compose_run
from runner.session.base_files import settle_model
from runner.text import format_scaled, format_size, format_table
from runner.values import Say, VerbResult

if TYPE_CHECKING:
    from runner.inspect.model_cost import ModelCost, ModelPart
    from runner.train.built import Built


def add_arguments(parser: ArgumentParser) -> None:
    """Add the words of the configuration, as for run.py."""
    parser.usage = "python -m runner model [--json] [--] [key=value …]"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for run.py")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Compose, build and trace, and say a table of the parts. Nothing is computed, and nothing written."""
    config = settle_model(compose_run(arguments.overrides).config)
    # The jax fence: a wrong configuration is answered without it.
    from runner.inspect.model_cost import summarize_model, summarize_program
    from runner.train.build import build
    from runner.train.built import describe_run

    built = build(config)
    cost = (summarize_program if isinstance(config.program, ExternalProgram) else summarize_model)(built, config)
    say(describe_run(built, config))
    for line in ["", *_format_parts(cost), "", *_explain_cost(cost, config), _describe_state(built)]:
        say(line)
    parts = [asdict(part) for part in (*cost.parts, cost.total)]
    return VerbResult({"parts": parts, "batch_size": cost.batch_size, "step_flops": cost.step_flops})


def _describe_state(built: Built) -> str:
    """Return a line that says how large the train state is, and how much of it lies on each device."""
    from runner.mesh import bytes_per_device, describe_mesh
    from runner.train.built import count_state_bytes

    total = f"The state takes {format_size(count_state_bytes(built))}"
    if built.mesh.size == 1:
        return f"{total}."
    share = format_size(bytes_per_device(built.abstract))
    return f"{total}, {share} on each of {built.mesh.size} devices{describe_mesh(built.mesh)}."


def _format_parts(cost: ModelCost) -> list[str]:
    has_frozen = bool(cost.total.frozen)
    head = ("part", *(("trained", "frozen") if has_frozen else ("parameters",)), "FLOPs", "stored")
    rows = [_format_part(part, has_frozen=has_frozen) for part in (*cost.parts, cost.total)]
    return format_table(head, rows, right=head[1:])


def _format_part(part: ModelPart, *, has_frozen: bool) -> tuple[str, ...]:
    name = part.name or "(batch)"
    stored = "–" if part.stored_bytes is None else f"{format_scaled(part.stored_bytes)}B"
    sizes = (part.parameters, part.frozen) if has_frozen else (part.parameters,)
    return name, *(f"{size:,}" for size in sizes), format_scaled(part.flops), stored


def _explain_cost(cost: ModelCost, config: Config) -> list[str]:
    """Return a line that says what the columns are, and one for a whole step."""
    forward_flops, microbatches = cost.total.flops * cost.batch_size, config.train.num_splits
    if cost.total.stored_bytes is None:
        measured = f", {cost.step_flops / forward_flops:.2f} × an evaluation of them" if forward_flops else ""
        return [
            "FLOPs of an evaluation, for one example; what a backward pass stores is the program's own business.",
            f"A step on {cost.batch_size} examples: {format_scaled(cost.step_flops)}FLOPs{measured}.",
        ]
    # Each microbatch is computed and let go before the next one: only the values of one are stored at a time.
    stored = format_scaled(cost.total.stored_bytes * cost.batch_size / microbatches)
    at_once = f" at once, in {microbatches} microbatches" if microbatches > 1 else ""
    return [
        "FLOPs of the forward pass and bytes stored for the backward pass, each for one example "
        f"({config.train.precision}, remat={config.remat.kind}).",
        f"A step on {cost.batch_size} examples: {format_scaled(cost.step_flops)}FLOPs, "
        f"{cost.step_flops / forward_flops:.2f} × the forward pass; {stored}B stored{at_once}.",
    ]
