"""`export`: write the weights alone, in a format that any program reads, with a page that says what they are.

The names are those of the checkpoint (`params.head.kernel`), and so is every bit. npz knows numpy's own types only:
bfloat16 and its like become float32 there, which holds each of their values exactly, and the page says so.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models import HfModel
from runner.checkpoint.arrays import LeafSpec, describe_values, read_leaf_specs, read_leaves
from runner.checkpoint.frozen_base import open_tuned_base
from runner.checkpoint.record import STATE, Record, read_progress
from runner.errors import ConfigError
from runner.files import format_json, make_folder, read_file, remove_tree, rename_path, replace_file
from runner.inspect.digest_checkpoint import compute_digest
from runner.inspect.export_hf import plan_hf_export
from runner.inspect.hf_adapters import name_as_hf
from runner.inspect.lookup import (
    MAX_CONFIG_BYTES,
    Checkpoint,
    find_attempt,
    find_proven_checkpoint,
    read_config_document,
    refusing_other_kinds,
    refusing_unreadable,
)
from runner.inspect.weight_format import WeightFormat
from runner.rundir.attempt_lines import read_attempts
from runner.text import escape_markdown, format_code_span, format_count, format_size, format_time, quote_words, shorten
from runner.types import JsonObject
from runner.values import Say, VerbResult

# Names in a checkpoint: trained variables and those that last beside them, or the weights of a program of the user's
# own; the average of the trained ones.
PROGRAM_PREFIX = "weights."
WEIGHT_PREFIXES = ("params.", "extra.", PROGRAM_PREFIX)
EMA_PREFIX = "ema."
# The format that is a folder for transformers, and not a file of our names.
HF_FOLDER = "hf"
# Kinds of numbers that numpy itself knows; bfloat16 is none of them.
NUMPY_KINDS = "biufc"


@dataclass(frozen=True)
class ExportedWeights:
    """What was exported, for the page that describes it.

    Attributes:
        checkpoint: where it comes from.
        record: the sidecar of that checkpoint.
        attempt: the line of the attempt that made it.
        format: what it was written as.
        specs: shape and type of each array in the checkpoint.
        written: the type of each array in the file.
        weights: `params`, or `ema` for the average.
        tuned: how much of the model was trained, in a sentence; "" where all of it was.
    """

    checkpoint: Checkpoint
    record: Record
    attempt: JsonObject
    format: WeightFormat
    specs: Mapping[str, LeafSpec]
    written: Mapping[str, str]
    weights: str
    tuned: str = ""


@dataclass(frozen=True)
class FoundWeights:
    """What is to be written.

    Attributes:
        read: return the arrays, by the name in the file.
        specs: shape and type of each in the checkpoint.
        tuned: how much of the model was trained, in a sentence; "" where all of it was.
        beside: the contents of files beside them.
    """

    read: Callable[[], Mapping[str, Any]]
    specs: Mapping[str, LeafSpec]
    tuned: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the checkpoint, the format and the new directory."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named; often RUN@best")
    parser.add_argument(
        "--to",
        choices=(*FORMATS, HF_FOLDER),
        default="safetensors",
        help="safetensors unless said otherwise; hf: a folder for transformers; peft: adapters alone",
    )
    parser.add_argument("--weights", choices=("params", "ema"), default="params", help="ema: the average of optim.ema")
    parser.add_argument("directory", metavar="DIR", help="a directory that is new, or empty")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Export. Raises ConfigError where DIR is not empty, RefusedError where the checkpoint is not good."""
    target = Path(arguments.directory).expanduser()
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already, and not empty; name a new directory")
    checkpoint, record = find_proven_checkpoint(arguments.checkpoint)
    state = checkpoint.directory / STATE
    with refusing_other_kinds(), refusing_unreadable(checkpoint):
        there = read_leaf_specs(state)
        # Before anything is made: what cannot be exported leaves nothing behind.
        configuration = read_file(checkpoint.run_dir.config, MAX_CONFIG_BYTES)
        read_config_document(checkpoint.run_dir)
    with refusing_unreadable(checkpoint):
        found = _find_weights(checkpoint, there, arguments.to, arguments.weights)
    chosen = plan_hf_export(checkpoint, found.specs) if arguments.to == HF_FOLDER else FORMATS[arguments.to]
    folder = target.parent.resolve()
    # Written beside the target and renamed, over an empty directory as well: it is there as a whole or not at all.
    fresh = folder / f".{target.name}.{os.getpid()}"
    make_folder(fresh)
    try:
        with refusing_unreadable(checkpoint):
            values = found.read()
        written = chosen.write(fresh / chosen.file, values)
        for name, content in found.beside.items():
            replace_file(fresh / name, content)
        attempt, specs = find_attempt(checkpoint), found.specs
        exported = ExportedWeights(checkpoint, record, attempt, chosen, specs, written, arguments.weights, found.tuned)
        replace_file(fresh / "README.md", format_model_card(exported))
        replace_file(fresh / "config.yaml", configuration)
        # safetensors makes a file that nobody else may read; the README has what the user's umask allows.
        weights = sorted(path.name for path in fresh.glob(f"*{Path(chosen.file).suffix}"))
        for name in weights:
            shutil.copymode(fresh / "README.md", fresh / name)
        rename_path(fresh, folder / target.name)
    finally:
        remove_tree(fresh)
    file = target / weights[0]
    num_bytes = sum((target / name).stat().st_size for name in weights)
    say(f"{file}  {format_count(len(written), 'array')}, {format_size(num_bytes)}, from {checkpoint}")
    say(f"{target / 'README.md'}  says what it is and how to load it")
    return VerbResult(
        {
            "run": str(checkpoint.run_dir),
            "step": checkpoint.step,
            "file": str(file),
            "files": [str(target / name) for name in weights],
            "bytes": num_bytes,
            "arrays": dict(written),
        }
    )


def _find_weights(checkpoint: Checkpoint, there: Mapping[str, LeafSpec], form: str, weights: str) -> FoundWeights:
    """Return the weights of a checkpoint. Raises ConfigError where it has none of this kind."""
    base = open_tuned_base(checkpoint.directory)
    if base is not None:
        if weights == "ema" and not any(name.startswith(EMA_PREFIX) for name in there):
            raise _explain_no_average(checkpoint)
        return _read_tuned(checkpoint, base, form, weights)
    if form == "peft":
        raise ConfigError(f"--to peft: {checkpoint} has no adapters (tune=lora); choose another format")
    sources = _select_weights(there, weights, checkpoint)

    def read() -> Mapping[str, Any]:
        values = read_leaves(checkpoint.directory / STATE, [source for source, _ in sources.values()])
        return {name: values[source] for name, (source, _) in sources.items()}

    return FoundWeights(read, {name: spec for name, (_, spec) in sources.items()})


def _read_tuned(checkpoint: Checkpoint, base: Path, form: str, weights: str) -> FoundWeights:
    """Return the weights of a run that trained a part of a model: whole, or its adapters alone."""
    # Imported here: only such a run waits for what knows the configuration.
    from runner.config.schema import Config, validate_options
    from runner.train.tuned_weights import count_values, format_peft, merge_whole, read_tuned_weights

    drift = find_attempt(checkpoint).get("drift", ())
    config = validate_options(Config, read_config_document(checkpoint.run_dir, drift))
    tuned = read_tuned_weights(checkpoint.directory, base, weights)
    trained, frozen = count_values(tuned.trained), count_values(tuned.frozen)
    said = f"`tune={config.tune.kind}` trained {trained:,} numbers, beside {frozen:,} that stayed as they were."
    if form == "peft":
        values, description = format_peft(tuned, config)
        if isinstance(config.model, HfModel):
            values, description = name_as_hf(values, description, config.model)
        return FoundWeights(
            lambda: values,
            describe_values(values),
            said,
            {"adapter_config.json": format_json(description, indent=1) + "\n"},
        )
    whole = merge_whole(tuned, config)
    return FoundWeights(lambda: whole, describe_values(whole), f"{said} Here is the whole model.")


def _explain_no_average(checkpoint: Checkpoint) -> ConfigError:
    return ConfigError(f"--weights ema: {checkpoint} keeps no average; train with optim.ema=0.999, or export params")


def _select_weights(
    specs: Mapping[str, LeafSpec], weights: str, checkpoint: Checkpoint
) -> dict[str, tuple[str, LeafSpec]]:
    """Return for each name in the file the name in the checkpoint, and the shape and type of the array there."""
    sources = {name: (name, spec) for name, spec in specs.items() if name.startswith(WEIGHT_PREFIXES)}
    if not sources:
        raise ConfigError(f"{checkpoint}: has no weights: no array is named params.…, extra.… or weights.…")
    if weights == "params":
        return sources
    averages = {name: spec for name, spec in specs.items() if name.startswith(EMA_PREFIX)}
    if not averages:
        raise _explain_no_average(checkpoint)
    # An average has the names of the weights in the file, so that whoever loads it need not know which they are.
    for name, spec in averages.items():
        sources[f"params.{name.removeprefix(EMA_PREFIX)}"] = (name, spec)
    return sources


def _write_safetensors(path: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Write arrays as safetensors, and return their types. Raises ConfigError where one cannot be had in it."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ConfigError("--to safetensors needs a package: pip install safetensors; or use --to npz") from None
    # The reshape gives scalars back their shape, of which numpy makes vectors here.
    arrays = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in values.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in NUMPY_KINDS and array.dtype.name != "bfloat16":
            raise ConfigError(f"{name} is {array.dtype}, which safetensors cannot give back to numpy; use --to npz")
    save_file(arrays, path, metadata={"format": "np"})
    return {name: array.dtype.name for name, array in arrays.items()}


def _write_npz(path: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Write arrays as npz, and return their types: float32 for those that numpy does not know."""
    arrays: dict[str, Any] = {}
    for name, value in values.items():
        array = np.asarray(value)
        # numpy would read a type that it does not know back as raw bytes.
        arrays[name] = array if array.dtype.kind in NUMPY_KINDS else array.astype(np.float32)
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return {name: array.dtype.name for name, array in arrays.items()}


FORMATS = {
    "safetensors": WeightFormat(
        "model.safetensors",
        _write_safetensors,
        "from safetensors.numpy import load_file",
        'load_file("model.safetensors")',
    ),
    "npz": WeightFormat("model.npz", _write_npz, "import numpy as np", 'dict(np.load("model.npz"))'),
    "peft": WeightFormat(
        "adapter_model.safetensors",
        _write_safetensors,
        "from safetensors.numpy import load_file",
        'load_file("adapter_model.safetensors")',
    ),
}


def format_model_card(exported: ExportedWeights) -> str:
    """Return the page that describes exported weights, in Markdown."""
    document = read_config_document(exported.checkpoint.run_dir, exported.attempt.get("drift", ()))
    # A program of the user's own is there in the place of a model.
    program = document.get("program")
    has_program = isinstance(program, dict) and program.get("kind") == "external"
    model, data = (_name_choice(document, part) for part in ("program" if has_program else "model", "data"))
    is_ema = exported.weights == "ema"
    num_params, num_extra = (
        _count_values(exported.specs, part) for part in ("weights" if has_program else "params", "extra")
    )
    if exported.format is FORMATS["peft"]:
        # Under the names that PEFT gives them.
        num_params = sum(math.prod(spec.shape) for spec in exported.specs.values())
    beside = f", and {num_extra:,} values beside them (`extra`)." if num_extra else "."
    metrics = [f"- {escape_markdown(name)}: {value:.6g}" for name, value in sorted(exported.record.metrics.items())]
    lines = [
        *exported.format.head,
        f"# {escape_markdown(exported.checkpoint.run_dir.path.name)}, step {exported.checkpoint.step}",
        "",
        f"The {'average of the weights (`optim.ema`)' if is_ema else 'weights'} of {model} after "
        f"{exported.checkpoint.step:,} updates on {data}: {num_params:,} parameters{beside}",
        *([exported.tuned] if exported.tuned else []),
        "`config.yaml` is the configuration the run was started with.",
        "",
        f"## Measured at this step{', of the live weights' if is_ema else ''}",
        "",
        *(metrics or ["Nothing."]),
        "",
        "## Load",
        "",
        *_format_loading(exported),
        "",
        "## What differs from the defaults",
        "",
        *_format_overrides(exported),
        "",
        "## Provenance",
        "",
        *_format_provenance(exported),
        "",
    ]
    return "\n".join(lines)


def _format_loading(exported: ExportedWeights) -> Iterator[str]:
    if exported.format.makes_model:
        yield from ("```python", exported.format.import_line, f"model = {exported.format.load_call}", "```")
        return
    names = list(exported.specs)
    example = next((name for name in names if name.startswith(("params.", PROGRAM_PREFIX))), names[0])
    yield "```python"
    if "bfloat16" in exported.written.values():
        yield "import ml_dtypes  # teaches numpy bfloat16"
    yield exported.format.import_line
    yield f"weights = {exported.format.load_call}"
    yield f"weights[{json.dumps(example)}]  # {exported.written[example]}, shape {exported.specs[example].shape}"
    yield "```"
    yield ""
    if example.startswith(PROGRAM_PREFIX):
        yield "A name is the path in the program's state, joined by dots. With Holdfast, the run and the program:"
    else:
        yield "A name is the path of the variable in the model, joined by dots."
        yield "As a live model, with Holdfast and the run:"
    yield ""
    yield "```python"
    yield "from runner import load"
    which = "" if exported.weights == "params" else f', weights="{exported.weights}"'
    if example.startswith(PROGRAM_PREFIX):
        yield f"loaded, config = load({json.dumps(str(exported.checkpoint))}, trust=True)"
        yield "loaded.program.evaluate(loaded.state, batch)"
    else:
        yield f"model, config = load({json.dumps(str(exported.checkpoint))}{which})"
    yield "```"
    widened = {spec.dtype for name, spec in exported.specs.items() if exported.written[name] != spec.dtype}
    if widened:
        yield ""
        yield f"The run has {', '.join(sorted(widened))} arrays; here they are float32, with exactly the same values."


def _format_overrides(exported: ExportedWeights) -> Iterator[str]:
    past = read_attempts(exported.checkpoint.run_dir)
    # The first attempt's words made the run; what later ones changed is its drift.
    typed = (past[0] if past else exported.attempt).get("command", [])[2:]
    if not typed:
        yield "Nothing."
    for word in typed:
        yield f"- {format_code_span(quote_words([word]))}"
    for change in exported.attempt.get("drift", ()):
        yield f"- later: {format_code_span(change)}"


def _format_provenance(exported: ExportedWeights) -> Iterator[str]:
    attempt, checkpoint = exported.attempt, exported.checkpoint
    packages = ", ".join(f"{name} {version}" for name, version in attempt.get("packages", {}).items())
    fingerprint = str(read_progress(checkpoint.directory).get("data", "unknown"))
    saved = format_time(exported.record.saved_unix_seconds)
    yield f"- checkpoint: {format_code_span(str(checkpoint))}, saved {saved}"
    yield f"- logical digest of the whole checkpoint: `{compute_digest(checkpoint)}`"
    yield f"- command: {format_code_span(quote_words(attempt.get('command', ['unknown'])))}"
    yield f"- code: {escape_markdown(attempt.get('git') or 'commit not recorded')}"
    python, known = attempt.get("python", "unknown"), packages or "packages not recorded"
    yield f"- Python {escape_markdown(python)}, {escape_markdown(known)}"
    yield f"- hardware: {escape_markdown(attempt.get('hardware', 'unknown'))}"
    yield f"- data fingerprint: {format_code_span(shorten(fingerprint, 200))}"


def _name_choice(document: JsonObject, part: str) -> str:
    """Return `model=mlp` as code: what a configuration chose for a part of it."""
    options = document.get(part)
    options = options if isinstance(options, dict) else {}
    kind = options.get("kind", "unknown")
    # Where it is the user's own, its target says more.
    chosen = options.get("target", kind) if kind == "external" else kind
    return format_code_span(shorten(f"{part}={chosen}", 100))


def _count_values(specs: Mapping[str, LeafSpec], part: str) -> int:
    return sum(math.prod(spec.shape) for name, spec in specs.items() if name.startswith(f"{part}."))
