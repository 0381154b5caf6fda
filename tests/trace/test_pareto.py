"""The Pareto front is what a comparison of every pair with every other gives, ties as asked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runner.trace.pareto import find_pareto_front

Pair = tuple[float, float]
COST = st.sampled_from([0.0, 1.0, 2.0, 3.0, float("inf")])


def beats(one: Pair, other: Pair) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


@given(st.lists(st.tuples(COST, COST), max_size=8))
def test_the_front_is_what_nothing_beats(costs: list[Pair]) -> None:
    unbeaten = [index for index, pair in enumerate(costs) if not any(beats(other, pair) for other in costs)]
    assert find_pareto_front(costs, keep_ties=True) == sorted(unbeaten, key=lambda index: costs[index])
    firsts = [index for index in unbeaten if costs.index(costs[index]) == index]
    assert find_pareto_front(costs, keep_ties=False) == sorted(firsts, key=lambda index: costs[index])
