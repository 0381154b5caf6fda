"""The measurements of tests/bench can be begun: what they import is there."""

from __future__ import annotations

import importlib

import pytest

from tests.conftest import REPO

# bare_restart is a script that `restart` starts.
BENCHES = sorted(
    path.stem for path in (REPO / "tests/bench").glob("*.py") if path.stem not in ("__init__", "bare_restart")
)


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_can_be_imported(name: str) -> None:
    bench = importlib.import_module(f"tests.bench.{name}")
    assert callable(getattr(bench, "main", None))


def test_the_page_names_every_bench() -> None:
    page = (REPO / "docs/benchmarks.md").read_text()
    assert [name for name in BENCHES if f"tests.bench.{name}" not in page] == []
