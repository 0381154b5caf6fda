"""`remat`: tell what each way to recompute costs for your model and batch: counted, compiled and, if asked, timed.

Nothing is trained. The table, a line of JSON for each row and the picture are left in a folder of their own.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from runner.errors import ConfigError
from runner.files import make_folder, replace_file
from runner.inspect.lookup import choose_new_folder
from runner.launch.compose import compose_run
from runner.remat.cost_table import Alternative, PolicyCosts, SurveyReport
from runner.session.base_files import settle_model
from runner.text import (
    format_count,
    format_percent,
    format_scaled,
    format_size,
    format_table,
    parse_size,
    wrap_labelled,
)
from runner.values import Say, VerbResult

LINES_FILE, PICTURE_FILE = "remat.jsonl", "remat.png"
MOST_ROUNDS = 10_000


def add_arguments(parser: ArgumentParser) -> None:
    """Add what to measure, for which device, and the words of the configuration, as for run.py."""
    parser.usage = (
        "python -m runner remat [--no-compile | --time N] [--budget SIZE] [--target KIND] [--all] [--to DIR] "
        "[--json] [--] [key=value …]"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for run.py")
    parser.add_argument(
        "--no-compile", action="store_true", help="only count in the traces: seconds instead of minutes"
    )
    parser.add_argument("--time", type=int, default=0, metavar="N", help="also take N steps with each, in turns")
    parser.add_argument("--budget", metavar="SIZE", help="bytes there are on a device: 8GB, 7GiB")
    parser.add_argument(
        "--target",
        metavar="KIND",
        help="compile for devices that are not here: tpu:v5e:4x4 (needs libtpu), gpu:h100:8 (jax-cuda12-pjrt)",
    )
    parser.add_argument("--all", action="store_true", help="everything_saveable as well")
    parser.add_argument("--to", metavar="DIR", help="a new folder for the results (outputs/.remat/TIME)")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Compose, trace, compile, say the tables and draw. Raises ConfigError where the words do not fit each other."""
    _check_arguments(arguments)
    folder = choose_new_folder("remat", arguments.to)
    config = settle_model(compose_run(arguments.overrides).config)
    if config.program.kind != "none":
        raise ConfigError("remat: what is recomputed is a program's own business (jax.checkpoint); leave program out")
    # The jax fence: a wrong configuration is answered without it.
    from runner.remat import compile_target
    from runner.remat.remat_survey import SurveyRequest, survey_policies
    from runner.train.dataset import read_sources

    devices = compile_target.target_devices(arguments.target, config.mesh.num_needed) if arguments.target else None
    asked = SurveyRequest(not arguments.no_compile, arguments.time, arguments.all, parse_size(arguments.budget or 0))
    report = survey_policies(config, read_sources(config.data), asked, devices, say)
    for line in format_report(report):
        say(line)
    files_written = _write_results(report, folder)
    say("")
    say(f"{folder / LINES_FILE} has every number, {folder / PICTURE_FILE} the picture.")
    return VerbResult({**report.document(), "files": files_written})


def _check_arguments(arguments: Namespace) -> None:
    if arguments.budget is not None and parse_size(arguments.budget) < 1:
        raise ConfigError(f"--budget {arguments.budget}: expected a number of bytes, as 8000000000, 8GB or 7GiB")
    if not 0 <= arguments.time <= MOST_ROUNDS:
        raise ConfigError(f"--time {arguments.time}: expected 1 to {MOST_ROUNDS} steps")
    # A program can be timed only where it was compiled, for a device that is here.
    for name in ("no_compile", "target"):
        if arguments.time and getattr(arguments, name):
            raise ConfigError(f"--time: nothing is run with --{name.replace('_', '-')}; leave one of them out")
    if arguments.target and arguments.no_compile:
        raise ConfigError("--target: nothing is compiled with --no-compile; leave one of them out")
    if arguments.target:
        # Before jax starts: the compiler for a TPU is found through the environment.
        from runner.remat import compile_target

        compile_target.prepare_target(arguments.target)


def _write_results(report: SurveyReport, folder: Path) -> dict[str, str]:
    # Imported where something is drawn: matplotlib is slow to import.
    from runner.remat.memory_plot import draw_survey

    lines, picture = folder / LINES_FILE, folder / PICTURE_FILE
    make_folder(folder)
    replace_file(lines, "".join(json.dumps(line) + "\n" for line in report.lines()))
    draw_survey(picture, report)
    return {"lines": str(lines), "picture": str(picture)}


def format_report(report: SurveyReport) -> list[str]:
    """Return the tables of a survey and what they mean: the policies, the tags, and what else needs less memory."""
    lines = ["", *_format_policies(report), "", *_explain_policies(report)]
    if report.tags:
        lines += ["", *_format_tags(report)]
    if report.changes:
        lines += ["", *_format_alternatives(report)]
    return lines


def _format_policies(report: SurveyReport) -> list[str]:
    """Return a table with a line for each policy, the one that needs most memory first."""
    numbers = ("stored", "temporaries", "on host", "in all", "recompute", "step", "IQR", "compile")
    head = ("remat", *numbers, "best", "fits", "now")
    best = {row.name for row in report.frontier}
    rows = [
        (
            row.name,
            format_size(row.num_bytes),
            format_size(row.memory.temporaries) if row.memory else "",
            format_size(row.memory.host) if row.memory and row.memory.host else "",
            "no room" if row.trouble else format_size(report.in_all(row)),
            f"{100 * report.recompute(row):+.1f} %",
            *_format_step_time(row),
            f"{row.memory.seconds:.1f} s" if row.memory else "",
            "*" if row.name in best else "",
            {None: "", True: "yes", False: "no"}[report.fits(row)],
            "<" if row.name == report.now else "",
        )
        for row in report.ordered
    ]
    return format_table(head, rows, right=numbers, flexible=("remat",))


def _format_step_time(row: PolicyCosts) -> tuple[str, str]:
    """Return the median, and how far apart the quartiles are; nothing where no step was taken."""
    if not row.quartiles:
        return "", ""
    low, middle, high = row.quartiles
    return f"{1000 * middle:.3g} ms", f"{1000 * (high - low):.3g} ms"


def _explain_policies(report: SurveyReport) -> list[str]:
    """Return what the columns of the policies are, and what not to believe of them."""
    in_all = "what the compiler needs for a step" if report.is_believed else "state, batch and what is stored"
    cheap = "time" if report.is_timed else "recomputation"
    notes = [
        f"stored: what the forward pass keeps for the backward pass, counted in the trace; in all: {in_all}; both on "
        f"one device. recompute: of {_format_flops(report.base.flops)} a step. *: nothing else has both less memory "
        f"and less {cheap}."
    ]
    if report.is_timed:
        notes.append("step: the median, and how far its quartiles are apart: smaller differences mean nothing")
    if report.is_compiled and not report.is_believed:
        notes.append(
            "warning: on a CPU, XLA undoes recomputation where blocks follow each other in a Python loop: temporaries "
            "say nothing about an accelerator, and memory is compared as counted; --target tpu:v5e asks a compiler "
            "that does not undo it"
        )
    if report.is_auto:
        notes.append("remat=auto chooses among these and other names when a run begins")
    if report.setting.backend == "cpu" and report.is_compiled and report.setting.precision == "bf16":
        notes.append("warning: XLA on a CPU computes bf16 in float32: its temporaries are larger than an accelerator's")
    if report.budget is not None:
        count = sum(bool(report.fits(row)) for row in report.rows)
        notes.append(
            f"budget: {format_size(report.budget)} a device; {count} of {format_count(len(report.rows), 'option')} fit"
        )
    # Policies that are left out for the same reason share a line.
    for why in dict.fromkeys(report.refused.values()):
        names = ", ".join(name for name, each in report.refused.items() if each == why)
        notes.append(f"left out: {names}: {why}")
    notes += [f"{row.name} {row.trouble}" for row in report.rows if row.trouble]
    return [line for note in notes for line in wrap_labelled("", note)]


def _format_tags(report: SurveyReport) -> list[str]:
    """Return a table of what each tag of the model costs, and spares where it is stored."""
    head = ("tag", "stored", "spares alone", "as the last one", "")
    rows = [
        (
            tag.name,
            format_size(tag.num_bytes),
            _format_share_of_step(tag.alone, report),
            _format_share_of_step(tag.last, report),
            "" if tag.pays else "no effect: do not save it",
        )
        for tag in report.tags
    ]
    what = "remat=names remat.save=[…]: bytes of all blocks, and FLOPs that need not be done again"
    return [*format_table(head, rows, right=head[1:4]), *wrap_labelled("", what)]


def _format_share_of_step(flops: int, report: SurveyReport) -> str:
    """Return FLOPs, and their share of a step without recomputation."""
    return f"{_format_flops(flops)} ({format_percent(flops, report.base.flops)})" if flops else "0"


def _format_alternatives(report: SurveyReport) -> list[str]:
    """Return a table of what else needs less memory: one change at a time, against the configuration as it is."""
    now = report.row(report.now)
    head = ("out of memory? try", "stored", "", "in all, counted", "FLOPs")
    unchanged = Alternative(f"now (remat={now.name})", now.num_bytes, now.counted, now.flops)
    rows = [_format_alternative(change, now) for change in (unchanged, *report.changes)]
    what = (
        "each change alone, counted for this model and batch; train.microbatches: dropout and batch statistics become "
        "those of the parts"
    )
    return [*format_table(head, rows, right=head[1:]), *wrap_labelled("", what)]


def _format_alternative(change: Alternative, now: PolicyCosts) -> tuple[str, ...]:
    # As a factor: `÷ 3` says at a glance what two sizes do not.
    less, more = now.num_bytes / max(change.num_bytes, 1), change.num_bytes / max(now.num_bytes, 1)
    factor = f"÷ {less:.3g}" if less >= 1 else f"× {more:.3g}"
    extra = f"{100 * (change.flops / now.flops - 1):+.1f} %" if now.flops else ""
    if (change.num_bytes, change.flops) == (now.num_bytes, now.flops):
        factor = extra = ""
    return change.words, format_size(change.num_bytes), factor, format_size(change.counted), extra


def _format_flops(number: float) -> str:
    return f"{format_scaled(number)}FLOP"
