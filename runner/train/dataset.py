"""The data of a run: read, put in order, written down once in data.json and compared when the run goes on. No jax."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from data import Data
from data.fingerprint import fold_into_folders
from data.pipeline import BatchStream
from data.sources import Source, Sources, Table, UnreadableError
from runner import files
from runner.errors import ConfigError, RefusedError
from runner.rundir.layout import RunDir
from runner.text import format_size

MOST_NAMED = 3


def read(option: Data) -> Sources:
    """What an option stands for. Raises ConfigError where that cannot be read, or leaves a side empty."""
    try:
        sources = option.sources()
    except ValueError as error:
        if option.kind == "external":
            raise  # a bug in the user's own code: its traceback is what helps
        raise ConfigError(f"data={option.kind}: {error}") from None
    for side, source in (("train", sources.train), ("evaluate", sources.eval)):
        if len(source) == 0:
            raise ConfigError(
                f"data={option.kind}: nothing is left to {side} on ({sources.summary}); give it more data, a shorter "
                "data.seq_len, or another data.eval_fraction"
            )
    return sources


def stream_of(option: Data, sources: Sources, seed: int) -> BatchStream:
    """The training batches in their order, made as the option says."""
    return BatchStream(
        sources.train,
        batch_size=option.batch_size,
        seed=seed,
        augment=getattr(option, "augment", None) if option.gives == "images" else None,
        workers=getattr(option, "workers", 0),
        prefetch=getattr(option, "prefetch", 0),
        again=partial(_again, option, sources.fingerprint),
    )


def _again(option: Data, fingerprint: str) -> Source:
    """The training data, read once more by a process that makes batches. Raises UnreadableError where it changed."""
    sources = option.sources()
    if sources.fingerprint != fingerprint:
        raise UnreadableError(
            f"data={option.kind}: changed since training began ({sources.summary} now); bring it back"
        )
    return sources.train


def advice(option: Data) -> str:
    """What may help where training waits for data."""
    workers = getattr(option, "workers", 0)
    return "try data.workers=2" if not workers else f"try more than data.workers={workers}, or data.prefetch=4"


def admit(run: RunDir, sources: Sources) -> None:
    """Write down what the data is, for a run that has trained on none yet; else see that it is the same.

    Raises RefusedError, which names what changed.
    """
    if recorded(run) is None or not run.holds_checkpoints():
        files.replace_file(run.data, json.dumps(_document(sources), indent=1, ensure_ascii=False) + "\n")
    else:
        compare(run, sources)


def compare(run: RunDir, sources: Sources) -> None:
    """Raises RefusedError, which names what changed, where this is not what the run was trained on."""
    before, now = recorded(run), _document(sources)
    if before is not None and before["fingerprint"] != now["fingerprint"]:
        raise RefusedError(refusal(run, sources.summary, differences(before["files"], now["files"])))


def recorded(run: RunDir) -> dict[str, Any] | None:
    """data.json; None for a run that was made before there was one, or was killed before it had one."""
    try:
        document = json.loads(run.data.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def refusal(run: RunDir, summary: str, changes: str) -> str:
    """Why a run cannot go on with this data."""
    what = changes or f"now: {summary}"
    return (
        f"{run}: the data is not what this run was trained on: {what}; "
        "bring it back (for data=stdlib: the same Python), or start a new run"
    )


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """`changed: cat/3.png (4.1 kB → 4.2 kB); 2 new; 1 gone: b.txt`; nothing where the files are the same."""
    changed = [
        f"{name} ({_change(before[name], now[name])})" for name in before if name in now and now[name] != before[name]
    ]
    new, gone = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    groups = (("changed", changed), ("new", new), ("gone", gone))
    return "; ".join(f"{_counted(len(names))}{what}: {_named(names)}" for what, names in groups if names)


def _counted(count: int) -> str:
    return f"{count:,} " if count > 1 else ""


def _named(names: list[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def _change(before: str, now: str) -> str:
    """`4.1 kB → 4.2 kB`, in bytes where that shows nothing."""
    old, new = int(before.split()[0]), int(now.split()[0])
    if old == new:
        return f"still {format_size(new)}, other content"
    if format_size(old) == format_size(new):
        return f"{old:,} → {new:,} bytes"
    return f"{format_size(old)} → {format_size(new)}"


def as_recorded(run: RunDir) -> Sources | None:
    """The shape of a run's data, without the data: one example of zeros. None where data.json does not say."""
    document = recorded(run)
    if document is None or "example" not in document:
        return None
    zeros = Table({name: np.zeros((1, *shape), dtype) for name, (dtype, *shape) in document["example"].items()})
    inputs, num_outputs = tuple(document["inputs"]), document["num_outputs"]
    return Sources(zeros, zeros, inputs, num_outputs, document["fingerprint"], document["summary"])


def _document(sources: Sources) -> dict[str, Any]:
    example = sources.eval.take(np.zeros(1, np.int64))
    return {
        "example": {name: [str(value.dtype), *value.shape[1:]] for name, value in example.items()},
        "inputs": list(sources.inputs),
        "num_outputs": sources.num_outputs,
        "fingerprint": sources.fingerprint,
        "summary": sources.summary,
        "files": fold_into_folders(sources.files),
    }
