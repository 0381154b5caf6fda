"""Train in a fixed number of parts (`train.parts`), so that the bits do not depend on how many devices there are.

A program that the compiler divides among devices sums in another order on each number of them, and rounding grows:
after 300 steps two such runs are 42 % apart (measured). Here nothing is left to the compiler: each part of the batch is
a plain program on one device; the results are added pair by pair in one fixed binary tree, neighbours first; and the
update is a plain program on each device, of the same numbers. Between devices numbers are moved, and never added on the
way. So a device more or less changes who computes a part, and no bit; nor does it matter to which process a device
belongs: a process runs the programs of its own devices, and parts are numbered through all of them.

Random streams are folded with the number of the part; batch statistics are the mean of those of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from models.objectives import BatchObjective
from runner.train.across_devices import (
    PartialSums,
    add_trees,
    divided_sharding,
    join_divided,
    join_replicas,
    list_own_devices,
    sum_across,
    view_on_device,
)
from runner.train.frozen_layers import UNCHANGED, keep_unchanged, leave_unchanged_out
from runner.train.step import MakeOptimizer, MeanLoss, TrainStep, apply_update, weigh_examples
from runner.types import Batch, Metrics, State, Tree

# What a part of the batch gives: what is added over all parts, and what is kept of the first part alone.
PartResult: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
# What a part reads of the state, beside the parameters.
READ = ("step", "rng", "extra", *UNCHANGED)


def compute_part(loss: MeanLoss, num_parts: int, params: Tree, beside: State, batch: Batch, index: Any) -> PartResult:
    """Return a part's share of gradients, metrics and statistics, and what counts of the first part alone.

    That is counts of random streams, and what lasts beside the parameters and is no fraction. `index` is the number of
    the part. Every array has a leading dimension of one, which counts devices where they meet.
    """
    state = {**beside, "params": params, "rng": _fold_streams(beside["rng"], index)}
    (_, (means, changed)), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
    grads = jax.tree.map(lambda leaf: leaf.conj() if jnp.iscomplexobj(leaf) else leaf, grads)
    fractions, others = _split_fractions(changed["extra"])
    summed = {"grads": grads, "means": means, "extra": fractions}
    kept = {"rng": [leaf for leaf in jax.tree.leaves(changed["rng"]) if not _is_stream(leaf)], "extra": others}

    def share(leaf: jax.Array) -> jax.Array:
        # By a power of two: exact.
        return (leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) / num_parts)[None]

    return jax.tree.map(share, summed), jax.tree.map(lambda leaf: leaf[None], kept)


def update_parts(
    make_optimizer: MakeOptimizer, ema: float | None, state: State, summed: Tree, kept: Tree, lr: jax.Array
) -> tuple[State, Metrics]:
    """Return the next state and the metrics, of the sums over all parts and of what the first part keeps."""
    summed, kept = jax.tree.map(lambda leaf: leaf[0], (summed, kept))
    grads = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), summed["grads"], state["params"])
    fractions, others, counts = iter(summed["extra"]), iter(kept["extra"]), iter(kept["rng"])
    extra = jax.tree.map(
        lambda old: next(fractions).astype(old.dtype) if _is_fraction(old) else next(others), state["extra"]
    )
    # The streams go on from their own keys; a part has folded its number into them.
    rng = jax.tree.map(lambda old: old if _is_stream(old) else next(counts), state["rng"])
    return apply_update(state, (grads, summed["means"], {"rng": rng, "extra": extra}), make_optimizer(lr), ema)


def select_read(state: State) -> State:
    """Return what a part reads of a state, beside the parameters that train."""
    return {name: state[name] for name in READ if name in state}


def _fold_streams(rng: Tree, index: Any) -> Tree:
    return jax.tree.map(lambda leaf: jax.random.fold_in(leaf, index) if _is_stream(leaf) else leaf, rng)


def _split_fractions(tree: Tree) -> tuple[list[jax.Array], list[jax.Array]]:
    """Return the leaves of a tree that are fractions, and the others."""
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if _is_fraction(leaf)], [leaf for leaf in leaves if not _is_fraction(leaf)]


def _is_stream(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)) and leaf.shape == ()


def _is_fraction(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


@dataclass(frozen=True)
class PartsStep:
    """The train step of a run in parts; it has what `TrainStep` has, and compiles itself.

    Attributes:
        whole: the same mathematics as one program, in as many microbatches: for counting and judging traces.
        mesh: the devices, of one process or of several; their number divides `num_parts`.
    """

    whole: TrainStep
    loss: MeanLoss
    objective: BatchObjective
    make_optimizer: MakeOptimizer
    ema: float | None
    num_parts: int
    mesh: jax.sharding.Mesh

    def trace(self, state: State, batch: Batch) -> jax.stages.Traced:
        """Trace the same mathematics as one program."""
        return self.whole.trace(state, batch)

    def put_lr(self) -> jax.Array:
        """Return the learning rate on the first device of this process; the others get it with each update."""
        return jax.device_put(np.float32(self.whole.lr), list_own_devices(self.mesh)[0].device)

    def with_lr(self, program: Any) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """Return a compiled program of this step as a function of state and batch alone."""
        return lambda state, batch: program(state, batch, self.put_lr())

    def compile(self, traced: jax.stages.Traced | None, state: State, batch: Batch) -> CompiledParts:
        """Compile the programs of every device of this process, for the shapes of a state and a batch."""
        own = list_own_devices(self.mesh)
        part = jax.jit(partial(compute_part, self.loss, self.num_parts))
        add = jax.jit(add_trees, donate_argnums=0)
        # One device gives its memory to the next state; several have views of the same arrays, which none can give.
        donated = (0,) if len(own) == 1 else ()
        update = jax.jit(partial(update_parts, self.make_optimizer, self.ema), donate_argnums=donated)
        weigh = jax.jit(lambda batch: weigh_examples(batch, self.objective)) if self.objective.weigh else None
        weighed = jax.eval_shape(lambda batch: weigh_examples(batch, self.objective), _without_sharding(batch))
        rows = {name: _take_rows(leaf, self.num_parts) for name, leaf in weighed.items()}
        programs = []
        for each in own:
            here = partial(_place, each.device)
            params, beside = here(state["params"]), here(select_read(state))
            arguments = (params, beside, here(rows), here(jax.ShapeDtypeStruct((), jnp.int32)))
            summed, kept = jax.eval_shape(part, *arguments)
            lr = here(jax.ShapeDtypeStruct((), jnp.float32))
            programs.append(
                DevicePrograms(
                    each.place,
                    each.device,
                    part.lower(*arguments).compile(),
                    add.lower(here(summed), here(summed)).compile(),
                    update.lower(here(leave_unchanged_out(state)), here(summed), here(kept), lr).compile(),
                )
            )
        across = None if self.mesh.size == 1 else _compile_sum_across(self.mesh, summed, kept)
        return CompiledParts(self.mesh, self.num_parts, weigh, programs, across, _shardings(state))


@dataclass(frozen=True)
class DevicePrograms:
    """The compiled programs of one device of this process.

    Attributes:
        place: where the device stands among all devices of the mesh, those of other processes included.
        part: computes a part of the batch.
        add: adds two parts.
        update: makes the next state of the sums over all parts.
    """

    place: int
    device: jax.Device
    part: jax.stages.Compiled
    add: jax.stages.Compiled
    update: jax.stages.Compiled


@dataclass(frozen=True)
class CompiledParts:
    """The compiled programs of a step in parts; called as one program is, by every process equally often.

    Attributes:
        weigh: says how much each example of the whole batch counts; None where all count alike.
        programs: those of each device of this process.
        across: adds what the devices have, and moves what the first of them keeps; None for a single device.
        shardings: where the next state lies.
    """

    mesh: jax.sharding.Mesh
    num_parts: int
    weigh: Callable[[Batch], Batch] | None
    programs: Sequence[DevicePrograms]
    across: jax.stages.Compiled | None
    shardings: Tree

    def __call__(self, state: State, batch: Batch, lr: Any) -> tuple[State, Metrics]:
        """Do one update: the parts of each device, the sum of all, the update on each device.

        Every process has the whole batch. Metrics are on the first device of this process.
        """
        own = self.programs
        if self.weigh is not None:
            batch = self.weigh(jax.device_put(dict(batch), own[0].device))
        views = [view_on_device(state, each.device) for each in own]
        sums = [PartialSums(each.add) for each in own]
        num_own, kept = self.num_parts // self.mesh.size, []
        # Part by part on all devices at once: each is dispatched and not waited for.
        for at in range(num_own):
            for each, view, device_sum in zip(own, views, sums, strict=True):
                number = each.place * num_own + at
                rows = jax.device_put(slice_part(batch, number, self.num_parts), each.device)
                beside, index = select_read(view), jax.device_put(np.int32(number), each.device)
                summed, keeps = each.part(view["params"], beside, rows, index)
                device_sum.push(summed)
                if at == 0:
                    kept.append(keeps)
        totals = list(zip([device_sum.total() for device_sum in sums], kept, strict=True))
        if self.across is not None:
            everywhere = self.across(*join_divided(self.mesh, totals))
            totals = [view_on_device(everywhere, each.device) for each in own]
        updated = [
            each.update(leave_unchanged_out(view), *total, jax.device_put(lr, each.device))
            for each, view, total in zip(own, views, totals, strict=True)
        ]
        joined = join_replicas(leave_unchanged_out(self.shardings), [new for new, _ in updated])
        return keep_unchanged(state, joined), updated[0][1]

    def memory_analysis(self) -> Any:
        """Return what the compiler says of the memory of one part."""
        return self.programs[0].part.memory_analysis()

    def as_text(self) -> str | None:
        """Return the compiled programs of one device, one after the other."""
        own = self.programs[0]
        programs = [own.part, own.add, own.update, *([] if self.across is None else [self.across])]
        return "\n".join(program.as_text() or "" for program in programs)


def _compile_sum_across(mesh: jax.sharding.Mesh, summed: Tree, kept: Tree) -> jax.stages.Compiled:
    """Compile the program in which the devices meet, for the shapes of what one of them has."""

    def divide(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((mesh.size, *leaf.shape[1:]), leaf.dtype, sharding=divided_sharding(mesh))

    # What goes in is needed nowhere else, and what comes out is as large.
    across = jax.jit(partial(sum_across, mesh), donate_argnums=(0, 1))
    return across.lower(*jax.tree.map(divide, (summed, kept))).compile()


def slice_part(batch: Tree, number: int, num_parts: int) -> Tree:
    """Return the rows of a part: they follow each other."""

    def take(leaf: Any) -> Any:
        size = len(leaf) // num_parts
        return leaf[number * size : (number + 1) * size]

    return jax.tree.map(take, dict(batch))


def _take_rows(leaf: jax.ShapeDtypeStruct, num_parts: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((leaf.shape[0] // num_parts, *leaf.shape[1:]), leaf.dtype)


def _place(device: jax.Device, tree: Tree) -> Tree:
    """Return abstract arrays that lie on one device."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _without_sharding(batch: Batch) -> Batch:
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in batch.items()}


def _shardings(state: State) -> Tree:
    return jax.tree.map(lambda leaf: leaf.sharding, state)
