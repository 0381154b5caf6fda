"""What the runner costs: time per step of our loop ÷ a bare hand-written JAX loop, same model, same data, one process.

    python -m tests.bench.loop

The bare loop does nothing but train. Ours writes every local log (metrics, timing, status, TensorBoard, console), once
without saving and once saving in the background every 50 steps. Segments of the three are interleaved; a ratio is the
median over the rounds. On a machine whose cores all train, the work of a save is taken from training; and where 50
steps are shorter than a save, it saves all the time.

Then saves that come often ÷ our own loop without them: one in about 0.1 s of short steps, and one in ten steps of a
large state. The pressure is the bytes of the state ÷ what the disk takes between two saves, and the processor time that
of a save more than without.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from models.objectives import OBJECTIVES
from runner.config.schema import Config, validate_config
from runner.files import make_folder
from runner.log.console import choose_console
from runner.preempt.stop import StopFlag
from runner.rundir.attempt_log import AttemptLog
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import lock_run
from runner.train.assemble import open_parts
from runner.train.build import build
from runner.train.compile import start_compiling
from runner.train.compile_cache import CacheStats
from runner.train.loop import Cadence, Progress, train
from runner.train.run_context import RunContext

CASES = {
    "mlp, about 1 ms": ({"kind": "mlp", "width": 256, "num_layers": 3}, "features", 64, 64, 500),
    "gpt, about 10 ms": (
        {"kind": "gpt", "num_layers": 2, "width": 64, "num_heads": 2, "hidden": 256},
        "tokens",
        64,
        8,
        200,
    ),
    "gpt, about 50 ms": (
        {"kind": "gpt", "num_layers": 4, "width": 128, "num_heads": 4, "hidden": 512},
        "tokens",
        128,
        4,
        50,
    ),
}
ROUNDS = 9


# A save every so many steps, and steps of a segment.
OFTEN = {
    "mlp, about 0.5 ms": ({"kind": "mlp", "width": 256, "num_layers": 3}, "features", 64, 64, 200, 1000),
    "mlp, about 1 ms": ({"kind": "mlp", "width": 512, "num_layers": 3}, "features", 64, 64, 100, 500),
    "mlp, about 50 ms": ({"kind": "mlp", "width": 1536, "num_layers": 4}, "features", 64, 256, 10, 40),
}


def configuration(model: dict[str, object], gives: str, seq_len: int, batch_size: int, *, save_steps: int) -> Config:
    """`save_steps`: save after every so many; 0 for never."""
    rules = {"periodic": {"kind": "steps", "steps": save_steps}, "best": {"kind": "best"}} if save_steps else {}
    return validate_config(
        {
            "model": model,
            "data": {"kind": "synthetic", "gives": gives, "seq_len": seq_len, "batch_size": batch_size},
            "optim": {"kind": "adamw"},
            "schedule": {"kind": "cosine", "warmup_steps": 20},
            "train": {"steps": 10**9, "log_steps": 10, "eval_steps": 10**9},
            "ckpt": {"save": rules, "write": "background"},
            "retention": {"last": {"kind": "last", "n": 2}, "best": {"kind": "best", "n": 1}},
            "remat": {"kind": "none"},
            "mesh": {},
            "preempt": {},
            "log": {},
            "score": {},
        }
    )


def bare(config: Config, num_steps: int) -> Callable[[], float]:
    """A loop as one would write it by hand. Gives seconds for a segment of steps."""
    sources = config.data.sources()
    model = config.model.build(sources.inputs, sources.num_outputs, nnx.Rngs(0))
    objective = OBJECTIVES[config.model.objective]
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(4e-3, b2=0.99, weight_decay=0.1))

    def step(params, rest, opt, batch):  # type: ignore[no-untyped-def]
        def loss_of(params):  # type: ignore[no-untyped-def]
            model = nnx.merge(graphdef, params, rest, copy=True)
            loss = objective(model, batch)["loss"].mean()
            return loss, nnx.split(model, nnx.Param, ...)[2]

        (loss, rest_after), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), rest_after, opt, loss

    # Flat leaves: flattening NNX variables in Python at each call would make the bare loop the slower one.
    leaves, structure = jax.tree.flatten((params, rest, tx.init(params)))

    def flat(leaves, batch):  # type: ignore[no-untyped-def]
        *state, loss = step(*jax.tree.unflatten(structure, leaves), batch)
        return jax.tree.leaves(tuple(state)), loss

    jitted = jax.jit(flat, donate_argnums=0)
    rng, held = np.random.default_rng(0), {"leaves": leaves}
    size, batch_size = len(sources.train), config.data.batch_size

    def segment() -> float:
        start, leaves = time.perf_counter(), held["leaves"]
        for _ in range(num_steps):
            leaves, loss = jitted(leaves, sources.train.take(rng.integers(0, size, batch_size)))
        jax.block_until_ready(loss)
        held["leaves"] = leaves
        return time.perf_counter() - start

    return segment


def ours(config: Config, num_steps: int, folder: Path, stack: contextlib.ExitStack) -> Callable[[], float]:
    """The runner's own loop, with everything around it. Gives seconds for a segment of steps."""
    built, run = build(config), RunDir(folder)
    console, stop_flag = choose_console(run.log, wanted=True), StopFlag()
    lock = stack.enter_context(lock_run(run))
    attempt = AttemptLog(run, config.score, config.train.num_steps, "bench", time.time(), lock.prove)
    make_folder(run.logs)
    attempt.begin([], [])
    attempt.begin_training(0, None, "bench")
    context = RunContext(config, run, attempt, console, stop_flag, lock)
    programs = start_compiling(built, config, config.remat, attempt, CacheStats())
    programs.train.result()
    parts = stack.enter_context(open_parts(context, built, programs, Progress({}, 0)))
    held = {"state": built.init(), "step": 0}
    console.begin(0, 10**9)

    def segment() -> float:
        start = time.perf_counter()
        stop = held["step"] + num_steps
        cadence = Cadence(stop, config.train.log_steps, frozenset(), save_last=False)
        evaluating = dataclasses.replace(parts.evaluating, evaluate=lambda state, step: {})
        quiet = dataclasses.replace(parts, cadence=cadence, evaluating=evaluating)
        reached = train(quiet, Progress(held["state"], held["step"]), stop_flag)
        held["state"], held["step"] = reached.state, reached.step
        jax.block_until_ready(held["state"])
        return time.perf_counter() - start

    return segment


def write_seconds(num_bytes: int) -> float:
    """What the disk takes for so many bytes in one file, until they are durable."""
    content = np.ones(num_bytes, np.uint8)
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
        return time.perf_counter() - start


def measure_saves() -> None:
    columns = f"{'ms a step':>10}{'every s':>9}{'pressure':>10}{'saving ÷ not':>14}{'[min - max]':>18}{'ms of CPU':>11}"
    print(f"\n{'saves':<20}{columns}")
    for name, (model, gives, seq_len, batch_size, save_steps, num_steps) in OFTEN.items():
        configs = [configuration(model, gives, seq_len, batch_size, save_steps=steps) for steps in (0, save_steps)]
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(build(configs[0]).abstract))
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in configs]
            segments = [ours(config, num_steps, folder, stack) for config, folder in zip(configs, folders, strict=True)]
            for segment in segments:
                segment()
            rounds = []
            for _ in range(ROUNDS):
                row = [write_seconds(num_bytes)]
                for segment in segments:
                    began = time.process_time()
                    row += [segment(), time.process_time() - began]
                rounds.append(row)
        interval = statistics.median(row[1] for row in rounds) / num_steps * save_steps
        ratios = sorted(row[3] / row[1] for row in rounds)
        cpu = statistics.median(row[4] - row[2] for row in rounds) / (num_steps / save_steps)
        pressure = statistics.median(row[0] for row in rounds) / interval
        line = f"{name:<20}{interval / save_steps * 1e3:>10.2f}{interval:>9.2f}{pressure:>10.2f}"
        line += f"{statistics.median(ratios):>14.3f}{f'[{ratios[0]:.3f} - {ratios[-1]:.3f}]':>18}{cpu * 1e3:>11.1f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the runner costs.")
    parser.add_argument("--only", choices=("loop", "saves"), help="one of the two tables")
    only = parser.parse_args().only
    if only != "saves":
        measure_loop()
    if only != "loop":
        measure_saves()


def measure_loop() -> None:
    print(f"{'case':<20}{'bare ms':>9}{'ours ÷ bare':>14}{'[min - max]':>18}{'and saving':>12}{'[min - max]':>18}")
    for name, (model, gives, seq_len, batch_size, num_steps) in CASES.items():
        configs = [configuration(model, gives, seq_len, batch_size, save_steps=steps) for steps in (0, 50)]
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
            folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in configs]
            segments = [bare(configs[0], num_steps)]
            segments += [
                ours(config, num_steps, folder, stack) for config, folder in zip(configs, folders, strict=True)
            ]
            for segment in segments:
                segment()  # compiles, fills caches
            rounds = [[segment() for segment in segments] for _ in range(ROUNDS)]
        line = f"{name:<20}{statistics.median(row[0] for row in rounds) / num_steps * 1e3:>9.2f}"
        for column, width in ((1, 14), (2, 12)):
            ratios = sorted(row[column] / row[0] for row in rounds)
            line += f"{statistics.median(ratios):>{width}.3f}{f'[{ratios[0]:.3f} - {ratios[-1]:.3f}]':>18}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
