"""Run benches one after the other, and write what they print into docs/benchmarks.md, with machine and versions.

    python -m tests.bench                   # all that need no GPU: an hour, on a machine that does nothing else
    python -m tests.bench step loop         # these
    python -m tests.bench --print step      # without the page

A bench that fails ends the command, and the page stays as it was.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from runner.files import replace_file

PAGE = Path(__file__).resolve().parents[2] / "docs/benchmarks.md"
# What the last call of this command has written; all before it is written by people.
HEADING = "## As they were printed"
# Those of the issue that asked for them come first. `gpt` is for a GPU, and says so.
BENCHES = ("step", "loop", "storage", "restart", "sweep", "parts", "ranks", "remote", "data", "remat_auto", "goodput")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "hydra-core", "numpy")


def describe_machine() -> str:
    """Processor, cores, memory, system and versions, in one paragraph."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{found[1] if found else platform.machine()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, "
        f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}; {packages}."
    )


def run_bench(name: str) -> str:
    """Run one bench, show what it prints, and return it. Raises CalledProcessError where it fails."""
    print(f"\n$ python -m tests.bench.{name}", flush=True)
    lines = []
    with subprocess.Popen([sys.executable, "-m", f"tests.bench.{name}"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return "\n".join(lines)


def write_page(printed: dict[str, str]) -> None:
    """Replace on the page what these benches printed before; what others have printed stays, with its day."""
    written, _, section = PAGE.read_text().partition(f"{HEADING}\n")
    before = dict(re.findall(r"### `tests\.bench\.(\w+)`[^\n]*\n(.*?)(?=\n### |\Z)", section, re.DOTALL))
    today = f"{date.today().isoformat()}: {describe_machine()}"
    now = {name: f"\n{today}\n\n```text\n{text}\n```\n" for name, text in printed.items()}
    blocks = [
        f"### `tests.bench.{name}`\n{({**before, **now})[name].rstrip()}\n"
        for name in BENCHES
        if name in before or name in now
    ]
    replace_file(PAGE, f"{written.rstrip()}\n\n{HEADING}\n\n" + "\n".join(blocks))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench")
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=", ".join(BENCHES))
    parser.add_argument("--print", action="store_true", help="leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.benches if name not in BENCHES]:
        parser.error(f"no such bench: {unknown[0]}; there are: {', '.join(BENCHES)}")
    print(describe_machine())
    printed = {name: run_bench(name) for name in arguments.benches or BENCHES}
    if not arguments.print:
        write_page(printed)


if __name__ == "__main__":
    main()
