"""What our launcher costs: a sweep of short runs ÷ the same runs typed one after the other; and two beside each other.

    python -m tests.bench.sweep [--runs 8] [--rounds 2]

Each round does all three, in turns, in fresh directories, with one compile cache for all; the first fills it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

from tests.conftest import REPO

WORDS = ("model=mlp", "data=digits", "train.steps=2", "log.tensorboard=false")


def timed(folder: Path, *commands: tuple[str, ...]) -> float:
    """Seconds that all take, one after the other. Raises CalledProcessError where one fails."""
    folder.mkdir()
    began = time.perf_counter()
    for words in commands:
        command = [sys.executable, str(REPO / "run.py"), *WORDS, *words]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began


def hits(folder: Path) -> tuple[int, int]:
    """How many runs found their step compiled, and how many there are."""
    lines = [json.loads(path.read_text().splitlines()[-1]) for path in folder.glob("outputs/*/*/attempts.jsonl")]
    return sum(line["compile_cache"] == "hit" for line in lines), len(lines)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    seeds = [str(seed) for seed in range(arguments.runs)]
    plain = [(f"seed={seed}",) for seed in seeds]
    sweep = ("-m", f"seed={','.join(seeds)}")
    ways = {"one by one": plain, "sweep": [sweep], "parallel=2": [(*sweep, "hydra.launcher.parallel=2")]}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as place:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(place) / "compiled")
        timed(Path(place) / "first", ("seed=1000",))
        for number in range(arguments.rounds):
            for way, commands in ways.items():
                folder = Path(place) / f"{number} {way}"
                seconds[way].append(timed(folder, *commands))
                found, runs = hits(folder)
                print(f"{way}: {seconds[way][-1]:.1f} s, {found} of {runs} found their programs compiled", flush=True)
    base = statistics.median(seconds["one by one"])
    for way, taken in seconds.items():
        print(f"{way:12} {statistics.median(taken) / base:.2f} × one by one")


if __name__ == "__main__":
    main()
