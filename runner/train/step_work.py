"""Count what one step does, from the shapes of its batch and from the trace that was compiled."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np

from runner.config.schema import Config
from runner.trace.flops import count_useful_flops, find_uncounted
from runner.trace.peak_flops import find_peak_flops
from runner.train.built import Built
from runner.train.speed import StepWork


def describe_batch(built: Built, config: Config) -> StepWork:
    """Return what a step works on; its FLOPs are not counted yet."""
    if config.data.kind == "none":
        return StepWork(None, None)
    tokens, size = built.sources.eval.take(np.zeros(1, np.int64)).get("tokens"), config.data.batch_size
    # A window of tokens is one longer than what is predicted; an example may have several (a pair of answers).
    return StepWork(size, None if tokens is None else size * math.prod(tokens.shape[1:-1]) * (tokens.shape[-1] - 1))


def count_work(work: StepWork, config: Config, traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> StepWork:
    """Return what a step does with its FLOPs, as they are counted in its trace, and with the peak of its devices."""
    device, jaxpr = mesh.devices.flat[0], traced.jaxpr.jaxpr
    peak = config.train.peak_flops or find_peak_flops(device.device_kind)
    uncounted = find_uncounted(jaxpr)
    untold = ""
    if uncounted and peak is not None:
        untold = f"no trace tells the FLOPs of {', '.join(uncounted)}"
    elif peak is None and device.platform != "cpu":
        untold = f"the peak of a {device.device_kind} is not known; say it with train.peak_flops=FLOP_PER_SECOND"
    return replace(
        work,
        flops=None if uncounted else count_useful_flops(jaxpr),
        peak=None if peak is None else peak * mesh.size,
        untold=untold,
    )
