"""Evaluate in the parts of a run with `train.parts`: sums over a batch that depend on no number of devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from runner import hosts
from runner.train.across_devices import (
    PartialSums,
    add_trees,
    gather_results,
    join_divided,
    list_own_devices,
    view_on_device,
)
from runner.train.parts import select_read, slice_part
from runner.types import Batch, State, Tree


@dataclass(frozen=True)
class PartsEvaluation:
    """The evaluation step of a run in parts: sums over a batch that do not depend on how many devices there are.

    Attributes:
        step: (state, batch, weights) → sums, traced for one part.
        mesh: the devices, of one process or of several; their number divides `num_parts`.
    """

    step: jax.stages.Wrapped
    num_parts: int
    mesh: jax.sharding.Mesh

    def trace(self, state: State, batch: Batch, weights: Any) -> jax.stages.Traced:
        """Trace the step for the whole batch."""
        return self.step.trace(state, batch, weights)

    def __call__(self, state: State, batch: Batch, weights: Any) -> Mapping[str, Any]:
        """Return the sums of every metric over the batch, and `weight`, on the first device of this process.

        Every process has the whole batch, and all of them must ask.
        """
        own = list_own_devices(self.mesh)
        read = {"params": state["params"], **select_read(state)}
        views = [view_on_device(read, each.device) for each in own]
        found: list[list[Tree]] = [[] for _ in own]
        num_own = self.num_parts // self.mesh.size
        # All are dispatched before the first is merged: a metric of the user's own may wait for its numbers.
        for at in range(num_own):
            for each, view, results in zip(own, views, found, strict=True):
                number = each.place * num_own + at
                rows = slice_part({"batch": batch, "weights": weights}, number, self.num_parts)
                rows = jax.device_put(rows, each.device)
                results.append(self.step(view, rows["batch"], rows["weights"]))
        totals = [_add_all(results) for results in found]
        if self.mesh.size == 1:
            return totals[0]
        totals = [_lift(jax.device_put(total, each.device)) for total, each in zip(totals, own, strict=True)]
        # A part's program is compiled at the first batch: devices give up where another's comes half a minute later.
        hosts.barrier("the parts of a batch are evaluated")
        gathered = gather_results(self.mesh, join_divided(self.mesh, totals))
        # Every process merges the same numbers in the same tree: only the metric knows how.
        return _add_all(view_on_device(gathered, own[0].device))


def _add_all(results: list[Tree]) -> Tree:
    sums = PartialSums(add_trees)
    for result in results:
        sums.push(result)
    return sums.total()


@jax.jit
def _lift(tree: Tree) -> Tree:
    """Return arrays with a leading dimension of one, which counts devices where they meet."""
    return jax.tree.map(lambda leaf: leaf[None], tree)
