"""What timing.jsonl says: how fast steps went. Reads only; a file that is missing or torn tells less, never nothing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from runner.files import open_file, parse_json
from runner.rundir.side_files import is_count, is_number
from runner.types import JsonObject
from runner.values import Speed

# A line of a log is shorter than that.
MOST_LINE_BYTES = 1 << 20


def read_json_lines(path: Path) -> Iterator[JsonObject]:
    """Yield every JSON object of a log; a line that is torn, or longer than any of ours, is left out."""
    try:
        handle = open_file(path, os.O_RDONLY)
    # Not there, not ours to read, or no plain file.
    except OSError:
        return
    # As bytes: a line that a power cut tore need not even be text.
    with os.fdopen(handle, "rb") as file:
        while raw := file.readline(MOST_LINE_BYTES):
            # A part of a line is no JSON, and neither is what follows it.
            with suppress(ValueError):
                line = parse_json(raw)
                if isinstance(line, dict):
                    yield line


def measure_speed(timing: Sequence[JsonObject]) -> Speed | None:
    """Return how fast steps went, each number the median over what was logged; None where nothing was.

    What training waited for evaluations and saves does not count.
    """
    paces: list[float] = []
    others: dict[str, list[float]] = {"examples_per_second": [], "tokens_per_second": [], "mfu": []}
    for line in timing:
        if line.get("event") != "train" or not is_count(line.get("steps")) or not line["steps"]:
            continue
        if is_number(line.get("seconds")):
            paused = line.get("paused")
            if (busy := line["seconds"] - (paused if is_number(paused) else 0.0)) > 0:
                paces.append(busy / line["steps"])
        for name, values in others.items():
            if is_number(line.get(name)) and line[name] >= 0:
                values.append(float(line[name]))
    if not paces:
        return None
    # The first step is slower than any other.
    found = {name: statistics.median(values[1:] or values) if values else None for name, values in others.items()}
    pace = statistics.median(paces[1:] or paces)
    return Speed(1.0 / pace, found["examples_per_second"], found["tokens_per_second"], found["mfu"])
