"""A long curve in few points, of which none is invented: the least and the largest of each stretch, and both ends.

A mean would hide the spike one is looking for.
"""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[int, float]


def thinned(curve: Sequence[Point], most: int) -> list[Point]:
    """At most `most` (≥ 4) of the points, in order."""
    if len(curve) <= most:
        return list(curve)
    inner, stretches = curve[1:-1], (most - 2) // 2
    chosen = [curve[0]]
    for number in range(stretches):
        begin, end = (len(inner) * edge // stretches for edge in (number, number + 1))
        stretch = inner[begin:end]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        chosen += sorted(extremes)
    return [*chosen, curve[-1]]
