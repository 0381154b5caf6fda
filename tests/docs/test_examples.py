"""The programs of docs/examples: short, as the page says, and killed and resumed they are what they would have been."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HANG_SECONDS, REPO

EXAMPLES = REPO / "docs" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SHORT = ("train.steps=40", "train.eval_steps=20", "train.log_steps=10", "ckpt=combined", "ckpt.save.periodic.steps=10")


def run_here(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy of the examples, as the page says."""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("outputs", "__pycache__"))
    )


def test_each_has_an_experiment_and_is_short() -> None:
    assert NAMES == ["equinox_digits", "gan_digits", "linen_digits"]
    assert sorted(path.stem for path in (EXAMPLES / "conf/experiment").iterdir()) == NAMES
    for name in NAMES:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "equinox_digits" else ()) for name in NAMES]
)
def test_killed_once_each_is_identical(examples: Path, name: str) -> None:
    drilled(examples, name, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_three_times_each_is_identical(examples: Path, name: str) -> None:
    drilled(examples, name, kills=3)


def drilled(examples: Path, name: str, kills: int) -> None:
    done = run_here(examples, "-m", "runner", "drill", "--json", f"--kills={kills}", f"experiment={name}", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert len(found["kills"]) == kills, found
    assert found["verdict"] == "identical", found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "reached"),
    [
        ("equinox_digits", "eval/accuracy", 0.95),
        ("linen_digits", "eval/accuracy", 0.97),
        ("gan_digits", "eval/distance", -5.0),
    ],
)
def test_each_learns(examples: Path, name: str, metric: str, reached: float) -> None:
    done = run_here(examples, str(REPO / "run.py"), f"experiment={name}")
    assert done.returncode == 0, done.stdout + done.stderr
    (status,) = examples.glob("outputs/*/*/status.json")
    score = json.loads(status.read_text())["score"]
    assert (-score if metric == "eval/distance" else score) >= reached


def test_a_gan_leaves_pictures(examples: Path) -> None:
    done = run_here(examples, str(REPO / "run.py"), "experiment=gan_digits", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    (picture,) = examples.glob("outputs/*/*/media/samples/00000040.png")
    from PIL import Image

    assert Image.open(picture).size[0] >= 8 * 48
