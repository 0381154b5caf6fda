"""What `train.parts` costs: a step in eight parts ÷ the same in eight microbatches, and ÷ the undivided batch.

    python -m tests.bench.parts

One device, one process, the steps of the three interleaved; medians.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax

from runner.launch.compose import compose_run
from runner.train.build import build
from runner.train.compile import compile_step

CASES = {
    "default gpt": ["data=stdlib"],
    "mlp of width 512": ["model=mlp", "data=digits", "model.width=512"],
    "default resnet": ["model=resnet", "data=digits"],
}
WAYS = (["train.parts=8"], ["train.microbatches=8"], [])
ROUNDS, WARM_UP = 30, 3


class TimedSteps:
    """The steps of one way to compute a batch, and what each of them took."""

    def __init__(self, words: list[str]):
        config = compose_run(words).config
        self.built = build(config)
        self.program, self.lr = compile_step(self.built, config), self.built.train_step.put_lr()
        self.state: Any = self.built.init()
        self.seconds: list[float] = []

    def take_step(self) -> None:
        """Do one update, and wait for it."""
        batch = next(self.built.stream)
        began = time.perf_counter()
        self.state, _ = self.program(self.state, batch, self.lr)
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - began)

    @property
    def median(self) -> float:
        """Return the median of a step, in seconds, after the first ones."""
        return statistics.median(self.seconds[WARM_UP:])


def main() -> None:
    """Measure every case, and print a line for each."""
    for name, words in CASES.items():
        ways = [TimedSteps([*words, *more]) for more in WAYS]
        for _ in range(ROUNDS):
            for way in ways:
                way.take_step()
        parts, microbatches, whole = (way.median for way in ways)
        print(
            f"{name:<18} {1e3 * parts:7.2f} ms in parts  ÷ microbatches {parts / microbatches:.2f}  "
            f"÷ whole {parts / whole:.2f}"
        )


if __name__ == "__main__":
    main()
