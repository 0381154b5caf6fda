"""Run directories as a run leaves them, written without training: for tests of what only reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from runner.checkpoint.record import SIDECAR, Record, Sidecar, encode_sidecar

BEGAN = 1_790_000_000.0  # unix seconds
DOCUMENT: dict[str, Any] = {
    "model": {"kind": "mlp", "width": 128},
    "optim": {"kind": "adamw", "lr": 0.001},
    "remat": {"kind": "none"},
    "score": {"metric": "eval/loss", "mode": "min"},
    "retention": {
        "last": {"kind": "last", "n": 2},
        "best": {"kind": "best", "n": 1, "metric": "eval/loss", "mode": "min"},
    },
    "ckpt": {"save": {"periodic": {"kind": "steps", "steps": 100}}, "verify": "bytes"},
    "seed": 0,
}


def write(
    path: Path,
    document: Mapping[str, Any] | None = None,
    words: Sequence[str] = (),
    *,
    steps: int = 1000,
    killed_at: int | None = None,
    state: str = "finished",
    why: str = "",
    rate: float = 0.01,
    pace: float = 0.002,
    needs: Mapping[str, Any] | None = None,
    hardware: str = "1 × cpu",
) -> Path:
    """A run that saved each 100 steps and logged each 10; where it was killed, it went on from the save before.

    `pace`: seconds of a step. `needs`: what the last attempt wrote down of a step.
    """
    (path / "logs").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({**DOCUMENT, **(document or {})}, sort_keys=False))
    losses = {step: 0.05 + 2.0 * math.exp(-rate * step) + 0.02 * math.sin(step) for step in range(10, steps + 1, 10)}
    evaluated = {step: losses[step] * 1.1 for step in range(100, steps + 1, 100)}
    metrics, timing = [], []
    for step, loss in losses.items():
        metrics.append({"step": step, "split": "train", "loss": loss, "accuracy": 1.0 - loss / 3})
        timing.append({"step": step, "event": "train", "steps": 10, "seconds": 10 * pace})
        if step in evaluated:
            metrics.append({"step": step, "split": "eval", "loss": evaluated[step]})
            timing.append(
                {
                    "step": step,
                    "event": "save",
                    "stall": 0.01,
                    "durable": 0.1,
                    "bytes": 1000,
                    "reason": "every 100 steps",
                }
            )
    best = min(evaluated, key=lambda step: evaluated[step]) if evaluated else None
    for step in sorted({*sorted(evaluated)[-2:], *([best] if best else [])}):
        _checkpoint(path / "checkpoints" / str(step), step, evaluated[step])
    attempts = _attempts(steps, killed_at, state, why, words)
    attempts[-1] |= {"hardware": hardware} | ({} if needs is None else {"needs": dict(needs)})
    _write_lines(path / "logs" / "metrics.jsonl", metrics)
    _write_lines(path / "logs" / "timing.jsonl", timing)
    _write_lines(path / "attempts.jsonl", attempts)
    found = best and {"step": best, "metric": "eval/loss", "value": evaluated[best]}
    status = {"state": state, "why": why, "step": steps, "steps": 1000, "best": found, "attempt": attempts[-1]}
    (path / "status.json").write_text(
        json.dumps({**status, "score": best and evaluated[best], "updated": attempts[-1]["ended"]})
    )
    return path


def needs(remat: str, stored: int, recomputed: int, **more: Any) -> dict[str, Any]:
    """What a step needs that takes 1000 FLOPs beside what is recomputed, and 100 bytes beside what is stored."""
    compiled = {"arguments": 100, "outputs": 90, "donated": 90, "temporaries": 2 * stored, "host": 0, "peak": None}
    blocks = "unknown" if remat == "none" else "scan"
    found = {"remat": remat, "backend": "cpu", "devices": 1, "blocks": blocks, "held": 100, "stored": stored}
    return {**found, "flops": 1000 + recomputed, "recomputed": recomputed, "compiled": compiled, **more}


def _attempts(steps: int, killed_at: int | None, state: str, why: str, words: Sequence[str]) -> list[dict[str, Any]]:
    """One, or two with ten seconds between them."""
    command = ["python", "run.py", *words]
    if killed_at is None:
        return [_attempt(1, BEGAN, 0, steps, command, state, why)]
    first = _attempt(1, BEGAN, 0, killed_at, command, "killed", "")
    first |= {"during": "step", "lost_steps": killed_at % 100}
    return [first, _attempt(2, BEGAN + 30, killed_at - killed_at % 100, steps, command, state, why)]


def _attempt(
    number: int, began: float, start: int, end: int, command: Sequence[str], ending: str, why: str
) -> dict[str, Any]:
    seconds = {"import": 4.0, "compile": 3.0, "step": 10.0, "eval": 1.0, "save": 1.5, "finish": 0.5}
    facts = {
        "attempt": number,
        "started": _moment(began),
        "ended": _moment(began + 20),
        "from_step": start,
        "to_step": end,
    }
    return {
        **facts,
        "command": list(command),
        "host": "vm",
        "ending": ending,
        "why": why,
        "seconds": seconds,
        "drift": [],
    }


def _checkpoint(place: Path, step: int, loss: float) -> None:
    place.mkdir(parents=True)
    record = Record(step, "every 100 steps", {"eval/loss": loss}, BEGAN + step / 100)
    (place / SIDECAR).write_bytes(encode_sidecar(Sidecar(record, {"state/d": {"bytes": 1000}}, None)))


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
