"""The Pareto front of two costs, as memory and time: what no other choice beats."""

from __future__ import annotations

from collections.abc import Sequence


def find_pareto_front(costs: Sequence[tuple[float, float]], *, keep_ties: bool) -> list[int]:
    """Return the indices of the pairs that no other pair beats, the one with the least first cost first.

    A pair is beaten by another one that is no worse in both costs and better in one. Of pairs that are equal in both,
    all stay with `keep_ties`, and without it the first.
    """
    front: list[int] = []
    # Sorted by the first cost, a pair is on the front exactly where its second cost is below all that came before.
    # Python's sort is stable: of equal pairs the first in `costs` comes first.
    for index in sorted(range(len(costs)), key=lambda index: costs[index]):
        is_better = not front or costs[index][1] < costs[front[-1]][1]
        is_tie = bool(front) and costs[index] == costs[front[-1]]
        if is_better or (is_tie and keep_ties):
            front.append(index)
    return front
