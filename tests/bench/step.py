"""What the update itself costs: the compiled train step ÷ plain Adam, and ÷ the same math by optax, for two MLPs.

    python -m tests.bench.step        # a minute

Each row is a process of its own, with memory in pages of 4 kB or of 2 MB (runner/launch/huge_pages.py); within it the
three programs are interleaved, and a ratio is the median over the rounds. All three give the loss and the norm of the
gradient, but for plain Adam, which gives the loss alone. All are given the same batch again and again.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from runner.launch.huge_pages import TUNABLES, WANTED

# Name: width, layers, steps of a segment.
CASES = {"1.8 M": (768, 3, 40), "10 M": (1824, 3, 8)}
ROUNDS, FEATURES, CLASSES, BATCH_SIZE = 25, 64, 10, 16
PAGES = {"4 kB": "", "2 MB": WANTED}


def repeat(program: Callable[..., Any], state: Any, *rest: Any, count: int) -> Callable[[], float]:
    """A segment of steps. Gives seconds a step."""
    import jax

    held = {"state": state}

    def segment() -> float:
        start, state = time.perf_counter(), held["state"]
        for _ in range(count):
            state, metrics = program(state, *rest)
            # As the loop does: at most two steps under way.
            jax.block_until_ready(metrics)
        held["state"] = jax.block_until_ready(state)
        return (time.perf_counter() - start) / count

    return segment


def by_hand(make: str, width: int, layers: int, batch: Any, count: int) -> Callable[[], float]:
    """The step of an MLP as one would write it: `adam`, or `clip and adamw`, which is the default's math."""
    import jax
    import jax.numpy as jnp
    import optax

    tx = optax.adam(4e-3)
    if make != "adam":
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(4e-3, b2=0.99, weight_decay=0.1))
    sizes = [FEATURES, *[width] * layers, CLASSES]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        (jax.random.normal(key, (a, b)) / a**0.5, jnp.zeros(b))
        for key, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]

    def loss_of(params: Any, batch: Any) -> jax.Array:
        x = batch["inputs"]
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        logits = x @ params[-1][0] + params[-1][1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def step(state: Any, batch: Any) -> Any:
        params, opt = state
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        norm = {} if make == "adam" else {"grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt), {"loss": loss, **norm}

    return repeat(jax.jit(step, donate_argnums=0), (params, tx.init(params)), batch, count=count)


def ours(width: int, layers: int, count: int) -> tuple[Callable[[], float], Any]:
    """The step of a run, as the loop calls it; and a batch."""
    from runner.train.build import build
    from runner.train.compile import compile_step
    from tests.bench.loop import configuration

    model = {"kind": "mlp", "width": width, "num_layers": layers}
    config = configuration(model, "features", FEATURES, BATCH_SIZE, saving=False)
    built = build(config)
    batch = built.put(next(built.stream))
    program = compile_step(built, config)
    return repeat(program, built.init(), batch, built.train_step.put_lr(), count=count), batch


def measure(width: int, layers: int, count: int) -> str:
    """One row: ms of plain Adam, and what the others take of it."""
    segment, batch = ours(width, layers, count)
    segments = [*(by_hand(make, width, layers, batch, count) for make in ("adam", "clip and adamw")), segment]
    for each in segments:
        each()
    rounds = [[each() for each in segments] for _ in range(ROUNDS)]
    adam = statistics.median(row[0] for row in rounds)
    same_math, own, own_of_same = (
        statistics.median(row[a] / row[b] for row in rounds) for a, b in ((1, 0), (2, 0), (2, 1))
    )
    return f"{adam * 1e3:>10.2f} ms{same_math:>18.2f}{own:>18.2f}{own_of_same:>22.2f}"


def main() -> None:
    if sys.argv[1:]:
        print(measure(*map(int, sys.argv[1:])))
        return
    print(f"{'':<16}{'plain Adam':>13}{'optax ÷ Adam':>18}{'ours ÷ Adam':>18}{'ours ÷ optax':>22}")
    for case, sizes in CASES.items():
        for pages, tunables in PAGES.items():
            command = [sys.executable, "-m", "tests.bench.step", *map(str, sizes)]
            environment = {**os.environ, TUNABLES: tunables}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            print(f"{case + ', ' + pages:<16}{done.stdout.rstrip()}", flush=True)


if __name__ == "__main__":
    main()
