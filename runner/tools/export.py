"""`export`: the weights alone, in a format that any program reads, with a page that says what they are.

The names are those of the checkpoint (`params.head.kernel`), and so is every bit. npz knows numpy's own types only:
bfloat16 and its like become float32 there, which holds each of their values exactly, and the page says so.
"""

from __future__ import annotations

import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runner.checkpoint import arrays
from runner.checkpoint.arrays import Leaf
from runner.checkpoint.record import STATE, size_text
from runner.errors import ConfigError
from runner.tools import Answer, Say
from runner.tools.card import Exported, card
from runner.tools.place import Checkpoint, maker_of, proven_at
from runner.tools.text import plural

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
    checkpoint, record = proven_at(arguments.checkpoint)
    state = checkpoint.directory / STATE
    stored = _stored(arrays.leaves(state), arguments.weights, checkpoint)
    kinds = {name: leaf for name, (_, leaf) in stored.items()}
    name, write = FORMATS[arguments.to]
    fresh = target.parent / f".{target.name}.{os.getpid()}"
    fresh.mkdir(parents=True)
    try:
        read = arrays.read(state, [there for there, _ in stored.values()])
        written = write(fresh / name, {here: read[there] for here, (there, _) in stored.items()})
        about = Exported(checkpoint, record, maker_of(checkpoint), name, kinds, written, arguments.weights)
        (fresh / "README.md").write_text(card(about))
        shutil.copyfile(checkpoint.run.config, fresh / "config.yaml")
        shutil.copymode(fresh / "README.md", fresh / name)  # safetensors would let nobody else read it
        fresh.rename(target)  # all of it or nothing; over an empty directory as well
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    num_bytes = (target / name).stat().st_size
    say(f"{target / name}  {plural(len(kinds), 'array')}, {size_text(num_bytes)}, from {checkpoint}")
    say(f"{target / 'README.md'}  says what it is and how to load it")
    return Answer(_plain(checkpoint, target / name, num_bytes, written))


def _stored(leaves: Mapping[str, Leaf], weights: str, checkpoint: Checkpoint) -> dict[str, tuple[str, Leaf]]:
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
