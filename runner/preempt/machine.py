"""Where this process runs, as firmware and environment say: a few small files, and no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """What is known about a machine without asking anybody: its firmware's names (DMI) and the environment."""

    dmi: Path
    environment: Mapping[str, str]

    def read_firmware(self, name: str) -> str:
        """Return a value of the firmware, such as `sys_vendor` or `product_name`; empty where there is none."""
        try:
            return (self.dmi / name).read_text(errors="replace").strip()
        except OSError:
            return ""
