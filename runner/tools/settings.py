"""What was chosen for a run, from its files as plain data. Nothing is validated as a whole, run or resolved: `ls` must
answer before a validator is even imported, and a run whose data has moved can be looked at all the same.

config.yaml is written once; an attempt that continues a run under a changed configuration records what it changed.
What is in force is the one with the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import yaml

from runner.checkpoint.record import Score
from runner.checkpoint.retention import Keep
from runner.errors import RefusedError
from runner.rundir import Run

KINDS: dict[str, Any] = {option.kind: option for option in get_args(Keep)}


@dataclass(frozen=True)
class Settings:
    """What looking and pruning need: which checkpoints stay, what best means, how a restart proves bytes."""

    keep: Mapping[str, Keep]
    score: Score
    verify: str


def settings_of(run: Run) -> Settings:
    """What was in force at the last attempt. Raises RefusedError where the run's files do not say."""
    return settings_in(document_of(run, run.read_status().get("attempt", {}).get("drift", ())), run)


def settings_in(document: Mapping[str, Any], run: Run) -> Settings:
    """The same, from what was read already."""
    try:
        keep = {name: _rule(option) for name, option in (document.get("retention") or {}).items()}
        score = Score(**document.get("score") or {})
        return Settings(keep, score, (document.get("ckpt") or {}).get("verify", "bytes"))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RefusedError(f"{run.config}: retention or score is not what this version writes ({error})") from None


def document_of(run: Run, drift: Sequence[str] = ()) -> dict[str, Any]:
    """config.yaml with what an attempt has changed. Raises RefusedError where it is missing or no configuration."""
    try:
        text = run.config.read_bytes()
        document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # data only, either way
    except (OSError, yaml.YAMLError) as error:
        problem = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RefusedError(f"{run.config}: cannot be read ({problem})") from None
    if not isinstance(document, dict):
        raise RefusedError(f"{run.config}: is no configuration")
    return changed(document, drift)


def changed(document: Mapping[str, Any], drift: Sequence[str]) -> dict[str, Any]:
    """A document with the changes that attempts.jsonl records as `retention.last.n: 2 → 1`."""
    result = json.loads(json.dumps(document))
    changes = [(key, json.loads(line.rpartition(" → ")[2])) for line in drift for key in [line.partition(": ")[0]]]
    for key, new in sorted(changes, key=lambda change: change[1] is not None):  # first what goes, then what comes
        *path, leaf = key.split(".")
        above = [result]
        for name in path:
            child = above[-1].get(name)
            above[-1][name] = child if isinstance(child, dict) else {}
            above.append(above[-1][name])
        if new is not None:
            above[-1][leaf] = new
            continue
        above[-1].pop(leaf, None)
        for name, node in zip(reversed(path), reversed(above[:-1]), strict=True):
            if not node[name]:
                del node[name]  # a rule of which nothing is left is gone
    return result


def _rule(option: Mapping[str, Any]) -> Keep:
    rule = KINDS[option["kind"]](**option)
    for field in fields(rule):
        value = getattr(rule, field.name)
        if isinstance(field.default, int | float) and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{field.name}={value}")
    return rule
