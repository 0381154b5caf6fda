"""Train in a fixed number of parts (`train.parts`), so that the bits do not depend on how many devices there are.

A program that the compiler divides among devices sums in another order on each number of them, and rounding grows:
after 300 steps two such runs are 42 % apart (measured). Here nothing is left to the compiler: each part of the batch is
a plain program on one device; the results are added pair by pair in one fixed binary tree, neighbours first; and the
update is a plain program on each device, of the same numbers. Between devices numbers are moved, and never added on the
way. So a device more or less changes who computes a part, and no bit.

Random streams are folded with the number of the part; batch statistics are the mean of those of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from models.objectives import BatchObjective, MergeableMetric
from runner.train.step import MakeOptimizer, MeanLoss, TrainStep, apply_update, weigh_examples
from runner.types import Batch, Metrics, State, Tree

# What a part of the batch gives: what is added over all parts, and what only the first part keeps.
PartResult: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
# What a part reads of the state, beside the parameters.
READ = ("step", "rng", "extra")


def compute_part(loss: MeanLoss, num_parts: int, params: Tree, beside: State, batch: Batch, index: Any) -> PartResult:
    """Return a part's share of gradients, metrics and statistics, each with a leading dimension of one.

    `index` is the number of the part. Also returned is what is kept of the first part alone: counts of random streams,
    and what lasts beside the parameters and is no fraction.
    """
    state = {**beside, "params": params, "rng": _fold_streams(beside["rng"], index)}
    (_, (means, changed)), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
    grads = jax.tree.map(lambda leaf: leaf.conj() if jnp.iscomplexobj(leaf) else leaf, grads)
    summed = {"grads": grads, "means": means, "extra": _list_fractions(changed["extra"])}

    def share(leaf: jax.Array) -> jax.Array:
        # By a power of two: exact.
        return (leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) / num_parts)[None]

    return jax.tree.map(share, summed), changed


def update_parts(
    make_optimizer: MakeOptimizer, ema: float | None, state: State, summed: Tree, first: Tree, lr: jax.Array
) -> tuple[State, Metrics]:
    """Return the next state and the metrics, of the sums over all parts."""
    summed = jax.tree.map(lambda leaf: leaf[0], summed)
    grads = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), summed["grads"], state["params"])
    statistics = iter(summed["extra"])
    extra = jax.tree.map(
        lambda leaf: next(statistics).astype(leaf.dtype) if _is_fraction(leaf) else leaf, first["extra"]
    )
    # The streams go on from their own keys; a part has folded its number into them.
    rng = jax.tree.map(lambda old, new: old if _is_key(old) else new, state["rng"], first["rng"])
    return apply_update(state, (grads, summed["means"], {"rng": rng, "extra": extra}), make_optimizer(lr), ema)


def _fold_streams(rng: Tree, index: Any) -> Tree:
    return jax.tree.map(lambda leaf: jax.random.fold_in(leaf, index) if _is_key(leaf) else leaf, rng)


def _list_fractions(tree: Tree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_fraction(leaf)]


def _is_key(leaf: Any) -> bool:
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)) and leaf.shape == ()


def _is_fraction(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def add_trees(left: Tree, right: Tree) -> Tree:
    """Return the sum of two trees of arrays, or of metrics that know how they are merged."""
    return jax.tree.map(
        lambda a, b: a.merge(b) if isinstance(a, MergeableMetric) else a + b,
        left,
        right,
        is_leaf=lambda leaf: isinstance(leaf, MergeableMetric),
    )


class PartialSums:
    """Add results pair by pair in the order in which they come: equal numbers of them first, as a binary tree does."""

    def __init__(self, add: Callable[[Tree, Tree], Tree]):
        self._add, self._waiting, self._count = add, list[Tree](), 0

    def push(self, result: Tree) -> None:
        """Take the result that comes next."""
        self._count += 1
        size = self._count
        while size % 2 == 0:
            result, size = self._add(self._waiting.pop(), result), size // 2
        self._waiting.append(result)

    def total(self) -> Tree:
        """Return the sum; there were a power of two of them."""
        (total,) = self._waiting
        return total


@dataclass(frozen=True)
class PartsStep:
    """The train step of a run in parts; it has what `TrainStep` has, and compiles itself.

    Attributes:
        whole: the same mathematics as one program, in as many microbatches: for counting and judging traces.
        mesh: the devices; their number divides `num_parts`.
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
        """Return the learning rate on the first device; the others get it with each update."""
        return jax.device_put(np.float32(self.whole.lr), self.mesh.devices.flat[0])

    def with_lr(self, program: Any) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """Return a compiled program of this step as a function of state and batch alone."""
        return lambda state, batch: program(state, batch, self.put_lr())

    def compile(self, traced: jax.stages.Traced | None, state: State, batch: Batch) -> CompiledParts:
        """Compile the programs of every device, for the shapes of a state and a batch."""
        devices = list(self.mesh.devices.flat)
        part = jax.jit(partial(compute_part, self.loss, self.num_parts))
        # The one device gives its memory to the next state; several have views of the same arrays, which none can give.
        donated = (0,) if len(devices) == 1 else ()
        update = jax.jit(partial(update_parts, self.make_optimizer, self.ema), donate_argnums=donated)
        weigh = jax.jit(lambda batch: weigh_examples(batch, self.objective)) if self.objective.weigh else None
        weighed = jax.eval_shape(lambda batch: weigh_examples(batch, self.objective), _without_sharding(batch))
        rows = {name: _take_rows(leaf, self.num_parts) for name, leaf in weighed.items()}
        parts, adds, updates = [], [], []
        for device in devices:
            here = partial(_place, device)
            params, beside = here(state["params"]), here({name: state[name] for name in READ})
            arguments = (params, beside, here(rows), here(jax.ShapeDtypeStruct((), jnp.int32)))
            summed, first = jax.eval_shape(part, *arguments)
            parts.append(part.lower(*arguments).compile())
            adds.append(jax.jit(add_trees, donate_argnums=0).lower(here(summed), here(summed)).compile())
            lr = here(jax.ShapeDtypeStruct((), jnp.float32))
            updates.append(update.lower(here(state), here(summed), here(first), lr).compile())
        return CompiledParts(
            self.mesh, self.num_parts, weigh, parts, adds, _sum_across(self.mesh), updates, _shardings(state)
        )


@dataclass(frozen=True)
class CompiledParts:
    """The compiled programs of a step in parts, one of each kind for every device; called as one program is."""

    mesh: jax.sharding.Mesh
    num_parts: int
    weigh: Callable[[Batch], Batch] | None
    parts: Sequence[jax.stages.Compiled]
    adds: Sequence[jax.stages.Compiled]
    across: Callable[[Tree], Tree] | None
    updates: Sequence[jax.stages.Compiled]
    shardings: Tree

    def __call__(self, state: State, batch: Batch, lr: Any) -> tuple[State, Metrics]:
        """Do one update: the parts of each device, the sum of all, the update on each device."""
        devices = list(self.mesh.devices.flat)
        if self.weigh is not None:
            batch = self.weigh(jax.device_put(dict(batch), devices[0]))
        views = [_view(state, device) for device in devices]
        sums = [PartialSums(add) for add in self.adds]
        each, first = self.num_parts // len(devices), None
        # Part by part on all devices at once: each is dispatched and not waited for.
        for at in range(each):
            for place, (device, view) in enumerate(zip(devices, views, strict=True)):
                number = place * each + at
                rows = jax.device_put(_slice_part(batch, number, self.num_parts), device)
                beside, index = {name: view[name] for name in READ}, jax.device_put(np.int32(number), device)
                summed, kept = self.parts[place](view["params"], beside, rows, index)
                sums[place].push(summed)
                first = kept if number == 0 else first
        totals = [each_sum.total() for each_sum in sums]
        if self.across is not None:
            whole = _join_devices(totals, NamedSharding(self.mesh, PartitionSpec("data")))
            summed_up = self.across(whole)
            totals = [_view(summed_up, device) for device in devices]
        updated = [
            self.updates[place](view, totals[place], *jax.device_put((first, lr), device))
            for place, (device, view) in enumerate(zip(devices, views, strict=True))
        ]
        states = [new for new, _ in updated]
        return jax.tree.map(_join_replicas, self.shardings, *states), updated[0][1]

    def memory_analysis(self) -> Any:
        """Return what the compiler says of the memory of one part."""
        return self.parts[0].memory_analysis()

    def as_text(self) -> str | None:
        """Return the compiled program of one part."""
        return self.parts[0].as_text()


@dataclass(frozen=True)
class PartsEvaluation:
    """The evaluation step of a run in parts: sums over a batch that do not depend on how many devices there are.

    Attributes:
        step: (state, batch, weights) → sums, traced for one part.
    """

    step: jax.stages.Wrapped
    num_parts: int
    mesh: jax.sharding.Mesh

    def trace(self, state: State, batch: Batch, weights: Any) -> jax.stages.Traced:
        """Trace the step for the whole batch."""
        return self.step.trace(state, batch, weights)

    def __call__(self, state: State, batch: Batch, weights: Any) -> Mapping[str, Any]:
        """Return the sums of every metric over the batch, and `weight`, on the first device."""
        devices = list(self.mesh.devices.flat)
        read = {name: state[name] for name in ("params", *READ)}
        views = [_view(read, device) for device in devices]
        found: list[Any] = [None] * self.num_parts
        each = self.num_parts // len(devices)
        for at in range(each):
            for place, (device, view) in enumerate(zip(devices, views, strict=True)):
                number = place * each + at
                rows = jax.device_put(_slice_part({"batch": batch, "weights": weights}, number, self.num_parts), device)
                found[number] = self.step(view, rows["batch"], rows["weights"])
        sums = PartialSums(add_trees)
        for result in found:
            sums.push(jax.device_put(result, devices[0]))
        return sums.total()


def _sum_across(mesh: jax.sharding.Mesh) -> Callable[[Tree], Tree] | None:
    """Return a function that adds what each device has, and gives all of them the sum; None for one device.

    Each device gets one piece of what all have (all-to-all), adds the pieces in the same tree as everywhere, and the
    sums are put together again (all-gather): as many bytes as in a ring, and no addition on the way.
    """
    count = mesh.size
    if count == 1:
        return None

    def add_piece(leaf: jax.Array) -> jax.Array:
        flat = leaf[0].reshape(-1)
        pieces = jnp.pad(flat, (0, -flat.size % count)).reshape(count, -1)
        pieces = jax.lax.all_to_all(pieces, "data", 0, 0).reshape(count, -1)
        while len(pieces) > 1:
            pieces = pieces[0::2] + pieces[1::2]
        whole = jax.lax.all_gather(pieces[0], "data", tiled=True)
        return whole[: flat.size].reshape(leaf.shape)

    return jax.jit(
        jax.shard_map(
            lambda tree: jax.tree.map(add_piece, tree),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            check_vma=False,
        ),
        donate_argnums=0,
    )


def _view(tree: Tree, device: jax.Device) -> Tree:
    """Return the arrays of a tree as one device has them, without a copy."""

    def look(leaf: jax.Array) -> jax.Array:
        return next(shard.data for shard in leaf.addressable_shards if shard.device == device)

    return jax.tree.map(look, tree)


def _join_devices(trees: Sequence[Tree], sharding: NamedSharding) -> Tree:
    """Return arrays whose leading dimension is divided among devices, of what each device has."""

    def join(*leaves: jax.Array) -> jax.Array:
        shape = (len(leaves), *leaves[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(leaves))

    return jax.tree.map(join, *trees)


def _join_replicas(sharding: NamedSharding, *leaves: jax.Array) -> jax.Array:
    return jax.make_array_from_single_device_arrays(leaves[0].shape, sharding, list(leaves))


def _slice_part(batch: Tree, number: int, num_parts: int) -> Tree:
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
