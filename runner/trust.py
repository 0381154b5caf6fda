"""Code that a run asks for: what was typed here, or stands in conf/, may run; what a run directory brings may not.

A directory can come from anybody, and its config.yaml may name a `target` to import. So whoever goes on with it, or
loads it, says that he trusts it, or types the same target himself. Nothing is imported here, and no jax.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.errors import RefusedError
from runner.rundir import shown

FLAG = "--trust"


def targets(document: Mapping[str, Any]) -> dict[str, str]:
    """The code of his own that a user names in a document: `{"model.target": "my_file:MyModel"}`."""
    return dict(_targets(document, ""))


def demand(run: Path, document: Mapping[str, Any], typed: Mapping[str, Any], way_out: str) -> None:
    """Raises RefusedError where the document of a run names code that `typed`, a document composed here, does not."""
    asked = [f"{key}={target}" for key, target in targets(document).items() if _at(typed, key) != target]
    if asked:
        raise RefusedError(f"{shown(run)} asks for code of its own: {', '.join(asked)}; if you trust it {way_out}")


def flag(document: Mapping[str, Any]) -> str:
    """What to type as well when a run of this document is named: the flag, where it needs one."""
    return f" {FLAG}" if targets(document) else ""


def _targets(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, Mapping):
        return
    if node.get("kind") == "external":
        yield f"{prefix}target", str(node.get("target"))
        return  # below are options, which are the target's
    for key, value in node.items():
        yield from _targets(value, f"{prefix}{key}.")


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
