"""Measure how long a step takes under several policies, in turns on one state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from runner.remat.candidates import Candidate, is_no_room
from runner.types import Batch, State
from runner.values import Say

SIGN_OF_LIFE_SECONDS = 5.0

Step = Callable[[State, Batch], tuple[State, Any]]


def time_steps(base: Candidate, programs: Mapping[str, Step], rounds: int, say: Say) -> dict[str, list[float]]:
    """Return the seconds of `rounds` steps of each program, by its name.

    The programs are those of one configuration under several policies; `base` is any of its candidates. One that finds
    no room on the device is left out from then on, and `say` is told so.
    """
    built = base.built
    # All programs go on from one state, for it is large.
    batch, state = built.put(next(built.stream)), built.init()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    told = time.monotonic()
    # The first round does not count: caches and allocators are cold. Each round begins with another program, so that
    # what a step leaves behind for the next one favours none of them.
    for turn in range(rounds + 1):
        names = list(seconds)
        first = turn % max(len(names), 1)
        for name in (*names[first:], *names[:first]):
            began = time.perf_counter()
            try:
                state, _ = jax.block_until_ready(programs[name](state, batch))
            except jax.errors.JaxRuntimeError as error:
                say(f"  {name}: {describe_no_room(error)}")
                del seconds[name]
                # A step takes its state's memory over (jax: donation), also one that fails.
                state = built.init()
                continue
            if turn:
                seconds[name].append(time.perf_counter() - began)
        if time.monotonic() > told + SIGN_OF_LIFE_SECONDS:
            told = time.monotonic()
            say(f"  {turn}/{rounds} steps with each")
    return seconds


def describe_no_room(error: Exception) -> str:
    """Return what is said of a program that finds no room; raises the error where it says something else."""
    if not is_no_room(error):
        raise error
    return "does not fit: " + str(error).splitlines()[0].partition(":")[2].strip()
