"""Reason about why an interrupted run is not the uninterrupted one: pure functions over what differs.

Everything that is trained differs after any mistake, so differing parameters say nothing by themselves. What tells is
what only one mistake explains: a random stream, a counter, the position of the data, the log alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.drill.compare_runs import LineDifference, RunComparison

DETERMINISTIC = "on a GPU, XLA_FLAGS=--xla_gpu_deterministic_ops=true makes XLA choose operations that repeat"

# The parts of a train state, the most telling first: what is not trained differs for a reason of its own.
STATE_PARTS = ("rng", "step", "extra", "rest", "params", "weights", "opt", "ema")


@dataclass(frozen=True)
class DifferenceFacts:
    """What is known about a difference.

    Attributes:
        arrays: the names of the arrays that differ.
        progress: the keys of a checkpoint's progress that differ.
        line: the first line of the log that differs.
        resumes: the steps from which training went on after a kill.
        agree: the steps whose checkpoints both runs kept, with all arrays equal.
        again: how a second uninterrupted run compares with the first.
        hardware: what it ran on, as the run's record says it.
    """

    arrays: Sequence[str]
    progress: Sequence[str]
    line: LineDifference | None
    resumes: Sequence[int]
    agree: Sequence[int] = ()
    again: RunComparison | None = None
    hardware: str = "1 × cpu"

    @property
    def blamed(self) -> int | None:
        """The last step before the first difference from which training went on; None where there is none."""
        before = [step for step in self.resumes if self.line and step < self.line.step]
        return max(before, default=None)


def most_telling_array(arrays: Sequence[str]) -> str | None:
    """Return the array that says most about the cause: random streams and counters before what follows from them."""

    def rank(name: str) -> tuple[int, str]:
        part = name.split(".")[0]
        # Counters of the optimizer rank just behind the random streams, before the step.
        if _is_step_counter(name) and part == "opt":
            return 1, name
        return STATE_PARTS.index(part) * 2 if part in STATE_PARTS else 99, name

    return min(arrays, key=rank, default=None)


def explain_difference(facts: DifferenceFacts) -> str:
    """Return the probable cause, in a sentence or two."""
    gpu = f"; {DETERMINISTIC}" if "cpu" not in facts.hardware.lower() else ""
    # Where two uninterrupted runs differ, a kill has nothing to do with it, and nothing else can be concluded.
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
    # The first process of both runs did the same up to the first kill. What differs before it is not of a restart.
    if facts.line and facts.resumes and facts.line.step <= min(facts.resumes):
        return (
            f"the computation does not always repeat: step {facts.line.step} differs, and no process went on from "
            f"an earlier one than {min(facts.resumes)}. Something depends on the process, the clock or the machine{gpu}"
        )
    suspects = (_suspect_randomness(facts), _suspect_data(facts), _suspect_counters(facts), _suspect_extra(facts))
    causes = [cause for cause in suspects if cause]
    return "; and ".join(causes) + _since_when(facts) if causes else _explain_by_elimination(facts)


def explain_drift(devices: Sequence[int], drift: float) -> str:
    """Return why a run differs that had another number of devices after each kill, and by how much."""
    counts = ", ".join(map(str, devices))
    return (
        f"the number of devices changed ({counts}), and without train.parts sums are rounded differently on each: at "
        f"the end the weights differ by {drift:.2g} (relative norm). train.parts=N keeps the bits"
    )


def _suspect_randomness(facts: DifferenceFacts) -> str | None:
    leaf = next((name for name in facts.arrays if name.split(".")[0] == "rng"), None)
    return f"the random streams are not restored as they were saved: {leaf} differs" if leaf else None


def _suspect_data(facts: DifferenceFacts) -> str | None:
    if "data" in facts.progress:
        return "the data is not the same: its fingerprint differs"
    if "position" in facts.progress:
        return "the order of the data: its position is not restored as it was saved, so other batches came"
    return None


def _suspect_counters(facts: DifferenceFacts) -> str | None:
    counters = [name for name in facts.arrays if _is_step_counter(name)]
    if counters:
        return f"the optimizer's state is not restored as it was saved: {counters[0]} differs, which only counts steps"
    if facts.line and "lr" in facts.line.keys:
        return "the learning rate differs: its schedule counts something that is not in the checkpoint"
    return None


def _suspect_extra(facts: DifferenceFacts) -> str | None:
    """Return what variables beside the parameters (batch statistics, say) tell, where no parameter differs."""
    extra = [name for name in facts.arrays if name.split(".")[0] == "extra"]
    if extra and not any(name.split(".")[0] == "params" for name in facts.arrays):
        return f"a variable beside the parameters: {extra[0]} differs and no parameter does"
    return None


def _explain_by_elimination(facts: DifferenceFacts) -> str:
    """Return what is left where nothing that differs is telling."""
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
            f"of a process decides which batches come, or takes part in a step{_since_when(facts)}"
        )
    return (
        "random streams, position and counters agree, so the same batches came in the same order to the same step: "
        "the state was not restored bit for bit, or something outside of it takes part (a cache, a clock, "
        f"randomness that no seed fixes){_since_when(facts)}"
    )


def _since_when(facts: DifferenceFacts) -> str:
    if facts.line is None:
        return ""
    blamed = facts.blamed
    after = f", the first one logged after training went on from step {blamed}" if blamed is not None else ""
    return f". The numbers differ from step {facts.line.step} on{after}"


def _is_step_counter(name: str) -> bool:
    """Return whether an array does nothing but count steps: the state's own counter, or one of the optimizer's."""
    return name == "step" or (name.startswith(("opt.", "rest.")) and name.endswith("count"))
