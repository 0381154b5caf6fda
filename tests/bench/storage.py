"""What a checkpoint costs, against what the machine can do: `python -m tests.bench.storage [--sizes 10MB,100MB]`.

Everything is interleaved in each round, and every number is the median of the rounds' own ratios, the first round left
out: the machine is shared. The measures of the machine, for the same bytes:

    copy   into memory that is there already        (stall ÷ copy:       how much later the next step ends for the save)
    write  to one file, and fsync                   (durable ÷ write:    until the checkpoint is on disk; ours sealed)
    read   from a file in the page cache, likewise  (restore ÷ read:     until the arrays are back; ours verified)

The stall is what training loses, whenever `save` returns: from the save until a step that is given the arrays to reuse
is done, less what that step takes alone. The first step after a restore is told too, for what a restore leaves to it.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from runner.checkpoint import store
from runner.checkpoint.checkpointer import Checkpointer, SavedCheckpoint, SaveListeners, SavePolicy
from runner.checkpoint.proving_reader import ProvingReader
from runner.checkpoint.record import PROGRESS, STATE, Score
from runner.checkpoint.restore import restore_newest
from runner.checkpoint.retention import KeepLast
from runner.checkpoint.strategy import Failures
from runner.values import StepInfo

MB = 10**6
# name → number of leaves, bytes of each
STATES = {"10MB": (10, MB), "100MB": (20, 5 * MB), "1GB": (25, 40 * MB), "2000x4KB": (2000, 4096)}
Timed = dict[str, float]  # stall, durable, restore, first: seconds
COLUMNS = (("stall", "copy"), ("durable", "write"), ("restore", "read"), ("first", "read"))


def main() -> int:
    parser = argparse.ArgumentParser(description="What a checkpoint costs, against what the machine can do.")
    parser.add_argument("--sizes", default=",".join(STATES), help=f"of {', '.join(STATES)}")
    parser.add_argument("--rounds", type=int, default=0, help="0: more for the small ones")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; default: the temporary directory")
    arguments = parser.parse_args()
    # As a run restores: Python looks for garbage less often while it starts.
    gc.set_threshold(100_000)
    for name in arguments.sizes.split(","):
        rounds = arguments.rounds or (5 if name == "1GB" else 9)
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            report(name, rounds, list(measured(name, rounds, Path(folder))))
    return 0


def measured(name: str, rounds: int, folder: Path) -> Iterator[dict[str, Timed]]:
    """One dictionary a round: the machine's own times and those of each way to save."""
    num_leaves, num_bytes = STATES[name]
    rng = np.random.default_rng(0)
    state = {
        f"leaf{n:04}": jnp.asarray(rng.standard_normal(num_bytes // 4, dtype=np.float32)) for n in range(num_leaves)
    }
    training, machine = Training(state), Machine(num_leaves * num_bytes)
    ways: list[Way] = [Ours(), Orbax(), OrbaxTuned(), Safetensors()]
    for number in range(rounds):
        found = {"machine": machine.timed(folder / "file")}
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:  # nobody is always the first
            place = folder / type(way).__name__.lower()
            os.sync()
            found[type(way).__name__] = way.timed(place, training, number + 1)
            shutil.rmtree(place, ignore_errors=True)
        if number:
            yield found


def report(name: str, rounds: int, found: list[dict[str, Timed]]) -> None:
    """One table: ratios to the machine, the least and the largest of them, and the machine."""
    machine = {key: statistics.median(row["machine"][key] for row in found) for key in ("copy", "write", "read")}
    shown = ", ".join(f"{key} {1000 * value:.1f} ms" for key, value in machine.items())
    print(f"\n{name}, {rounds - 1} rounds · this machine: {shown}", flush=True)
    print(f"  {'':12} " + " ".join(f"{f'{mine} ÷ {theirs}':>22}" for mine, theirs in COLUMNS) + "   the same in ms")
    for way in (name for name in found[0] if name != "machine"):
        columns, seconds = [], []
        for mine, theirs in COLUMNS:
            ratios = [row[way][mine] / row["machine"][theirs] for row in found]
            spread = f"[{min(ratios):.1f}-{max(ratios):.1f}]"
            columns.append(f"{statistics.median(ratios):8.2f} {spread:>13}")
            seconds.append(f"{1000 * statistics.median(row[way][mine] for row in found):.0f}")
        print(f"  {way:12} {' '.join(columns)}   {' / '.join(seconds)}", flush=True)


class Training:
    """A state, and a step that is given its arrays to reuse, as every step of a run is."""

    def __init__(self, state: Any):
        self._step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0.999, state), donate_argnums=0)
        self.state = state
        self.seconds()

    def seconds(self) -> float:
        """What one step takes, until it is done."""
        return seconds(self.advance)

    def advance(self) -> None:
        self.state = jax.block_until_ready(self._step(self.state))

    def stall(self, save: Callable[[], object]) -> float:
        """How much later a step is done because of a save before it."""
        alone = statistics.median(self.seconds() for _ in range(3))
        start = time.perf_counter()
        save()
        self.advance()
        return time.perf_counter() - start - alone

    def first(self, restored: Any) -> float:
        """What the first step takes after a restore."""
        self.state = restored
        return self.seconds()


class Way(Protocol):
    """One way to save and restore."""

    def timed(self, folder: Path, training: Training, step: int) -> Timed: ...


class Machine:
    """Copy, write with fsync, and read of as many bytes, in memory that has been touched before."""

    def __init__(self, num_bytes: int):
        self._source, self._target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)

    def timed(self, path: Path) -> Timed:
        return {
            "copy": seconds(lambda: np.copyto(self._target, self._source)),
            "write": seconds(lambda: self._write(path)),
            "read": seconds(lambda: self._read(path)),
        }

    def _write(self, path: Path) -> None:
        with path.open("wb", buffering=0) as out:
            rest = memoryview(self._source)
            while rest:
                rest = rest[out.write(rest) :]
            os.fsync(out.fileno())

    def _read(self, path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            rest = memoryview(self._target)
            while rest:
                rest = rest[file.readinto(rest) :]


class Ours:
    """The checkpointer as the runner uses it: in the background, sealed, synced, named; restored after verifying."""

    def __init__(self) -> None:
        self._policy = SavePolicy({}, {"last": KeepLast(n=1)}, Score(), background=True)

    def timed(self, folder: Path, training: Training, step: int) -> Timed:
        saves: list[SavedCheckpoint] = []
        saver = Checkpointer(folder, self._policy, store, SaveListeners(print, saves.append), Failures())
        saver.holds(0)
        template = abstract(training.state)
        stall = training.stall(lambda: saver.save("bench", StepInfo(step), {STATE: training.state, PROGRESS: {}}))
        assert saver.holds(step)
        saver.close()
        restore, restored = timed(lambda: self._restored(folder, template))
        first = training.first(restored)
        return {"stall": stall, "durable": saves[0].durable_seconds, "restore": restore, "first": first}

    def _restored(self, folder: Path, template: Any) -> Any:
        reader = ProvingReader(
            lambda directory, measured: store.read_state(directory, template, measured), checksums=True
        )
        found = restore_newest(folder, folder / "quarantine", reader.read, print, measure=reader.measure)
        assert found is not None
        return jax.block_until_ready(found[1])


class Orbax:
    """CheckpointManager with its defaults: asynchronous, OCDBT, zarr 2, compressed; nothing verified."""

    options: ClassVar[dict[str, Any] | None] = None

    def timed(self, folder: Path, training: Training, step: int) -> Timed:
        handler = ocp.PyTreeCheckpointHandler(**self.options) if self.options else ocp.StandardCheckpointHandler()
        save, restore = (
            (ocp.args.PyTreeSave, ocp.args.PyTreeRestore)
            if self.options
            else (ocp.args.StandardSave, ocp.args.StandardRestore)
        )
        template = abstract(training.state)
        with ocp.AsyncCheckpointer(handler) as saver:
            begun = []

            def begin() -> None:
                begun.append(time.perf_counter())
                saver.save(folder / str(step), args=save(training.state))

            stall = training.stall(begin)
            saver.wait_until_finished()
            durable = time.perf_counter() - begun[0]
            arguments: Any = restore(template)
            if self.options:
                arguments = restore(restore_args=ocp.checkpoint_utils.construct_restore_args(template))
            took, restored = timed(lambda: jax.block_until_ready(saver.restore(folder / str(step), args=arguments)))
        return {"stall": stall, "durable": durable, "restore": took, "first": training.first(restored)}


class OrbaxTuned(Orbax):
    """The same with zarr 3 and without compression, as ours."""

    options: ClassVar[dict[str, Any] | None] = {"use_ocdbt": True, "use_zarr3": True, "use_compression": False}


class Safetensors:
    """One file, written while training waits, and fsynced; read back to arrays on the device. Nothing verified."""

    def timed(self, folder: Path, training: Training, step: int) -> Timed:
        folder.mkdir()
        path = folder / f"{step}.safetensors"
        durable = 0.0

        def save() -> None:
            nonlocal durable
            durable = seconds(lambda: self._write(path, training.state))

        stall = training.stall(save)
        restore, restored = timed(
            lambda: jax.block_until_ready({key: jnp.array(value) for key, value in load_file(path).items()})
        )
        return {"stall": stall, "durable": durable, "restore": restore, "first": training.first(restored)}

    def _write(self, path: Path, state: Any) -> None:
        save_file({name: np.asarray(leaf) for name, leaf in state.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def seconds(work: Callable[[], object]) -> float:
    return timed(work)[0]


if __name__ == "__main__":
    sys.exit(main())
