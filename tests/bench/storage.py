"""What a checkpoint costs, against what the machine can do: `python -m tests.bench.storage [--sizes 10,100]`.

Everything is interleaved in each round, and every number is the median of the rounds' own ratios, the first round left
out: the machine is shared. The measures of the machine, for the same bytes:

    copy   into memory that is there already        (blocking ÷ copy:    how long training waits)
    write  to one file, and fsync                   (durable ÷ write:    until the checkpoint is on disk; ours sealed)
    read   from a file in the page cache, likewise  (restore ÷ read:     until the arrays are back; ours verified)
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from runner.checkpoint import store
from runner.checkpoint.checkpointer import Checkpointer, SaveListeners, SavePolicy
from runner.checkpoint.record import PROGRESS, STATE, Score
from runner.checkpoint.restore import restore_newest
from runner.checkpoint.retention import KeepLast
from runner.checkpoint.strategy import Failures
from runner.values import StepInfo

MB = 10**6
# name → number of leaves, bytes of each
STATES = {"10MB": (10, MB), "100MB": (20, 5 * MB), "1GB": (25, 40 * MB), "2000x4KB": (2000, 4096)}
Timed = dict[str, float]  # blocking, durable, restore: seconds


def main() -> int:
    parser = argparse.ArgumentParser(description="What a checkpoint costs, against what the machine can do.")
    parser.add_argument("--sizes", default=",".join(STATES), help=f"of {', '.join(STATES)}")
    parser.add_argument("--rounds", type=int, default=0, help="0: more for the small ones")
    parser.add_argument("--dir", type=Path, default=None, help="where to write; default: the temporary directory")
    arguments = parser.parse_args()
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
    jax.block_until_ready(state)
    machine, ways = Machine(num_leaves * num_bytes), [Ours(folder / "ours"), Orbax(folder / "orbax"), Safetensors()]
    for number in range(rounds):
        found = {"machine": machine.timed(folder / "file")}
        for way in ways[number % 3 :] + ways[: number % 3]:  # nobody is always the first
            place = folder / type(way).__name__.lower()
            found[type(way).__name__] = way.timed(place, state, number + 1)
            shutil.rmtree(place, ignore_errors=True)
        if number:
            yield found


def report(name: str, rounds: int, found: list[dict[str, Timed]]) -> None:
    """One table: ratios to the machine, and the machine."""
    machine = {key: statistics.median(row["machine"][key] for row in found) for key in ("copy", "write", "read")}
    shown = ", ".join(f"{key} {1000 * value:.1f} ms" for key, value in machine.items())
    print(f"\n{name}, {rounds - 1} rounds · this machine: {shown}", flush=True)
    print(
        f"  {'':12} {'blocking ÷ copy':>16} {'durable ÷ write':>16} {'restore ÷ read':>16}   blocking/durable/restore ms"
    )
    for way in ("Ours", "Orbax", "Safetensors"):
        ratios = [
            statistics.median(row[way][mine] / row["machine"][theirs] for row in found)
            for mine, theirs in (("blocking", "copy"), ("durable", "write"), ("restore", "read"))
        ]
        seconds = [
            1000 * statistics.median(row[way][key] for row in found) for key in ("blocking", "durable", "restore")
        ]
        columns = " ".join(f"{ratio:16.2f}" for ratio in ratios)
        print(f"  {way:12} {columns}   {' / '.join(f'{value:.0f}' for value in seconds)}", flush=True)


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

    def __init__(self, folder: Path):
        self._policy = SavePolicy({}, {"last": KeepLast(n=1)}, Score(), background=True)

    def timed(self, folder: Path, state: Any, step: int) -> Timed:
        saver = Checkpointer(folder, self._policy, store, SaveListeners(print, lambda saved: None), Failures())
        saver.holds(0)
        start = time.perf_counter()
        saver.save("bench", StepInfo(step), {STATE: state, PROGRESS: {}})
        blocking = time.perf_counter() - start
        assert saver.holds(step)
        durable = time.perf_counter() - start
        saver.close()
        template = abstract(state)
        return {"blocking": blocking, "durable": durable, "restore": seconds(lambda: self._restored(folder, template))}

    def _restored(self, folder: Path, template: Any) -> None:
        found = restore_newest(
            folder, folder / "quarantine", lambda directory: store.read_state(directory, template), print
        )
        assert found is not None
        jax.block_until_ready(found[1])


class Orbax:
    """CheckpointManager with its defaults: asynchronous, OCDBT, zarr 2, compressed; nothing verified."""

    def __init__(self, folder: Path):
        pass

    def timed(self, folder: Path, state: Any, step: int) -> Timed:
        with ocp.CheckpointManager(folder) as manager:
            start = time.perf_counter()
            manager.save(step, args=ocp.args.StandardSave(state))
            blocking = time.perf_counter() - start
            manager.wait_until_finished()
            durable = time.perf_counter() - start
            template = abstract(state)
            restore = seconds(
                lambda: jax.block_until_ready(manager.restore(step, args=ocp.args.StandardRestore(template)))
            )
        return {"blocking": blocking, "durable": durable, "restore": restore}


class Safetensors:
    """One file, written while training waits, and fsynced; read back to arrays on the device. Nothing verified."""

    def timed(self, folder: Path, state: Any, step: int) -> Timed:
        folder.mkdir()
        path = folder / f"{step}.safetensors"
        saved = seconds(lambda: self._write(path, state))
        restore = seconds(lambda: jax.block_until_ready({k: jnp.array(v) for k, v in load_file(path).items()}))
        return {"blocking": saved, "durable": saved, "restore": restore}

    def _write(self, path: Path, state: Any) -> None:
        save_file({name: np.asarray(leaf) for name, leaf in state.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
