"""Where this process runs, from what firmware and environment say: a few small files, and no network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

AZURE_CHASSIS = "7783-7084-3265-9085-8269-3286-77"  # of every machine there; the vendor alone may be a Hyper-V at home


def found(dmi: Path, environment: Mapping[str, str]) -> list[str]:
    """The kinds of notices that apply here: gce, aws, azure, slurm."""
    says = {name: _read(dmi / name) for name in ("sys_vendor", "product_name", "bios_version", "chassis_asset_tag")}
    applies = {
        "gce": says["product_name"] == "Google Compute Engine",
        "aws": says["sys_vendor"] == "Amazon EC2" or "amazon" in says["bios_version"],  # the second: older machines
        "azure": says["chassis_asset_tag"] == AZURE_CHASSIS,
        "slurm": bool(environment.get("SLURM_JOB_ID")),
    }
    return [kind for kind, here in applies.items() if here]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def here(dmi: str) -> list[str]:
    """The kinds of notices that apply to this process."""
    return found(Path(dmi), os.environ)
