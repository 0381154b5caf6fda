"""`remat=auto`: of everything that could be recomputed, the least that fits into a budget.

Candidates are the sets of tags that are worth something, found by tracing one block of each kind, and every policy of
the menu that the model offers. They are tried in ascending order of what they recompute, and the first that fits is
taken: so none of the menu that fits recomputes less. Where the bytes of the blocks alone are above the budget there is
no need to compile; that is certain only on a CPU, whose compiler keeps what a scan stores.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import inf
from statistics import median
from typing import Any

import jax

from data.sources import Sources
from models.remat_plan import RematPlan
from runner.config import remat_policies
from runner.config.remat_policies import AutoRemat, Names, RematPolicy, format_policy
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.remat.block_costs import BlockKinds, RematCost, find_block_kinds, measure_loss
from runner.remat.candidates import Candidate, compile_candidate, read_memory, trace_candidate
from runner.remat.remat_survey import NO_ROOM, time_steps
from runner.text import format_size
from runner.text import format_table as lines

MOST_TAGS = 8  # all their sets are traced, 30 ms each; of more tags, those that a greedy choice meets
NO_SUCH_DEVICE = sys.maxsize  # bytes
FINALISTS, ROUNDS = 3, 10  # so many are timed, so often, where that means something


@dataclass(frozen=True)
class MenuRow:
    """A candidate. `least`: bytes that it needs at any rate, 0 where nobody knows."""

    option: RematPolicy
    counted: int
    least: int
    flops: int

    @property
    def name(self) -> str:
        """As a person calls it."""
        return format_policy(self.option)


@dataclass(frozen=True)
class Menu:
    """Candidates, the least recomputation first, with the bytes that one device needs for each, once it is asked."""

    rows: Sequence[MenuRow]
    num_bytes: Callable[[MenuRow], int]
    known: dict[RematPolicy, int]  # what was asked already
    is_counted: bool  # num_bytes is counted: the compiler cannot be believed here

    @property
    def flops(self) -> int:
        """Where nothing is recomputed."""
        return self.rows[0].flops


def build_menu(config: Config, sources: Sources) -> Menu:
    """What there is to choose from for a configuration whose `remat` is auto. Raises ConfigError where that is nothing.

    The model is traced once for all policies and tags of blocks, and once for each other policy.
    """
    base = trace_candidate(config, config.remat, sources)
    device, inside = base.built.mesh.devices.flat[0], find_block_kinds(base, config)
    is_cpu = device.platform == "cpu"
    outside = base.num_bytes - inside.cost(base.option.plan).num_bytes // base.built.mesh.size
    is_sure = is_cpu and not base.is_loop

    def row(option: RematPolicy, more: RematCost) -> MenuRow:
        counted = base.counted + more.num_bytes // base.built.mesh.size
        return MenuRow(option, counted, counted - outside if is_sure else 0, base.flops + more.flops)

    fixed = [row(option, more) for option, more in _fixed(config, sources, inside)]
    sets = [row(option, more) for option, more in _sets(config, inside)]
    rows = sorted([*fixed, *_frontier(sets, fixed)], key=lambda row: (row.flops, row.counted))
    known: dict[RematPolicy, int] = {}

    def num_bytes(row: MenuRow) -> int:
        if row.option not in known:
            is_blind = is_cpu and base.is_loop
            known[row.option] = row.counted if is_blind else _compiled(trace_candidate(config, row.option, sources))
        return known[row.option]

    return Menu(rows, num_bytes, known, is_counted=is_cpu and base.is_loop)


def _compiled(traced: Candidate) -> int:
    """What the compiler says, which may be that it finds no room at all."""
    try:
        return read_memory(traced).footprint
    except jax.errors.JaxRuntimeError as error:
        if NO_ROOM not in str(error):
            raise
        return NO_SUCH_DEVICE


def iterate_fitting(menu: Menu, budget: int) -> Iterator[MenuRow]:
    """What fits, the least recomputation first.

    Where no row can be ruled out beforehand, sets of tags are tried only from where they begin to fit.
    """
    hopeless: Sequence[MenuRow] = ()
    is_searched = build_menu.is_counted or any(row.least for row in build_menu.rows)
    for row in build_menu.rows:
        if row.least > budget or row in hopeless:
            continue
        if build_menu.num_bytes(row) <= budget:
            yield row
        elif not is_searched:
            sets, is_searched = [row for row in build_menu.rows if isinstance(row.option, Names)], True
            hopeless = sets[: bisect_left(sets, x=True, key=lambda row: build_menu.num_bytes(row) <= budget)]


def choose_row(
    menu: Menu, budget: int, fastest: Callable[[Sequence[MenuRow]], MenuRow] | None = None
) -> MenuRow | None:
    """The least recomputation that fits, or None; with `fastest`, whichever it says of the first few."""
    finalists = list(islice(iterate_fitting(build_menu, budget), FINALISTS if find_fastest else 1))
    return find_fastest(finalists) if find_fastest and len(finalists) > 1 else next(iter(finalists), None)


def find_fastest(config: Config, sources: Sources, rows: Sequence[MenuRow], tell: Callable[[str], None]) -> MenuRow:
    """The one whose steps take least time: FLOPs do not tell what it costs to read and write what is stored."""
    traced = [trace_candidate(config, row.option, sources) for row in rows]
    programs = {
        row.name: each.built.train_step.with_lr(compile_candidate(each)[1])
        for row, each in zip(rows, traced, strict=True)
    }
    with closing(traced[0].built.stream):
        seconds = time_steps(traced[0], programs, ROUNDS, tell)
    medians = {name: median(found) for name, found in seconds.items()}
    tell("  a step takes " + ", ".join(f"{1000 * found:.3g} ms with {name}" for name, found in medians.items()))
    return min(rows, key=lambda row: medians.get(row.name, inf))


def budget_bytes(option: AutoRemat, device: Any) -> int:
    """In bytes, on one device. Raises ConfigError where the device does not tell how much memory it has."""
    if option.budget:
        return option.budget
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        raise ConfigError(
            f"remat=auto: a {device.platform} does not tell how much memory there is, so remat.fraction="
            f"{option.fraction:g} means nothing; say remat.budget_bytes=8GB"
        )
    return int(option.fraction * limit)


def format_menu(menu: Menu, budget: int, taken: MenuRow) -> list[str]:
    """What was chosen from: everything that recomputes less, what was chosen, and how many more there were."""
    last = max(
        place
        for place, row in enumerate(build_menu.rows)
        if row == taken or build_menu.known.get(row.option, inf) <= budget
    )
    rows = []
    for row in build_menu.rows[: last + 1]:
        found = build_menu.known.get(row.option)
        verdict = "too large" if max(row.least, found or 0) > budget else "not tried" if found is None else "fits"
        share = f"+{100 * (row.flops / build_menu.flops - 1):.1f}%"
        needs = "" if found is None else "no room" if found == NO_SUCH_DEVICE else format_size(found)
        rows.append((row.name, share, format_size(row.counted), needs, "chosen" if row == taken else verdict))
    left = len(build_menu.rows) - len(rows)
    head = ("recomputed", "FLOPs", "counted", "" if build_menu.is_counted else "compiled", "")
    return [*lines(head, rows, right=head[1:4]), *([f"({left} others recompute more)"] if left else [])]


def _fixed(config: Config, sources: Sources, inside: BlockKinds) -> Iterator[tuple[RematPolicy, RematCost]]:
    """The policies of the menu that this model offers, and what each costs more than `full`, on a whole batch."""
    block, count, parts = config.remat.block, sum(times for _, times in inside.kinds), config.train.microbatches
    full = inside.cost(remat_policies.Full().plan)
    of_blocks: tuple[RematPolicy, ...] = (
        remat_policies.Full(block=block),
        remat_policies.Dots(block=block),
        remat_policies.DotsNoBatch(block=block),
    )
    for option in of_blocks:
        yield option, _batch(inside.cost(option.plan) - full, parts)
    base = measure_loss(config, remat_policies.Full(block=block), sources)
    every = [remat_policies.EveryN(n=n, block=block) for n in (2, 3) if n <= count]
    others: tuple[RematPolicy, ...] = (
        remat_policies.NoRemat(),
        remat_policies.AttentionCore(),
        remat_policies.AttentionOnly(),
        remat_policies.FfnOnly(),
        *every,
    )
    for option in others:
        offers = config.model.kind == "external" or option.plan.scopes <= set(config.model.scopes)
        if base and offers and (found := measure_loss(config, option, sources)):
            yield option, _batch(found - base, parts)


def _sets(config: Config, inside: BlockKinds) -> Iterator[tuple[RematPolicy, RematCost]]:
    """The sets of tags that may be worth storing, likewise."""
    full = inside.cost(remat_policies.Full().plan)
    for save in _useful(inside):
        option = Names(save=save, block=config.remat.block)
        yield option, _batch(inside.cost(option.plan) - full, config.train.microbatches)


def _batch(cost: RematCost, parts: int) -> RematCost:
    """What a microbatch costs, for a batch: each is computed, but only one is stored at a time."""
    return replace(cost, flops=cost.flops * parts)


def _useful(inside: BlockKinds) -> list[tuple[str, ...]]:
    """A tag is left out that saves nothing alone, nor as the last one missing."""

    def flops(save: Sequence[str]) -> int:
        return inside.cost(_storing(save)).flops

    nothing, everything = flops(()), flops(inside.tags)
    useful = [
        tag
        for tag in inside.tags
        if flops((tag,)) < nothing or flops([other for other in inside.tags if other != tag]) > everything
    ]
    if len(useful) <= MOST_TAGS:
        return [save for size in range(1, len(useful) + 1) for save in combinations(useful, size)]
    return _greedy(inside, useful)


def _storing(save: Sequence[str]) -> RematPlan:
    return RematPlan(remat_policies.BLOCK, names=frozenset(save))


def _greedy(inside: BlockKinds, useful: Sequence[str]) -> list[tuple[str, ...]]:
    """One set of each size: to the one before it is added what saves most FLOPs for a byte."""
    sets: list[tuple[str, ...]] = []
    save: tuple[str, ...] = ()
    while len(save) < len(useful):
        before = inside.cost(_storing(save))
        gains = {}
        for tag in useful:
            if tag not in save:
                more = inside.cost(_storing((*save, tag))) - before
                gains[tag] = -more.flops / max(more.num_bytes, 1)
        best = max(gains, key=lambda tag: gains[tag])
        save = tuple(sorted((*save, best)))
        sets.append(save)
    return sets


def _frontier(sets: Sequence[MenuRow], fixed: Sequence[MenuRow]) -> list[MenuRow]:
    """The sets that nothing beats both in bytes and in FLOPs. Compiled, equals may differ: all fixed ones stay."""
    kept, best = [], inf
    for row in sorted([*fixed, *sets], key=lambda row: (row.counted, row.flops)):
        if row.flops < best:
            best = row.flops
            kept.append(row)
    return [row for row in kept if isinstance(row.option, Names)]
