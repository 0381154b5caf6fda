"""The measurements of tests/bench can be begun: what they import is there."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from pathlib import Path

import pytest

import tests.bench.__main__ as all_benches
from tests.conftest import REPO

# bare_restart is a script that `restart` starts.
NO_BENCHES = ("__init__", "__main__", "bare_restart")
BENCHES = sorted(path.stem for path in (REPO / "tests/bench").glob("*.py") if path.stem not in NO_BENCHES)


@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_can_be_imported(name: str) -> None:
    bench = importlib.import_module(f"tests.bench.{name}")
    assert callable(getattr(bench, "main", None))


def test_the_page_names_every_bench() -> None:
    page = (REPO / "docs/benchmarks.md").read_text()
    assert [name for name in BENCHES if f"tests.bench.{name}" not in page] == []


def test_one_command_knows_every_bench() -> None:
    assert sorted({*all_benches.BENCHES, "gpt"}) == BENCHES


def test_what_was_printed_replaces_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text("# Benchmarks\n\nBy hand.\n")
    monkeypatch.setattr(all_benches, "PAGE", page)
    all_benches.write_page({"loop": "old", "step": "kept"})
    all_benches.write_page({"loop": "new"})
    written = page.read_text()
    assert written.startswith("# Benchmarks\n\nBy hand.\n\n## As they were printed\n")
    assert written.count("```text\nkept\n```") == written.count("```text\nnew\n```") == 1
    assert "old" not in written
    assert written.index("tests.bench.step") < written.index("tests.bench.loop")
    assert f"jax {version('jax')}" in written
