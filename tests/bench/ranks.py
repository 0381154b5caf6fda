"""What two processes cost: a save and a restore of the same bytes ÷ by one process.

    python -m tests.bench.ranks [WIDTH] [ROUNDS] [MESH]

MESH is `fsdp`, where each process has half of the state, or `data`, where each has all of it. Interleaved; medians.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from tests.ranks import find_only_run, run_ranks

# A save after each step, each waited for, and next to nothing else.
WORDS = (
    *("model=mlp", "data=digits", "data.batch_size=8", "root=outputs", "train.log_steps=100", "eval={}"),
    *("ckpt=periodic", "ckpt.save.periodic.steps=1", "log.tensorboard=false", "retention=last_and_best"),
)
STEPS, MORE = 8, 2


def main(width: str = "2500", rounds: str = "5", mesh: str = "fsdp") -> None:
    """Measure and print."""
    saves: dict[int, list[float]] = {1: [], 2: []}
    restores: dict[str, list[float]] = {"same": [], "other": []}
    num_bytes = 0
    for number in range(int(rounds)):
        for count in (1, 2):
            with tempfile.TemporaryDirectory(prefix="holdfast-bench-") as name:
                folder, size = Path(name), f"model.width={width}"
                several = f"mesh={mesh}"
                go_on(folder, count, (size, several), STEPS)
                run = find_only_run(folder / "outputs")
                assert run is not None
                events = [json.loads(line) for line in run.timing.read_text().splitlines()]
                took = [event for event in events if event["event"] == "save"]
                # The first opens files for the first time.
                saves[count] += [event["durable"] for event in took[1:]]
                num_bytes = took[-1]["bytes"]
                for restored, kind in ((count, "same"), (3 - count, "other")):
                    go_on(folder, restored, (size, several), STEPS + MORE * (1 if kind == "same" else 2), str(run.path))
                    last = json.loads(run.attempts.read_text().splitlines()[-1])
                    restores[kind].append(last["seconds"]["restore"])
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    one, two = median(saves[1]), median(saves[2])
    same, other = median(restores["same"]), median(restores["other"])
    print(f"checkpoints of {num_bytes / 1e6:.0f} MB")
    print(f"save, durable: one process {one * 1e3:.0f} ms, two {two * 1e3:.0f} ms: {two / one:.2f}")
    print(f"restore: as many processes {same * 1e3:.0f} ms, another number {other * 1e3:.0f} ms: {other / same:.2f}")


def go_on(folder: Path, count: int, choices: tuple[str, str], steps: int, run: str | None = None) -> None:
    """Train to a step with so many processes; `choices`: the size, and the mesh of several."""
    size, several = choices
    words = [
        *WORDS,
        size,
        several if count > 1 else "mesh=single",
        f"train.steps={steps}",
        *([f"dir={run}"] if run else []),
    ]
    assert run_ranks(folder, count, *words) == [0] * count, (folder / "out.0").read_text()


if __name__ == "__main__":
    main(*sys.argv[1:])
