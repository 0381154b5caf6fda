"""The page beside exported weights: what they are, how good, where they come from, and how to load them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.checkpoint.arrays import Leaf
from runner.checkpoint.record import Record, progress_of
from runner.ledger import attempts
from runner.tools.digest import digest_of
from runner.tools.place import Checkpoint
from runner.tools.settings import document_of
from runner.tools.text import moment

LOADED = {
    "model.safetensors": ("from safetensors.numpy import load_file", 'load_file("model.safetensors")'),
    "model.npz": ("import numpy as np", 'dict(np.load("model.npz"))'),
}


@dataclass(frozen=True)
class Exported:
    """What was exported, from where, into which file; `written` is the type of each array there."""

    checkpoint: Checkpoint
    record: Record
    attempt: Mapping[str, Any]
    file: str
    kinds: Mapping[str, Leaf]
    written: Mapping[str, str]
    weights: str = "params"  # or "ema"


def card(about: Exported) -> str:
    """The page, in Markdown."""
    document = document_of(about.checkpoint.run, about.attempt.get("drift", ()))
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


def _loading(about: Exported) -> Iterator[str]:
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


def _differences(about: Exported) -> Iterator[str]:
    past = attempts(about.checkpoint.run)
    typed = (past[0] if past else about.attempt).get("command", [])[2:]
    yield from [f"- `{shlex.join([word])}`" for word in typed] or ["Nothing."]
    yield from [f"- later: `{change}`" for change in about.attempt.get("drift", ())]


def _provenance(about: Exported) -> Iterator[str]:
    attempt, checkpoint = about.attempt, about.checkpoint
    packages = ", ".join(f"{name} {version}" for name, version in attempt.get("packages", {}).items())
    yield f"- checkpoint: `{checkpoint}`, saved {moment(about.record.saved_unix_seconds)}"
    yield f"- logical digest of the whole checkpoint: `{digest_of(checkpoint)}`"
    yield f"- command: `{shlex.join(attempt.get('command', ['unknown']))}`"
    yield f"- code: {attempt.get('git') or 'commit not recorded'}"
    yield f"- Python {attempt.get('python', 'unknown')}, {packages or 'packages not recorded'}"
    yield f"- hardware: {attempt.get('hardware', 'unknown')}"
    yield f"- data fingerprint: `{progress_of(checkpoint.directory).get('data', 'unknown')}`"


def _count(kinds: Mapping[str, Leaf], part: str) -> int:
    return sum(math.prod(leaf.shape) for name, leaf in kinds.items() if name.startswith(f"{part}."))
