"""Resolve `remat=auto` for one run: as the run chose before, as another run chose, or by a search now.

What a run chose is kept in its directory (remat.json), so that it goes on bit for bit when the cache is gone; and
beside the compiled programs, for other runs of the same shape. Both files are only read as data, and checked: one that
is torn, or of another budget, device or model, counts as none.
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
from typing import Annotated

from runner import files, hosts
from runner.config import code_origins
from runner.config.identity import hash_identity, replace_places
from runner.config.remat_policies import AutoRemat, Offload, RematPolicy, format_policy
from runner.config.schema import BY_KIND, Config, validate_options
from runner.errors import ConfigError
from runner.remat.auto_search import Menu, MenuRow, build_menu, choose_row, find_budget, find_fastest, format_menu
from runner.remat.candidates import measure_memory, trace_candidate
from runner.remat.remat_survey import suggest_changes
from runner.rundir.layout import RunDir
from runner.rundir.provenance import hash_code
from runner.text import format_size, mask_unprintable, shorten
from runner.train.built import Built, describe_hardware
from runner.train.compile_cache import cache_folder
from runner.train.moved_data import read_places
from runner.types import JsonObject
from runner.values import Say

# A choice is a few hundred bytes, and its words are a line.
MAX_FILE_BYTES, MAX_WORDS = 1 << 20, 300
NO_PLACES: Mapping[str, str] = {}
# A choice depends on how these trace and compile.
VERSIONED_PACKAGES = ("jax", "jaxlib", "flax")


@dataclass(frozen=True, kw_only=True)
class RematChoice:
    """A policy that was chosen. Its fields are those of remat.json.

    Attributes:
        option: The policy.
        words: The policy and what it costs, for a person.
        circumstances: What the choice depended on.
    """

    option: Annotated[RematPolicy, BY_KIND]
    words: str
    circumstances: Mapping[str, str | int]


def resolve_auto(config: Config, built: Built, own_file: Path, say: Say, show_life: Callable[[], None]) -> RematChoice:
    """Return the policy of a run whose configuration says auto, and keep it in the file `own_file` of the run.

    It takes seconds to minutes where it was not chosen before; `show_life` is called before each compilation. Raises
    ConfigError where nothing fits.
    """
    policy = config.remat
    assert isinstance(policy, AutoRemat)
    budget = find_budget(policy, built.mesh.devices.flat[0])
    run = RunDir(own_file.parent)
    # Data that has moved since the beginning is the same data, and needs no other policy.
    places = read_places(run) if run.config.exists() else {}
    circumstances = _describe_circumstances(config, built, budget, places)
    cache_file = _find_cache_file(config, circumstances)
    found, trouble = _read_choice(own_file, config, circumstances)
    where = "as before"
    if trouble is not None:
        # Whether the next choice comes from the cache or from a search: it may be another one.
        say(f"remat=auto: chosen anew, because {trouble}; rounding may differ from here on")
    if found is None and cache_file is not None:
        found, where = _read_choice(cache_file, config, circumstances)[0], "as chosen for these shapes before"
    if found is None:
        chosen, words = _search_now(config, built, budget, say, show_life)
        found = RematChoice(option=chosen, words=words, circumstances=circumstances)
    else:
        say(f"remat=auto: {mask_unprintable(shorten(found.words, MAX_WORDS))}, {where}")
    document = json.dumps(dump_choice(found), indent=1) + "\n"
    files.replace_file(own_file, document)
    # The cache only saves time: where it cannot be written, the next run searches again.
    if cache_file is not None:
        with suppress(OSError):
            files.make_folder(cache_file.parent)
            files.replace_file(cache_file, document, durable=False)
    return found


def dump_choice(choice: RematChoice) -> JsonObject:
    """Return a choice as plain JSON."""
    return asdict(choice)


def parse_choice(document: JsonObject) -> RematChoice:
    """Return the choice that `dump_choice` gave. Raises ConfigError where it is none."""
    choice: RematChoice = validate_options(RematChoice, document)
    return choice


def _search_now(
    config: Config, built: Built, budget: int, say: Say, show_life: Callable[[], None]
) -> tuple[RematPolicy, str]:
    """Return the policy that a search chooses, and in words what it costs. Raises ConfigError where nothing fits."""
    say(f"remat=auto: looking for the least recomputation within {format_size(budget)} on {describe_hardware(built)} …")
    menu = build_menu(config, built.sources)

    def num_bytes(row: MenuRow) -> int:
        show_life()
        return menu.num_bytes(row)

    def choose_fastest(rows: Sequence[MenuRow]) -> MenuRow:
        return find_fastest(config, built.sources, rows, say)

    # Not on a CPU: its step times depend on who else uses the cores, and so would the choice. Nor where the devices of
    # other processes would have to take part in each step.
    is_counted = built.mesh.devices.flat[0].platform == "cpu" or not hosts.is_alone()
    taken = choose_row(replace(menu, num_bytes=num_bytes), budget, None if is_counted else choose_fastest)
    if taken is None:
        raise ConfigError(_explain_nothing_fits(config, built, menu, budget))
    for line in format_menu(menu, budget, taken):
        say(f"  {line}")
    counted, more = " by count" if menu.is_counted else "", 100 * (taken.flops / menu.flops - 1)
    words = f"{taken.name}, {format_size(menu.num_bytes(taken))} of {format_size(budget)}{counted}, +{more:.1f}% FLOPs"
    say(f"remat=auto: {words}")
    return taken.policy, words


def _explain_nothing_fits(config: Config, built: Built, menu: Menu, budget: int) -> str:
    """Return an error that says how much is needed at least, and what else takes less, each with its number."""
    # The smallest of those that were compiled; counted bytes only serve where none was.
    least = min(menu.rows, key=lambda row: (row.policy not in menu.known, menu.known.get(row.policy, row.counted)))
    needed, ways = menu.num_bytes(least), []
    for key, other in suggest_changes(config):
        # Not every change is one that this model and batch can have.
        with suppress(ConfigError, ValueError):
            traced = trace_candidate(other, least.policy, built.sources)
            less = traced.counted if menu.is_counted else measure_memory(traced).footprint
            if less < needed:
                ways.append(f"{key} ({format_size(less)})")
    return (
        f"remat=auto: nothing fits into {format_size(budget)}: the least is remat={format_policy(least.policy)} with "
        f"{format_size(needed)}; raise remat.budget_bytes, or take a smaller model or batch"
        + (f"; what takes less beside it: {', '.join(ways)}" if ways else "")
    )


def _describe_circumstances(
    config: Config, built: Built, budget: int, places: Mapping[str, str] = NO_PLACES
) -> dict[str, str | int]:
    """Return what the memory of a step, and so the choice, depends on; the seed and the number of steps are not.

    `places`: where the data of the run lay at its beginning.
    """
    document = replace_places(config.document, places) if places else config.document
    policy, sources = config.remat, built.sources
    assert isinstance(policy, AutoRemat)
    return {
        "model": hash_identity({**document, "seed": 0}),
        "own": ",".join(origin.hash for origin in code_origins.find_origins(config.document)),
        "shapes": f"{sources.inputs} → {sources.num_outputs}",
        "microbatches": config.train.num_splits,
        "precision": config.train.precision,
        "loss_chunks": getattr(config.model, "loss_chunks", 1),
        "attention": getattr(config.model, "attention", "xla"),
        "block": policy.block or "",
        # A fraction of what differs by some bytes from start to start stays the same fraction.
        "budget": policy.budget or f"{policy.fraction:g} of {round(budget / policy.fraction / 2**30)} GiB",
        "device": describe_hardware(built),
    }


def _find_cache_file(config: Config, circumstances: Mapping[str, str | int]) -> Path | None:
    """Return where this choice is kept for other runs: with another jax, or other code of ours, another file."""
    folder = cache_folder(config.compile_cache)
    if folder is None:
        return None
    versions = [importlib.metadata.version(package) for package in VERSIONED_PACKAGES]
    facts = json.dumps(
        [[*versions, hash_code(), os.environ.get("XLA_FLAGS", "")], circumstances],
        sort_keys=True,
    )
    return folder / "remat" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _read_choice(
    path: Path, config: Config, circumstances: Mapping[str, str | int]
) -> tuple[RematChoice | None, str | None]:
    """Return the choice in a file where it is for these circumstances, else why it cannot be used.

    Both are None where there is no file.
    """
    try:
        document = files.parse_json(files.read_file(path, limit=MAX_FILE_BYTES))
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        return None, f"{path.name} cannot be read ({getattr(error, 'strerror', None) or 'it is no JSON'})"
    try:
        found: RematChoice = validate_options(RematChoice, document)
    # Whatever it is, it was not written here, or not as a whole.
    except (ConfigError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None, f"{path.name} is not what a run writes"
    if changed := [key for key, value in circumstances.items() if found.circumstances.get(key) != value]:
        return None, f"of another {' and '.join(changed)}"
    try:
        replace(config, remat=found.option)
    # Of a model without those scopes and tags.
    except (ConfigError, ValueError):
        return None, f"{path.name} names a policy that this model does not have"
    if found.circumstances != circumstances or isinstance(found.option, AutoRemat | Offload):
        return None, f"{path.name} is not what a run writes"
    return found, None
