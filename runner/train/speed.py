"""How fast training is: steps, examples and tokens a second, and the share of the devices' peak that it uses (MFU).

Nothing is added to a step and nothing is compiled for it: the seconds are those between two steps that are logged, and
the FLOPs are counted in the trace of the compiled step, which is there anyway, after training has begun: see
step_work.py. No jax.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from runner.types import JsonObject
from runner.values import Say, Speed


@dataclass(frozen=True)
class StepWork:
    """What one step does.

    Attributes:
        examples: in its batch; None where it has no data.
        tokens: that it predicts; None where the data are no tokens.
        flops: that it needs, on all devices, without what is done again; None where no trace tells.
        peak: FLOP/s that all devices can do at most; None where that is not known.
        untold: why there is no MFU, where a person could do something about it.
    """

    examples: int | None
    tokens: int | None
    flops: int | None = None
    peak: float | None = None
    untold: str = ""

    def measure(self, steps: int, seconds: float) -> Speed:
        """Return the speed of so many steps in so much time."""
        rate = steps / max(seconds, 1e-9)
        is_known = self.flops and self.peak
        return Speed(
            steps=rate,
            examples=None if self.examples is None else rate * self.examples,
            tokens=None if self.tokens is None else rate * self.tokens,
            mfu=rate * self.flops / self.peak if is_known else None,  # type: ignore[operator]
        )


class SpeedMeter:
    """Measure the time between two steps that are logged, with and without what training waited for in between.

    `batch` is what a step works on; `counted` is that with its FLOPs, when they are counted: until then no MFU is told.
    """

    def __init__(self, batch: StepWork, counted: Future[StepWork], say: Say, step: int):
        self._work, self._counted, self._say, self._step = batch, counted, say, step
        self._is_counted = False
        self._since, self._paused, self._paused_before = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time of a block as that of steps: an evaluation, a save."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def leave_out(self, seconds: float) -> None:
        """Do not count so much of the time since the last measurement as that of steps."""
        self._paused += seconds

    def read_clock(self) -> float:
        """Return the seconds on a clock that stands still during a pause. Not within one."""
        return time.perf_counter() - self._paused_before - self._paused

    def measure(self, step: int) -> tuple[JsonObject, Speed]:
        """Return what timing.jsonl says of the steps since the last call, and their speed."""
        now = time.perf_counter()
        steps, elapsed, paused = step - self._step, now - self._since, self._paused
        self._step, self._since, self._paused = step, now, 0.0
        self._paused_before += paused
        self._take_count()
        speed = self._work.measure(steps, elapsed - paused)
        record: JsonObject = {"steps": steps, "seconds": round(elapsed, 6)}
        if paused:
            record["paused"] = round(paused, 6)
        rates = {"examples_per_second": speed.examples, "tokens_per_second": speed.tokens}
        record |= {name: round(rate, 3) for name, rate in rates.items() if rate is not None}
        if speed.mfu is not None:
            record["mfu"] = round(speed.mfu, 6)
        return record, speed

    def _take_count(self) -> None:
        # Where counting failed that is told at the end, by who waits for it.
        if self._is_counted or not self._counted.done():
            return
        self._is_counted = True
        if self._counted.exception() is None:
            self._work = self._counted.result()
            if self._work.untold:
                self._say(f"MFU is not told: {self._work.untold}")
