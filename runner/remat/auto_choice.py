"""What `remat=auto` stands for in this run: as it chose before, as it was chosen elsewhere, or chosen now.

What a run chose is kept in its directory (remat.json), so that it goes on bit for bit when the cache is gone; and
beside the compiled programs, for other runs of the same shape. Both are only read as data, and checked: a file that is
torn, or of another budget, device or model, counts as none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from runner import files
from runner.config import user_code
from runner.config.identity import hash_identity
from runner.config.remat_policies import AutoRemat, Offload, RematPolicy, format_policy
from runner.config.schema import BY_KIND, Config, validate_options
from runner.errors import ConfigError
from runner.remat.auto_search import Menu, MenuRow, budget_bytes, build_menu, choose_row, find_fastest, format_menu
from runner.remat.candidates import read_memory, trace_candidate
from runner.remat.remat_survey import suggest_changes
from runner.rundir.provenance import hash_code
from runner.text import format_size
from runner.train.built import describe_hardware
from runner.train.compile_cache import place

if TYPE_CHECKING:
    from runner.train.built import Built

Say = Callable[[str], None]
VERSIONS = ("jax", "jaxlib", "flax")


@dataclass(frozen=True, kw_only=True)
class RematChoice:
    """An option, in words what it costs, and the circumstances it was chosen in."""

    option: Annotated[RematPolicy, BY_KIND]
    words: str
    circumstances: Mapping[str, str | int]


def resolve_auto(config: Config, built: Built, run: Path, say: Say, alive: Callable[[], None]) -> RematChoice:
    """What to recompute in a run whose configuration says auto; `run` is the file in which it is kept.

    Raises ConfigError where nothing fits. Takes seconds to minutes where it was not chosen before: `alive` is called
    before each compilation.
    """
    option = config.remat
    assert isinstance(option, AutoRemat)
    budget = budget_bytes(option, built.mesh.devices.flat[0])
    circumstances = _circumstances(config, built, budget)
    cache = _cached(config, circumstances)
    for path, where in ((run, "as before"), (cache, "as chosen for these shapes before")):
        if path is not None and (found := _read(path, config, circumstances)):
            say(f"remat=auto: {found.words}, {where}")
            break
    else:
        if changed := _changed(run, circumstances):
            say(
                f"remat=auto: chosen anew, because of another {' and '.join(changed)}; rounding may differ from here on"
            )
        taken, words = _chosen_now(config, built, budget, say, alive)
        found = RematChoice(option=taken, words=words, circumstances=circumstances)
    document = json.dumps(asdict(found), indent=1) + "\n"
    files.replace_file(run, document)
    if cache is not None:
        with suppress(OSError):  # it only saves time
            files.replace_file(cache, document, durable=False)
    return found


def _chosen_now(
    config: Config, built: Built, budget: int, say: Say, alive: Callable[[], None]
) -> tuple[RematPolicy, str]:
    """The option, and in words what it costs."""
    say(f"remat=auto: looking for the least recomputation within {format_size(budget)} on {describe_hardware(built)} …")
    found = build_menu(config, built.sources)

    def num_bytes(row: MenuRow) -> int:
        alive()
        return found.num_bytes(row)

    def first(rows: Sequence[MenuRow]) -> MenuRow:
        return find_fastest(config, built.sources, rows, say)

    is_cpu = built.mesh.devices.flat[0].platform == "cpu"
    taken = choose_row(replace(found, num_bytes=num_bytes), budget, None if is_cpu else first)
    if taken is None:
        raise ConfigError(_nothing_fits(config, built, found, budget))
    for line in format_menu(found, budget, taken):
        say(f"  {line}")
    counted, more = " by count" if found.is_counted else "", 100 * (taken.flops / found.flops - 1)
    words = f"{taken.name}, {format_size(found.num_bytes(taken))} of {format_size(budget)}{counted}, +{more:.1f}% FLOPs"
    say(f"remat=auto: {words}")
    return taken.option, words


def _nothing_fits(config: Config, built: Built, found: Menu, budget: int) -> str:
    """How much is needed at least, and what else takes less, each with its number."""
    least = min(found.rows, key=lambda row: (row.option not in found.known, found.known.get(row.option, row.counted)))
    needed, ways = found.num_bytes(least), []
    for key, other in suggest_changes(config):
        with suppress(ConfigError, ValueError):  # not for this model
            traced = trace_candidate(other, least.option, built.sources)
            if (less := traced.counted if found.is_counted else read_memory(traced).footprint) < needed:
                ways.append(f"{key} ({format_size(less)})")
    return (
        f"remat=auto: nothing fits into {format_size(budget)}: the least is remat={format_policy(least.option)} with "
        f"{format_size(needed)}; raise remat.budget_bytes, or take a smaller model or batch"
        + (f"; what takes less beside it: {', '.join(ways)}" if ways else "")
    )


def _circumstances(config: Config, built: Built, budget: int) -> dict[str, str | int]:
    """What the memory of a step depends on, and so the choice: the seed and the number of steps are not in it."""
    option, sources = config.remat, built.sources
    assert isinstance(option, AutoRemat)
    return {
        "model": hash_identity({**config.document, "seed": 0}),
        "own": ",".join(origin.hash for origin in user_code.find_origins(config.document)),
        "shapes": f"{sources.inputs} → {sources.num_outputs}",
        "microbatches": config.train.microbatches,
        "precision": config.train.precision,
        "loss_chunks": getattr(config.model, "loss_chunks", 1),
        "attention": getattr(config.model, "attention", "xla"),
        "block": option.block or "",
        # A fraction of what differs by some bytes from start to start stays the same fraction.
        "budget": option.budget or f"{option.fraction:g} of {round(budget / option.fraction / 2**30)} GiB",
        "device": describe_hardware(built),
    }


def _cached(config: Config, circumstances: Mapping[str, str | int]) -> Path | None:
    """Where this choice is kept for other runs: with another jax, or other code of ours, another file."""
    folder = place(config.compile_cache)
    if folder is None:
        return None
    versions = [*map(importlib.metadata.version, VERSIONS), hash_code(), os.environ.get("XLA_FLAGS", "")]
    facts = json.dumps([versions, circumstances], sort_keys=True)
    return folder / "remat" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _read(path: Path, config: Config, circumstances: Mapping[str, str | int]) -> RematChoice | None:
    """What is written there, where it is whole and for these circumstances."""
    with suppress(OSError, ValueError, TypeError, ConfigError):  # torn, or no such file
        found: RematChoice = validate_options(RematChoice, json.loads(path.read_bytes()))
        replace(config, remat=found.option)  # it has those scopes and tags
        if found.circumstances == circumstances and not isinstance(found.option, AutoRemat | Offload):
            return found
    return None


def _changed(path: Path, circumstances: Mapping[str, str | int]) -> list[str]:
    """In what circumstances a choice was made that cannot be used any more."""
    with suppress(OSError, ValueError, TypeError, ConfigError):
        found: RematChoice = validate_options(RematChoice, json.loads(path.read_bytes()))
        return [key for key, value in circumstances.items() if found.circumstances.get(key) != value]
    return []
