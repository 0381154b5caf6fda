"""remat=auto against every policy of the menu, at ten budgets between `full` and `none`, on two models.

    python -m tests.bench.remat_auto [gpt|vit|resnet …] [key=value …]

The budgets are equally far from each other as ratios. For each: what was chosen, its bytes (of the compiler; for blocks in a loop on a CPU by count), what it computes
again, what the best policy of the menu would have, and what choosing took where nothing was compiled before. Each
option is compiled once. It fails where a choice is above its budget, or recomputes more than the best that fits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runner.config.remat_policies import Names
from runner.text import format_size, format_table
from tests.conftest import composed

BUDGETS = 10
MODELS = {
    "gpt": (
        *("data=synthetic", "data.gives=tokens", "data.seq_len=256", "data.batch_size=8", "model.num_layers=6"),
        *("model.num_heads=4", "model.width=256", "model.hidden=1024"),
    ),
    "vit": (  # the shape of ViT-Ti/16 on 224 × 224 pixels (Touvron et al. 2021, arXiv:2012.12877): 196 tokens
        *("model=vit", "data=synthetic", "data.gives=images", "+data.image_size=56", "data.batch_size=16"),
        *("model.patch_size=4", "model.num_layers=6", "model.num_heads=3", "model.width=192", "model.hidden=768"),
    ),
    "resnet": ("model=resnet", "data=digits", "model.stages=[2,2,2]", "data.batch_size=64"),
}


@dataclass(frozen=True)
class Line:
    """One budget: what was chosen and what it needs; FLOPs beyond those of `none` in percent."""

    budget: int
    choice: str
    num_bytes: int
    recompute: float
    best_fixed: str
    best_recompute: float
    compiles: int
    seconds: float


def measured(words: Sequence[str]) -> Iterator[Line]:
    """A line for each budget. An option is compiled once; what it took counts for each budget that asks for it."""
    from runner.remat.auto_search import build_menu, choose_row
    from runner.train.dataset import read_sources

    config = composed(*words, "remat=auto", "remat.budget_bytes=1GB")
    began = time.perf_counter()
    whole = build_menu(config, read_sources(config.data))
    tracing, took = time.perf_counter() - began, dict[Any, tuple[int, float]]()

    def num_bytes(row: Any) -> int:
        if row.policy not in took:
            began = time.perf_counter()
            took[row.policy] = whole.num_bytes(row), time.perf_counter() - began
        asked[row.policy] = took[row.policy][0]
        return asked[row.policy]

    asked: dict[Any, int] = {}
    fixed = {row: num_bytes(row) for row in whole.rows if not isinstance(row.policy, Names)}
    assert all(row.least <= needed for row, needed in fixed.items()), "what is ruled out might have fitted"
    (none,) = [needed for row, needed in fixed.items() if row.name == "none"]
    (full,) = [needed for row, needed in fixed.items() if row.name == "full"]
    for number in range(BUDGETS):
        budget = round(full * (none / full) ** ((number + 0.5) / BUDGETS))
        asked.clear()
        taken = choose_row(replace(whole, num_bytes=num_bytes, known=asked), budget)
        assert taken is not None
        needed, seconds = asked[taken.policy], sum(took[option][1] for option in asked)
        best = min((row for row in fixed if fixed[row] <= budget), key=lambda row: row.flops)
        yield Line(
            *(budget, taken.name, needed, 100 * (taken.flops / whole.flops - 1)),
            *(best.name, 100 * (best.flops / whole.flops - 1)),
            *(0 if whole.is_counted else len(asked), tracing + seconds),
        )


def check(lines: Sequence[Line]) -> int:
    """How often less is recomputed than by the best of the menu. Fails where it is more, or above the budget."""
    assert len(lines) == BUDGETS
    assert all(line.num_bytes <= line.budget for line in lines)
    assert all(line.recompute <= line.best_recompute + 1e-9 for line in lines)
    return sum(line.recompute < line.best_recompute - 1e-9 for line in lines)


def main(words: Sequence[str]) -> None:
    """The tables."""
    names = [word for word in words if word in MODELS] or [*MODELS]
    for name in names:
        lines = list(measured((*MODELS[name], *(word for word in words if "=" in word))))
        head = ("budget", "choice", "needs", "recomputed", "best of the menu", "its own", "compiled", "seconds")
        rows = [
            (
                *(format_size(line.budget), line.choice, format_size(line.num_bytes), f"+{line.recompute:.1f}%"),
                *(line.best_fixed, f"+{line.best_recompute:.1f}%", str(line.compiles), f"{line.seconds:.1f}"),
            )
            for line in lines
        ]
        print(
            f"\n{name}: {' '.join(MODELS[name])}",
            *format_table(head, rows, right=("budget", "needs", "recomputed")),
            sep="\n",
        )
        print(f"less recomputed than by the best of the menu at {check(lines)} of {BUDGETS} budgets", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
