"""Why an interrupted run is not the uninterrupted one, probably: pure reasoning over what differs.

The tell-tale is what only one mistake explains. Everything that is trained differs after any of them, so differing
parameters say nothing by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.drill.compare import Evidence, Line

DETERMINISTIC = "on a GPU, XLA_FLAGS=--xla_gpu_deterministic_ops=true makes XLA choose operations that repeat"


@dataclass(frozen=True)
class Facts:
    """What is known: names of differing arrays and keys of progress, the first differing line, where it went on from.

    `resumes`: the steps from which training went on after a kill; `agree`: steps whose checkpoints both runs kept, and
    all of their arrays are equal; `again`: how a second uninterrupted run compares with the first.
    """

    arrays: Sequence[str]
    progress: Sequence[str]
    line: Line | None
    resumes: Sequence[int]
    agree: Sequence[int] = ()
    again: Evidence | None = None
    hardware: str = "1 × cpu"

    @property
    def blamed(self) -> int | None:
        """The step after which the first difference came: the last one before it from which training went on."""
        before = [step for step in self.resumes if self.line and step < self.line.step]
        return max(before, default=None)


def tell_tale(arrays: Sequence[str]) -> str | None:
    """The array that says most about the cause: random streams and counters before what merely follows from them."""

    def rank(name: str) -> tuple[int, str]:
        groups = ("rng", "step", "extra", "params", "opt", "ema")
        group = name.split(".")[0]
        counter = group == "opt" and name.endswith("count")
        return (1 if counter else groups.index(group) * 2 if group in groups else 99), name

    return min(arrays, key=rank, default=None)


def diagnose(facts: Facts) -> str:
    """The probable cause, in a sentence or two."""
    gpu = f"; {DETERMINISTIC}" if "cpu" not in facts.hardware.lower() else ""
    if facts.again is not None and not facts.again.identical:
        where = f", from step {facts.again.line.step} on" if facts.again.line else ""
        return (
            f"the computation does not repeat, also without a kill: a second uninterrupted run differs from the "
            f"first{where}. A non-deterministic operation, or randomness that no seed fixes{gpu}"
        )
    if not facts.arrays and not facts.progress and facts.line:
        return (
            f"the log alone: every array is equal, but the line of step {facts.line.step} ({facts.line.split}) "
            f"{facts.line.wrong}. The log is not cut back to the restored step, or its lines come late"
        )
    if facts.line and facts.resumes and facts.line.step <= min(facts.resumes):
        return (
            f"the computation does not always repeat: step {facts.line.step} differs, and no process went on from "
            f"an earlier one than {min(facts.resumes)}. Something depends on the process, the clock or the machine{gpu}"
        )
    causes = [cause for cause in (_randomness(facts), _data(facts), _counters(facts), _extra(facts)) if cause]
    return "; and ".join(causes) + _since(facts) if causes else _unexplained(facts)


def _randomness(facts: Facts) -> str | None:
    leaf = next((name for name in facts.arrays if name.split(".")[0] == "rng"), None)
    return f"the random streams are not restored as they were saved: {leaf} differs" if leaf else None


def _data(facts: Facts) -> str | None:
    if "data" in facts.progress:
        return "the data is not the same: its fingerprint differs"
    if "position" in facts.progress:
        return "the order of the data: its position is not restored as it was saved, so other batches came"
    return None


def _counters(facts: Facts) -> str | None:
    counters = [name for name in facts.arrays if name == "step" or (name.startswith("opt.") and name.endswith("count"))]
    if counters:
        return f"the optimizer's state is not restored as it was saved: {counters[0]} differs, which only counts steps"
    if facts.line and "lr" in facts.line.keys:
        return "the learning rate differs: its schedule counts something that is not in the checkpoint"
    return None


def _extra(facts: Facts) -> str | None:
    extra = [name for name in facts.arrays if name.split(".")[0] == "extra"]
    if extra and not any(name.split(".")[0] == "params" for name in facts.arrays):
        return f"a variable beside the parameters: {extra[0]} differs and no parameter does"
    return None


def _unexplained(facts: Facts) -> str:
    if not facts.arrays and not facts.line and "owes_evaluation" not in facts.progress:
        return f"only what is remembered beside the state: {', '.join(facts.progress) or 'the result in status.json'}"
    if facts.arrays and facts.line is None:
        return (
            f"{facts.arrays[0]} differs and no logged number does: what is not used in training was not restored, or "
            "the difference came after the last logged step (train.log_steps=1 would show when)"
        )
    if facts.blamed in facts.agree:
        return (
            f"the order of the data, most likely: checkpoint {facts.blamed} is the same in both runs, and so are the "
            "random streams and the position at the end, but not what was computed in between. Something at the start "
            f"of a process decides which batches come, or takes part in a step{_since(facts)}"
        )
    return (
        "random streams, position and counters agree, so the same batches came in the same order to the same step: "
        "the state was not restored bit for bit, or something outside of it takes part (a cache, a clock, "
        f"randomness that no seed fixes){_since(facts)}"
    )


def _since(facts: Facts) -> str:
    if facts.line is None:
        return ""
    after = (
        f", the first one logged after training went on from step {facts.blamed}" if facts.blamed is not None else ""
    )
    return f". The numbers differ from step {facts.line.step} on{after}"
