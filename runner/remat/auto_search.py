"""Search for `remat=auto`: of everything that could be recomputed, the least that fits into a budget.

Candidates are the sets of tags that are worth something, found by tracing one block of each kind, and every fixed
policy that the model can be given. They are tried in ascending order of what they recompute, and the first that fits is
taken: so no fixed policy that fits recomputes less. Where the counted bytes of the blocks alone are above the budget
there is no need to compile; that is certain only on a CPU, whose compiler keeps what a scan stores.
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

import jax

from data.sources import Sources
from models.remat_plan import RematPlan
from runner.config.remat_policies import (
    BLOCK,
    AutoRemat,
    EveryN,
    Full,
    Names,
    RematPolicy,
    format_policy,
)
from runner.config.schema import Config
from runner.errors import ConfigError
from runner.mesh import batch_share
from runner.remat.block_costs import BlockKinds, RematCost, find_block_kinds, measure_loss
from runner.remat.candidates import (
    Candidate,
    compile_candidate,
    is_no_room,
    list_fixed_policies,
    measure_memory,
    trace_candidate,
)
from runner.remat.step_times import time_steps
from runner.text import format_size, format_table
from runner.trace.pareto import find_pareto_front
from runner.values import Say

# All sets of so many tags are traced, 30 ms each; of more tags only those sets that a greedy choice meets.
MOST_TAGS = 8
# More bytes than any device has: what a program needs that the compiler finds no room for.
NO_SUCH_DEVICE = sys.maxsize
# So many of the first that fit are timed, for so many steps each, where step times mean something.
FINALISTS, ROUNDS = 3, 10


@dataclass(frozen=True)
class MenuRow:
    """One candidate.

    Attributes:
        policy: The policy.
        counted: Bytes of state, batch and stored values on one device, counted in the trace.
        least: Bytes that it needs at any rate; 0 where nobody knows.
        flops: FLOPs of a step, on all devices.
    """

    policy: RematPolicy
    counted: int
    least: int
    flops: int

    @property
    def name(self) -> str:
        """The policy as a person calls it."""
        return format_policy(self.policy)


@dataclass(frozen=True)
class Menu:
    """The candidates, and the bytes that one device needs for each.

    Attributes:
        rows: The candidates, the least recomputation first.
        num_bytes: Returns the bytes of a row; it compiles, and may take minutes.
        known: The bytes that were asked for already.
        is_counted: Whether num_bytes counts in the trace, because the compiler cannot be believed here.
    """

    rows: Sequence[MenuRow]
    num_bytes: Callable[[MenuRow], int]
    known: dict[RematPolicy, int]
    is_counted: bool

    @property
    def flops(self) -> int:
        """FLOPs of a step where nothing is recomputed."""
        return self.rows[0].flops


def build_menu(config: Config, sources: Sources) -> Menu:
    """Return what there is to choose from for a configuration whose `remat` is auto.

    The model is traced once for all policies and tags of blocks, and once for each other policy. Raises ConfigError
    where the model has no blocks.
    """
    # AutoRemat has the plan of `full`, which finds the blocks; all costs below are differences from it.
    base = trace_candidate(config, config.remat, sources)
    mesh, blocks = base.built.mesh, find_block_kinds(base, config)
    is_cpu = base.platform == "cpu"
    outside = base.num_bytes - batch_share(mesh, blocks.cost(base.policy.plan).num_bytes)
    is_sure = is_cpu and not base.is_loop

    def make_row(policy: RematPolicy, more: RematCost) -> MenuRow:
        counted = base.counted + batch_share(mesh, more.num_bytes)
        return MenuRow(policy, counted, counted - outside if is_sure else 0, base.flops + more.flops)

    fixed = [make_row(policy, more) for policy, more in _measure_fixed_policies(config, sources, blocks)]
    sets = [make_row(policy, more) for policy, more in _measure_tag_sets(config, blocks)]
    rows = sorted([*fixed, *_drop_beaten_sets(sets, fixed)], key=lambda row: (row.flops, row.counted))
    # XLA on a CPU undoes recomputation where blocks follow each other in the program (step_requirements.py).
    is_blind = is_cpu and base.is_loop
    known: dict[RematPolicy, int] = {}

    def num_bytes(row: MenuRow) -> int:
        if row.policy not in known:
            known[row.policy] = (
                row.counted if is_blind else _compile_bytes(trace_candidate(config, row.policy, sources))
            )
        return known[row.policy]

    return Menu(rows, num_bytes, known, is_counted=is_blind)


def _compile_bytes(candidate: Candidate) -> int:
    """Return the bytes that the compiler says; NO_SUCH_DEVICE where it finds no room at all."""
    try:
        return measure_memory(candidate).footprint
    except jax.errors.JaxRuntimeError as error:
        if not is_no_room(error):
            raise
        return NO_SUCH_DEVICE


def iterate_fitting(menu: Menu, budget: int) -> Iterator[MenuRow]:
    """Yield the rows that fit into a budget of bytes, the least recomputation first."""
    hopeless: Sequence[MenuRow] = ()
    # Where rows can be ruled out beforehand, or cost nothing to ask, they are simply asked in their order.
    is_searched = menu.is_counted or any(row.least for row in menu.rows)
    for row in menu.rows:
        if row.least > budget or row in hopeless:
            continue
        if menu.num_bytes(row) <= budget:
            yield row
        # Elsewhere each answer is a compilation. Sets of tags are on a Pareto front: more recomputation, fewer bytes.
        # So the first that fits is found by halves, and most of those before it are never compiled.
        elif not is_searched:
            sets, is_searched = [row for row in menu.rows if isinstance(row.policy, Names)], True
            hopeless = sets[: bisect_left(sets, x=True, key=lambda row: menu.num_bytes(row) <= budget)]


def choose_row(
    menu: Menu, budget: int, choose_fastest: Callable[[Sequence[MenuRow]], MenuRow] | None = None
) -> MenuRow | None:
    """Return the least recomputation that fits, or None; with `choose_fastest`, the one it picks of the first few."""
    finalists = list(islice(iterate_fitting(menu, budget), FINALISTS if choose_fastest else 1))
    if choose_fastest and len(finalists) > 1:
        return choose_fastest(finalists)
    return finalists[0] if finalists else None


def find_fastest(config: Config, sources: Sources, rows: Sequence[MenuRow], say: Say) -> MenuRow:
    """Return the row whose steps take least time: FLOPs do not tell what it costs to read and write stored values."""
    traced = [trace_candidate(config, row.policy, sources) for row in rows]
    programs = {
        row.name: candidate.built.train_step.with_lr(compile_candidate(candidate)[1])
        for row, candidate in zip(rows, traced, strict=True)
    }
    with closing(traced[0].built.stream):
        seconds = time_steps(traced[0], programs, ROUNDS, say)
    medians = {name: median(found) for name, found in seconds.items()}
    say("  a step takes " + ", ".join(f"{1000 * found:.3g} ms with {name}" for name, found in medians.items()))
    return min(rows, key=lambda row: medians.get(row.name, inf))


def find_budget(policy: AutoRemat, device: jax.Device) -> int:
    """Return the budget in bytes on one device.

    Raises ConfigError where it is a fraction and the device does not tell how much memory it has.
    """
    if policy.budget:
        return policy.budget
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        raise ConfigError(
            f"remat=auto: a {device.platform} does not tell how much memory there is, so remat.fraction="
            f"{policy.fraction:g} means nothing; say remat.budget_bytes=8GB"
        )
    return int(policy.fraction * limit)


def format_menu(menu: Menu, budget: int, taken: MenuRow) -> list[str]:
    """Return a table of what was chosen from: what recomputes less, what was chosen, how many more there were."""
    last = max(
        place for place, row in enumerate(menu.rows) if row == taken or menu.known.get(row.policy, inf) <= budget
    )
    rows = []
    for row in menu.rows[: last + 1]:
        found = menu.known.get(row.policy)
        verdict = "too large" if max(row.least, found or 0) > budget else "not tried" if found is None else "fits"
        share = f"+{100 * (row.flops / menu.flops - 1):.1f}%"
        needs = "" if found is None else "no room" if found == NO_SUCH_DEVICE else format_size(found)
        rows.append((row.name, share, format_size(row.counted), needs, "chosen" if row == taken else verdict))
    left = len(menu.rows) - len(rows)
    head = ("recomputed", "FLOPs", "counted", "" if menu.is_counted else "compiled", "")
    lines = format_table(head, rows, right=head[1:4])
    if left:
        lines.append(f"({left} others recompute more)")
    return lines


def _measure_fixed_policies(
    config: Config, sources: Sources, blocks: BlockKinds
) -> Iterator[tuple[RematPolicy, RematCost]]:
    """Yield the fixed policies that fit this model, each with what it costs more than `full`, on a whole batch."""
    block, num_blocks = config.remat.block, sum(times for _, times in blocks.kinds)
    full_of_blocks = blocks.cost(Full().plan)
    full_of_loss = measure_loss(config, Full(block=block), sources)
    policies = list_fixed_policies(block, every=[n for n in (2, 3) if n <= num_blocks])
    # The menu is sorted by cost, and of equals the first stays first: `full` before policies that save nothing more.
    for policy in sorted(policies, key=lambda policy: not isinstance(policy, Full)):
        plan = policy.plan
        if plan.scopes == BLOCK and not isinstance(policy, EveryN):
            yield policy, _for_whole_batch(blocks.cost(plan) - full_of_blocks, config)
            continue
        # The others change more than the inside of blocks: the whole loss is traced with each.
        may_fit = config.model.kind == "external" or plan.scopes <= set(config.model.scopes)
        if full_of_loss and may_fit and (found := measure_loss(config, policy, sources)):
            yield policy, _for_whole_batch(found - full_of_loss, config)


def _measure_tag_sets(config: Config, blocks: BlockKinds) -> Iterator[tuple[RematPolicy, RematCost]]:
    """Yield the sets of tags that may be worth storing, each with what it costs more than `full`, on a whole batch."""
    full = blocks.cost(Full().plan)
    for save in _list_useful_sets(blocks):
        policy = Names(save=save, block=config.remat.block)
        yield policy, _for_whole_batch(blocks.cost(policy.plan) - full, config)


def _for_whole_batch(cost: RematCost, config: Config) -> RematCost:
    """Return what a microbatch costs for a batch: each is computed, but only one is stored at a time."""
    return replace(cost, flops=cost.flops * config.train.num_splits)


def _list_useful_sets(blocks: BlockKinds) -> list[tuple[str, ...]]:
    """Return the sets of tags to try; a tag is in none that saves no FLOPs, alone or as the last one missing."""

    def flops(save: Sequence[str]) -> int:
        return blocks.cost(_plan_storing(save)).flops

    nothing, everything = flops(()), flops(blocks.tags)
    useful = []
    for tag in blocks.tags:
        others = [other for other in blocks.tags if other != tag]
        if flops((tag,)) < nothing or flops(others) > everything:
            useful.append(tag)
    if len(useful) <= MOST_TAGS:
        return [save for size in range(1, len(useful) + 1) for save in combinations(useful, size)]
    return _grow_greedily(blocks, useful)


def _plan_storing(save: Sequence[str]) -> RematPlan:
    return RematPlan(BLOCK, names=frozenset(save))


def _grow_greedily(blocks: BlockKinds, useful: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one set of each size: to the one before it is added the tag that saves most FLOPs for a byte."""
    sets: list[tuple[str, ...]] = []
    save: tuple[str, ...] = ()
    while len(save) < len(useful):
        before = blocks.cost(_plan_storing(save))
        gains = {}
        for tag in useful:
            if tag not in save:
                more = blocks.cost(_plan_storing((*save, tag))) - before
                gains[tag] = -more.flops / max(more.num_bytes, 1)
        best = max(gains, key=lambda tag: gains[tag])
        save = tuple(sorted((*save, best)))
        sets.append(save)
    return sets


def _drop_beaten_sets(sets: Sequence[MenuRow], fixed: Sequence[MenuRow]) -> list[MenuRow]:
    """Return the sets of tags that nothing beats in counted bytes and in FLOPs.

    Fixed policies are not dropped so: compiled, two that are counted alike may differ.
    """
    rows = [*fixed, *sets]
    front = find_pareto_front([(row.counted, row.flops) for row in rows], keep_ties=False)
    return [rows[place] for place in front if isinstance(rows[place].policy, Names)]
