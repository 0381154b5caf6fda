"""`export`: the weights alone, in a format that any program reads, with a page that says what they are.

The names are those of the checkpoint (`params.head.kernel`), and so is every bit. npz knows numpy's own types only:
bfloat16 and its like become float32 there, which holds each of their values exactly, and the page says so.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.checkpoint import arrays
from runner.checkpoint.arrays import LeafSpec
from runner.checkpoint.record import STATE, Record, read_progress
from runner.errors import ConfigError
from runner.inspect.digest_checkpoint import compute_digest
from runner.inspect.lookup import Checkpoint, find_attempt, find_proven_checkpoint, read_config_document
from runner.rundir.attempts import read_attempts
from runner.text import format_count, format_size, format_time
from runner.values import Answer, Say

LOADED = {
    "model.safetensors": ("from safetensors.numpy import load_file", 'load_file("model.safetensors")'),
    "model.npz": ("import numpy as np", 'dict(np.load("model.npz"))'),
}

WEIGHTS = ("params.", "extra.")  # trained variables, and those that last beside them
AVERAGE = "ema."  # of the trained variables, in a run that keeps one
NATIVE = "biufc"  # kinds of numbers that numpy itself knows


def arguments(parser: ArgumentParser) -> None:
    """A checkpoint, a format and a new directory."""
    parser.add_argument("checkpoint", metavar="RUN[@STEP]", help="the newest, or the one that is named; often RUN@best")
    parser.add_argument("--to", choices=tuple(FORMATS), default="safetensors", help="safetensors unless said otherwise")
    parser.add_argument("--weights", choices=("params", "ema"), default="params", help="ema: the average of optim.ema")
    parser.add_argument("directory", metavar="DIR", help="a directory that is new, or empty")


def run(arguments: Namespace, say: Say) -> Answer:
    """Export. Raises ConfigError where DIR is not empty, RefusedError where the checkpoint is not good."""
    target = Path(arguments.directory).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is there already, and not empty; name a new directory")
    checkpoint, record = find_proven_checkpoint(arguments.checkpoint)
    state = checkpoint.directory / STATE
    stored = _stored(arrays.read_leaf_specs(state), arguments.weights, checkpoint)
    kinds = {name: leaf for name, (_, leaf) in stored.items()}
    name, write = FORMATS[arguments.to]
    fresh = target.parent / f".{target.name}.{os.getpid()}"
    fresh.mkdir(parents=True)
    try:
        read = arrays.read_leaves(state, [there for there, _ in stored.values()])
        written = write(fresh / name, {here: read[there] for here, (there, _) in stored.items()})
        about = ExportedWeights(checkpoint, record, find_attempt(checkpoint), name, kinds, written, arguments.weights)
        (fresh / "README.md").write_text(format_model_card(about))
        shutil.copyfile(checkpoint.run.config, fresh / "config.yaml")
        shutil.copymode(fresh / "README.md", fresh / name)  # safetensors would let nobody else read it
        fresh.rename(target)  # all of it or nothing; over an empty directory as well
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    num_bytes = (target / name).stat().st_size
    say(f"{target / name}  {format_count(len(kinds), 'array')}, {format_size(num_bytes)}, from {checkpoint}")
    say(f"{target / 'README.md'}  says what it is and how to load it")
    return Answer(_plain(checkpoint, target / name, num_bytes, written))


def _stored(leaves: Mapping[str, LeafSpec], weights: str, checkpoint: Checkpoint) -> dict[str, tuple[str, LeafSpec]]:
    """By the name in the file: the name in the checkpoint, and what it is. An average has the names of the weights."""
    stored = {name: (name, leaf) for name, leaf in leaves.items() if name.startswith(WEIGHTS)}
    if not stored:
        raise ConfigError(f"{checkpoint}: has no weights: no array is named params.… or extra.…")
    if weights == "params":
        return stored
    averages = {name: leaf for name, leaf in leaves.items() if name.startswith(AVERAGE)}
    if not averages:
        raise ConfigError(f"--weights ema: {checkpoint} keeps no average; train with optim.ema=0.999, or export params")
    return {**stored, **{f"params.{name.removeprefix(AVERAGE)}": (name, leaf) for name, leaf in averages.items()}}


def _safetensors(path: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """Write, and give the type that each array has in the file. Raises ConfigError where one cannot be had in it."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ConfigError("--to safetensors needs a package: pip install safetensors; or use --to npz") from None
    kept = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in values.items()}
    for name, value in kept.items():
        if value.dtype.kind not in NATIVE and value.dtype.name != "bfloat16":
            raise ConfigError(f"{name} is {value.dtype}, which safetensors cannot give back to numpy; use --to npz")
    save_file(kept, path, metadata={"format": "np"})
    return {name: value.dtype.name for name, value in kept.items()}


def _npz(path: Path, values: Mapping[str, Any]) -> dict[str, str]:
    given = {name: np.asarray(value) for name, value in values.items()}
    kept: dict[str, Any] = {
        name: value if value.dtype.kind in NATIVE else value.astype(np.float32) for name, value in given.items()
    }
    with path.open("wb") as file:
        np.savez(file, **kept)  # numbers only: nothing is pickled
    return {name: value.dtype.name for name, value in kept.items()}


FORMATS = {"safetensors": ("model.safetensors", _safetensors), "npz": ("model.npz", _npz)}


def _plain(checkpoint: Checkpoint, path: Path, num_bytes: int, written: Mapping[str, str]) -> dict[str, Any]:
    about = {"run": str(checkpoint.run), "step": checkpoint.step, "file": str(path), "bytes": num_bytes}
    return {**about, "arrays": dict(written)}


@dataclass(frozen=True)
class ExportedWeights:
    """What was exported, from where, into which file; `written` is the type of each array there."""

    checkpoint: Checkpoint
    record: Record
    attempt: Mapping[str, Any]
    file: str
    kinds: Mapping[str, LeafSpec]
    written: Mapping[str, str]
    weights: str = "params"  # or "ema"


def format_model_card(about: ExportedWeights) -> str:
    """The page, in Markdown."""
    document = read_config_document(about.checkpoint.run, about.attempt.get("drift", ()))
    model, data = (document.get(part, {}).get("kind", "unknown") for part in ("model", "data"))
    counts = {part: _count(about.kinds, part) for part in ("params", "extra")}
    which = "weights" if about.weights == "params" else "average of the weights (`optim.ema`)"
    lines = [
        f"# {about.checkpoint.run.path.name}, step {about.checkpoint.step}",
        "",
        f"The {which} of `model={model}` after {about.checkpoint.step:,} updates on `data={data}`: "
        f"{counts['params']:,} parameters"
        + (f", and {counts['extra']:,} values beside them (`extra`)." if counts["extra"] else "."),
        "`config.yaml` is the configuration the run was started with.",
        "",
        "## Measured at this step" + ("" if about.weights == "params" else ", of the live weights"),
        "",
        *([f"- {name}: {value:.6g}" for name, value in sorted(about.record.metrics.items())] or ["Nothing."]),
        "",
        "## Load",
        "",
        *_loading(about),
        "",
        "## What differs from the defaults",
        "",
        *_differences(about),
        "",
        "## Provenance",
        "",
        *_provenance(about),
        "",
    ]
    return "\n".join(lines)


def _loading(about: ExportedWeights) -> Iterator[str]:
    module, call = LOADED[about.file]
    first = next((name for name in about.kinds if name.startswith("params.")), next(iter(about.kinds)))
    yield "```python"
    if "bfloat16" in about.written.values():
        yield "import ml_dtypes  # teaches numpy bfloat16"
    yield module
    yield f"weights = {call}"
    yield f'weights["{first}"]  # {about.written[first]}, shape {about.kinds[first].shape}'
    yield "```"
    yield ""
    yield "A name is the path of the variable in the model, joined by dots. As a live model, with Holdfast and the run:"
    yield ""
    yield "```python"
    yield "from runner import load"
    chosen = "" if about.weights == "params" else f', weights="{about.weights}"'
    yield f'model, config = load("{about.checkpoint}"{chosen})'
    yield "```"
    if widened := sorted({leaf.dtype for name, leaf in about.kinds.items() if about.written[name] != leaf.dtype}):
        yield ""
        yield f"The run has {', '.join(widened)} arrays; here they are float32, with exactly the same values."


def _differences(about: ExportedWeights) -> Iterator[str]:
    past = read_attempts(about.checkpoint.run)
    typed = (past[0] if past else about.attempt).get("command", [])[2:]
    yield from [f"- `{shlex.join([word])}`" for word in typed] or ["Nothing."]
    yield from [f"- later: `{change}`" for change in about.attempt.get("drift", ())]


def _provenance(about: ExportedWeights) -> Iterator[str]:
    attempt, checkpoint = about.attempt, about.checkpoint
    packages = ", ".join(f"{name} {version}" for name, version in attempt.get("packages", {}).items())
    yield f"- checkpoint: `{checkpoint}`, saved {format_time(about.record.saved_unix_seconds)}"
    yield f"- logical digest of the whole checkpoint: `{compute_digest(checkpoint)}`"
    yield f"- command: `{shlex.join(attempt.get('command', ['unknown']))}`"
    yield f"- code: {attempt.get('git') or 'commit not recorded'}"
    yield f"- Python {attempt.get('python', 'unknown')}, {packages or 'packages not recorded'}"
    yield f"- hardware: {attempt.get('hardware', 'unknown')}"
    yield f"- data fingerprint: `{read_progress(checkpoint.directory).get('data', 'unknown')}`"


def _count(kinds: Mapping[str, LeafSpec], part: str) -> int:
    return sum(math.prod(leaf.shape) for name, leaf in kinds.items() if name.startswith(f"{part}."))
