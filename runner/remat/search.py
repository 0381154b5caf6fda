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
from models.remat_plan import Plan
from runner.config import remat
from runner.config.remat import Auto, Names, Remat, named
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.remat.block_costs import Blocks, Cost, blocks, whole
from runner.remat.candidates import Candidate, candidate, compiled, memory
from runner.remat.survey import NO_ROOM, timed
from runner.text import format_table as lines
from runner.text import size_text

MOST_TAGS = 8  # all their sets are traced, 30 ms each; of more tags, those that a greedy choice meets
NO_SUCH_DEVICE = sys.maxsize  # bytes
FINALISTS, ROUNDS = 3, 10  # so many are timed, so often, where that means something


@dataclass(frozen=True)
class Row:
    """A candidate. `least`: bytes that it needs at any rate, 0 where nobody knows."""

    option: Remat
    counted: int
    least: int
    flops: int

    @property
    def name(self) -> str:
        """As a person calls it."""
        return named(self.option)


@dataclass(frozen=True)
class Menu:
    """Candidates, the least recomputation first, with the bytes that one device needs for each, once it is asked."""

    rows: Sequence[Row]
    num_bytes: Callable[[Row], int]
    known: dict[Remat, int]  # what was asked already
    is_counted: bool  # num_bytes is counted: the compiler cannot be believed here

    @property
    def flops(self) -> int:
        """Where nothing is recomputed."""
        return self.rows[0].flops


def menu(config: Config, sources: Sources) -> Menu:
    """What there is to choose from for a configuration whose `remat` is auto. Raises ConfigError where that is nothing.

    The model is traced once for all policies and tags of blocks, and once for each other policy.
    """
    base = candidate(config, config.remat, sources)
    device, inside = base.built.mesh.devices.flat[0], blocks(base, config)
    is_cpu = device.platform == "cpu"
    outside = base.num_bytes - inside.cost(base.option.plan).num_bytes // base.built.mesh.size
    is_sure = is_cpu and not base.is_loop

    def row(option: Remat, more: Cost) -> Row:
        counted = base.counted + more.num_bytes // base.built.mesh.size
        return Row(option, counted, counted - outside if is_sure else 0, base.flops + more.flops)

    fixed = [row(option, more) for option, more in _fixed(config, sources, inside)]
    sets = [row(option, more) for option, more in _sets(config, inside)]
    rows = sorted([*fixed, *_frontier(sets, fixed)], key=lambda row: (row.flops, row.counted))
    known: dict[Remat, int] = {}

    def num_bytes(row: Row) -> int:
        if row.option not in known:
            is_blind = is_cpu and base.is_loop
            known[row.option] = row.counted if is_blind else _compiled(candidate(config, row.option, sources))
        return known[row.option]

    return Menu(rows, num_bytes, known, is_counted=is_cpu and base.is_loop)


def _compiled(traced: Candidate) -> int:
    """What the compiler says, which may be that it finds no room at all."""
    try:
        return memory(traced).footprint
    except jax.errors.JaxRuntimeError as error:
        if NO_ROOM not in str(error):
            raise
        return NO_SUCH_DEVICE


def fitting(menu: Menu, budget: int) -> Iterator[Row]:
    """What fits, the least recomputation first.

    Where no row can be ruled out beforehand, sets of tags are tried only from where they begin to fit.
    """
    hopeless: Sequence[Row] = ()
    is_searched = menu.is_counted or any(row.least for row in menu.rows)
    for row in menu.rows:
        if row.least > budget or row in hopeless:
            continue
        if menu.num_bytes(row) <= budget:
            yield row
        elif not is_searched:
            sets, is_searched = [row for row in menu.rows if isinstance(row.option, Names)], True
            hopeless = sets[: bisect_left(sets, x=True, key=lambda row: menu.num_bytes(row) <= budget)]


def chosen(menu: Menu, budget: int, fastest: Callable[[Sequence[Row]], Row] | None = None) -> Row | None:
    """The least recomputation that fits, or None; with `fastest`, whichever it says of the first few."""
    finalists = list(islice(fitting(menu, budget), FINALISTS if fastest else 1))
    return fastest(finalists) if fastest and len(finalists) > 1 else next(iter(finalists), None)


def fastest(config: Config, sources: Sources, rows: Sequence[Row], tell: Callable[[str], None]) -> Row:
    """The one whose steps take least time: FLOPs do not tell what it costs to read and write what is stored."""
    traced = [candidate(config, row.option, sources) for row in rows]
    programs = {
        row.name: each.built.train_step.bound(compiled(each)[1]) for row, each in zip(rows, traced, strict=True)
    }
    with closing(traced[0].built.stream):
        seconds = timed(traced[0], programs, ROUNDS, tell)
    medians = {name: median(found) for name, found in seconds.items()}
    tell("  a step takes " + ", ".join(f"{1000 * found:.3g} ms with {name}" for name, found in medians.items()))
    return min(rows, key=lambda row: medians.get(row.name, inf))


def budget_of(option: Auto, device: Any) -> int:
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


def table(menu: Menu, budget: int, taken: Row) -> list[str]:
    """What was chosen from: everything that recomputes less, what was chosen, and how many more there were."""
    last = max(
        place for place, row in enumerate(menu.rows) if row == taken or menu.known.get(row.option, inf) <= budget
    )
    rows = []
    for row in menu.rows[: last + 1]:
        found = menu.known.get(row.option)
        verdict = "too large" if max(row.least, found or 0) > budget else "not tried" if found is None else "fits"
        share = f"+{100 * (row.flops / menu.flops - 1):.1f}%"
        needs = "" if found is None else "no room" if found == NO_SUCH_DEVICE else size_text(found)
        rows.append((row.name, share, size_text(row.counted), needs, "chosen" if row == taken else verdict))
    left = len(menu.rows) - len(rows)
    head = ("recomputed", "FLOPs", "counted", "" if menu.is_counted else "compiled", "")
    return [*lines(head, rows, right=head[1:4]), *([f"({left} others recompute more)"] if left else [])]


def _fixed(config: Config, sources: Sources, inside: Blocks) -> Iterator[tuple[Remat, Cost]]:
    """The policies of the menu that this model offers, and what each costs more than `full`, on a whole batch."""
    block, count, parts = config.remat.block, sum(times for _, times in inside.kinds), config.train.microbatches
    full = inside.cost(remat.Full().plan)
    of_blocks: tuple[Remat, ...] = (remat.Full(block=block), remat.Dots(block=block), remat.DotsNoBatch(block=block))
    for option in of_blocks:
        yield option, _batch(inside.cost(option.plan) - full, parts)
    base = whole(config, remat.Full(block=block), sources)
    every = [remat.EveryN(n=n, block=block) for n in (2, 3) if n <= count]
    others: tuple[Remat, ...] = (
        remat.NoRemat(),
        remat.AttentionCore(),
        remat.AttentionOnly(),
        remat.FfnOnly(),
        *every,
    )
    for option in others:
        offers = config.model.kind == "external" or option.plan.scopes <= set(config.model.scopes)
        if base and offers and (found := whole(config, option, sources)):
            yield option, _batch(found - base, parts)


def _sets(config: Config, inside: Blocks) -> Iterator[tuple[Remat, Cost]]:
    """The sets of tags that may be worth storing, likewise."""
    full = inside.cost(remat.Full().plan)
    for save in _useful(inside):
        option = Names(save=save, block=config.remat.block)
        yield option, _batch(inside.cost(option.plan) - full, config.train.microbatches)


def _batch(cost: Cost, parts: int) -> Cost:
    """What a microbatch costs, for a batch: each is computed, but only one is stored at a time."""
    return replace(cost, flops=cost.flops * parts)


def _useful(inside: Blocks) -> list[tuple[str, ...]]:
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


def _storing(save: Sequence[str]) -> Plan:
    return Plan(remat.BLOCK, names=frozenset(save))


def _greedy(inside: Blocks, useful: Sequence[str]) -> list[tuple[str, ...]]:
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


def _frontier(sets: Sequence[Row], fixed: Sequence[Row]) -> list[Row]:
    """The sets that nothing beats both in bytes and in FLOPs. Compiled, equals may differ: all fixed ones stay."""
    kept, best = [], inf
    for row in sorted([*fixed, *sets], key=lambda row: (row.counted, row.flops)):
        if row.flops < best:
            best = row.flops
            kept.append(row)
    return [row for row in kept if isinstance(row.option, Names)]
