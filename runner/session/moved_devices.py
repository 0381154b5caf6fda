"""Tell a person where a run goes on on something that computes other bits: other devices, or another compiler."""

from __future__ import annotations

from collections.abc import Sequence

from runner.types import JsonObject


def describe_move(attempts: Sequence[JsonObject], hardware: str, jaxlib: str, *, in_parts: bool) -> str:
    """Return a line where training goes on on other devices, or with another XLA, than before; else nothing.

    Sums are then taken in another order, so what is promised bit for bit is the same to rounding alone. With
    `train.parts` more or fewer devices of one kind change nothing.

    Args:
        attempts: the lines of the attempts before, oldest first; one that ended before it trained has no `from_step`.
        hardware: the devices of this attempt, as `4 × cpu (fsdp 4)`.
        jaxlib: the version of the package that brings XLA.
        in_parts: whether the bits do not depend on the number of devices.
    """
    last = next((each for each in reversed(attempts) if "from_step" in each and each.get("hardware")), None)
    if last is None:
        return ""
    before, earlier = str(last["hardware"]), last.get("packages", {}).get("jaxlib", jaxlib)
    changes = []
    if before != hardware and not (in_parts and _find_kind(before) == _find_kind(hardware)):
        changes.append(f"on {hardware}, and on {before} before")
    if earlier != jaxlib:
        changes.append(f"with jaxlib {jaxlib}, and {earlier} before")
    return f"{'; '.join(changes)}: from here on it is the same to rounding, not bit for bit" if changes else ""


def _find_kind(hardware: str) -> str:
    """Return the kind of devices: `cpu` of `4 × cpu (fsdp 4)`."""
    return hardware.partition(" × ")[2].partition(" (")[0]
