"""Draw the rooms and the arrows between them, and tell which arrows run back up."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping

from tests.house.source import Product

Arrow = tuple[str, str]
EXACT_UP_TO = 16  # rooms; the work doubles with each


def draw_arrows(product: Product) -> dict[Arrow, list[str]]:
    """Return for each pair of rooms (importer, imported) the imports that make it an arrow, as file:line module."""
    arrows: dict[Arrow, list[str]] = defaultdict(list)
    rooms = {module.name: module.room for module in product.modules}
    for module in product.modules:
        for item in product.imports(module):
            # A folder without __init__.py, or a file that is not there (yet), belongs to the room it is named after.
            room = rooms.get(item.target) or ".".join(item.target.split(".")[:2])
            if room != module.room:
                arrows[module.room, room].append(module.place(item.line, item.target))
    return dict(arrows)


def find_knots(arrows: Iterable[Arrow]) -> list[set[str]]:
    """Return the sets of two or more rooms that all reach each other (strongly connected components), largest first."""
    below = _adjacency(arrows)
    reached = {room: _reach(room, below) for room in below}
    knots: list[set[str]] = []
    for room in sorted(below):
        knot = {other for other in reached[room] if room in reached.get(other, ())}
        if knot and knot not in knots:
            knots.append(knot)
    return sorted(knots, key=len, reverse=True)


def find_back_arrows(arrows: Iterable[Arrow], order: Mapping[str, int]) -> list[Arrow]:
    """Return the arrows that run up the order (room → floor, 0 on top), and the fewest that untie the remaining knots."""
    arrows = set(arrows)
    back = {(a, b) for a, b in arrows if a in order and b in order and order[b] < order[a]}
    for knot in find_knots(arrows - back):
        inside = sorted((a, b) for a, b in arrows - back if a in knot and b in knot)
        ranks = {room: rank for rank, room in enumerate(_best_order(sorted(knot), inside))}
        back |= {(a, b) for a, b in inside if ranks[b] < ranks[a]}
    return sorted(back)


def find_longest_path(arrows: Iterable[Arrow]) -> list[str]:
    """Return the rooms on the longest path along arrows that make no circle."""
    below = _adjacency(arrows)
    paths: dict[str, list[str]] = {}

    def longest(room: str) -> list[str]:
        if room not in paths:
            tails = [longest(other) for other in sorted(below.get(room, ()))]
            paths[room] = [room, *max(tails, key=len, default=[])]
        return paths[room]

    return max((longest(room) for room in sorted(below)), key=len, default=[])


def read_order(product: Product) -> dict[str, int]:
    """Return the floor of each room by the `layers` contract of import-linter that names most; empty without one."""
    path = product.root / "pyproject.toml"
    settings = tomllib.loads(path.read_text()) if path.exists() else {}
    contracts = settings.get("tool", {}).get("importlinter", {}).get("contracts", [])
    orders = [_read_layers(contract) for contract in contracts if contract.get("type") == "layers"]
    return max(orders, key=len, default={})


def _read_layers(contract: dict[str, list[str]]) -> dict[str, int]:
    """Return the floor of each room that one contract names; none where it orders the files of a room."""
    floors: dict[str, int] = {}
    for container in contract.get("containers", [""]):
        for floor, layer in enumerate(contract["layers"]):
            for name in layer.replace("|", ":").split(":"):
                parts = [*filter(None, container.split(".")), *name.strip(" ()").split(".")]
                room = ".".join(parts[:2] if parts[0] == "runner" else parts[:1])
                floors.setdefault(room, floor)
    return floors if len(floors) > 1 else {}


def _adjacency(arrows: Iterable[Arrow]) -> dict[str, set[str]]:
    below: dict[str, set[str]] = defaultdict(set)
    for a, b in arrows:
        below[a].add(b)
    return dict(below)


def _reach(room: str, below: Mapping[str, set[str]]) -> set[str]:
    """Return all rooms at the end of one or more arrows from a room."""
    found: set[str] = set()
    todo = [room]
    while todo:
        for other in below.get(todo.pop(), ()):
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def _best_order(rooms: list[str], arrows: list[Arrow]) -> list[str]:
    """Return the order of rooms, top first, with the fewest arrows back up (minimum feedback arc set)."""
    if len(rooms) > EXACT_UP_TO:
        # Those that import much and are imported little go on top.
        weight = {room: sum(b == room for _, b in arrows) - sum(a == room for a, _ in arrows) for room in rooms}
        return sorted(rooms, key=lambda room: (weight[room], room))
    index = {room: bit for bit, room in enumerate(rooms)}
    below = [0] * len(rooms)
    for a, b in arrows:
        below[index[a]] |= 1 << index[b]
    # best[s]: the fewest arrows back within the set s of rooms, all of them above the rest; last[s]: its lowest room.
    best = [len(arrows) + 1] * (1 << len(rooms))
    last = [0] * (1 << len(rooms))
    best[0] = 0
    for chosen in range(1 << len(rooms)):
        for bit in range(len(rooms)):
            grown = chosen | 1 << bit
            if grown != chosen:
                count = best[chosen] + (below[bit] & chosen).bit_count()
                if count < best[grown]:
                    best[grown], last[grown] = count, bit
    order, left = [], (1 << len(rooms)) - 1
    while left:
        order.append(rooms[last[left]])
        left &= ~(1 << last[left])
    return order[::-1]
