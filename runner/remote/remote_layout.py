"""Which objects a run has in a bucket: the names of its directory, so that it can be read there by any tool. No jax.

config.yaml, status.json, logs/metrics.jsonl …   the files of the run, as they are on its disk
logs/metrics.jsonl.part000001 …                  what a log has beyond its first mebibyte, one object for each further
checkpoints/STEP/…                               a checkpoint; its holdfast.json, the seal, comes up last
checkpoints/newest, checkpoints/best             small JSON objects that name a step
base/DIGEST/…                                    what does not train; its seal comes up last
quarantine/STEP-TIME/…                           checkpoints that were set aside
LOCK                                             who has the run
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from runner.checkpoint.frozen_base import BASE
from runner.checkpoint.record import SIDECAR, is_step_name

CHECKPOINTS, QUARANTINE = "checkpoints", "quarantine"
NEWEST, BEST = f"{CHECKPOINTS}/newest", f"{CHECKPOINTS}/best"
# A log goes up in pieces of this size, of which only the last one changes: what is sent again is bounded.
SEGMENT_BYTES = 1 << 20
SEGMENT_NAME = re.compile(r"(.+)\.part([0-9]{6,})")


@dataclass(frozen=True)
class Listing:
    """Hold what a run has in a bucket.

    Attributes:
        files: the size of each file of the run, by its name.
        checkpoints: of each step the size of each file, by its name within the checkpoint.
        has_newest: whether a step was ever whole here.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    checkpoints: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    has_newest: bool = False

    @property
    def sealed_steps(self) -> list[int]:
        """Return the steps that are whole, as far as names say it, oldest first."""
        return sorted(step for step, names in self.checkpoints.items() if SIDECAR in names)


def sort_listing(sizes: Mapping[str, int], lock: str) -> Listing:
    """Return the objects of a run, sorted. `lock` is the name of what holds it, which is none of the run's files."""
    own: dict[str, int] = {}
    checkpoints: dict[int, dict[str, int]] = {}
    for key, size in sizes.items():
        first, _, rest = key.partition("/")
        step, _, name = rest.partition("/")
        if first == CHECKPOINTS:
            if name and is_step_name(step):
                checkpoints.setdefault(int(step), {})[name] = size
        elif first not in (QUARANTINE, BASE) and not first.startswith(lock) and not first.startswith("."):
            own[key] = size
    return Listing(own, checkpoints, has_newest=NEWEST in sizes)


def name_checkpoint_file(step: int, name: str) -> str:
    """Return the key of a file of a checkpoint."""
    return f"{CHECKPOINTS}/{step}/{name}"


def name_segment(name: str, index: int) -> str:
    """Return the key of a piece of a file: the first one has the name of the file."""
    return name if index == 0 else f"{name}.part{index:06}"


def group_segments(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return of each file the keys of its pieces, in order, as far as they follow on each other.

    A piece after one that is not full is left over from when the file was longer.
    """
    grouped: dict[str, list[str]] = {}
    for name in sizes:
        match = SEGMENT_NAME.fullmatch(name)
        if match is None or match[1] not in sizes:
            grouped[name] = [name]
    for name, keys in grouped.items():
        while sizes[keys[-1]] == SEGMENT_BYTES and (following := name_segment(name, len(keys))) in sizes:
            keys.append(following)
    return grouped
