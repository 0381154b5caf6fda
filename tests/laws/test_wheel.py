"""Law: a wheel, installed into an environment of its own outside the checkout, does what a checkout does.

It is typed as `holdfast` in a folder whose path has a space, and which has packages called `data`, `models` and `runner`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.conftest import HANG_SECONDS, REPO, SMALL, Door, assert_same, write_corpus

pytestmark = pytest.mark.slow

# What the wheel is built from: not the checkout itself, in which a build would leave folders behind.
SOURCES = ("conf", "data", "models", "runner", "holdfast.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SHORT = ("train.eval_steps=2", "train.eval_batches=1", "log.tensorboard=false")

OWN_MODEL = """
from flax import nnx

class Net(nnx.Module):
    def __init__(self, inputs, num_outputs, rngs, width=16):
        self.first = nnx.Linear(inputs[0] * inputs[1], width, rngs=rngs)
        self.out = nnx.Linear(width, num_outputs, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.first(x.reshape(len(x), -1))))
"""
OWN_CONF = {
    "model/mine.yaml": "# My network.\nkind: external\ntarget: own_model:Net\noptions: {width: 24}\n",
    "experiment/quick.yaml": (
        "# @package _global_\n# My experiment.\ndefaults: [override /model: mine, override /data: digits]\n"
        "name: quick\ntrain: {steps: 5}\n"
    ),
}


@dataclass(frozen=True)
class InstalledDoor(Door):
    """`holdfast` of an environment, in a working directory of its own."""

    environment: Path = Path()

    def start_arguments(self, *overrides: str) -> list[str]:
        return [str(self.environment / "bin/holdfast"), *overrides]

    def start(self, *overrides: str, **environment: str) -> subprocess.Popen[str]:
        # Empty: nothing of the checkout comes in by it.
        return super().start(*overrides, PYTHONPATH="", **environment)

    def run_well(self, *words: str) -> str:
        """Type a command that must end with 0; return what it says."""
        done = self.run(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout


def call(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of its sources, with the build backend that is installed and no network."""
    for name in SOURCES:
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(REPO / name, folder / "source" / name)
    call(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--wheel-dir", folder, folder / "source"),
    )
    (wheel,) = folder.glob("holdfast-*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path) -> Path:
    """Make an environment with the wheel, and with the dependencies of this one, but not with its checkout."""
    environment = folder / "an environment"
    venv.create(environment, symlinks=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # Links to everything that is installed here, save what makes the checkout importable.
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for installed in Path(str(distribution("jax").locate_file(""))).iterdir():
        if not installed.name.startswith(("holdfast", "__editable__")) and installed.suffix != ".pth":
            (dependencies / installed.name).symlink_to(installed)
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    python = environment / "bin/python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return environment


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a wheel")
    return make_environment(folder, build_wheel(folder))


@pytest.fixture
def installed(environment: Path, tmp_path: Path) -> InstalledDoor:
    """The command where a stranger types it."""
    cwd = tmp_path / "a folder"
    for package in ("data", "models", "runner"):
        (cwd / package).mkdir(parents=True)
        (cwd / package / "__init__.py").write_text("raise ImportError('this one is not asked for')\n")
    for name, text in OWN_CONF.items():
        (cwd / "conf" / name).parent.mkdir(parents=True)
        (cwd / "conf" / name).write_text(text)
    (cwd / "own_model.py").write_text(OWN_MODEL)
    write_corpus(cwd)
    return InstalledDoor(cwd, environment)


def test_nothing_of_the_checkout_is_there(installed: InstalledDoor) -> None:
    code = "import data, models, runner; print(*[each.__file__ for each in (data, models, runner)], sep='\\n')"
    found = subprocess.check_output(
        [installed.environment / "bin/python", "-P", "-c", code],
        cwd=installed.cwd,
        env={**os.environ, "PYTHONPATH": ""},
        text=True,
    )
    (site_packages,) = installed.environment.glob("lib/python*/site-packages")
    assert found.split("\n")[:3] == [str(site_packages / name / "__init__.py") for name in ("data", "models", "runner")]
    assert not (site_packages / "conf").exists()


def test_the_default_experiment_runs(installed: InstalledDoor) -> None:
    assert "finished 3 steps" in installed.run_well("train.steps=3", *SHORT)


def test_own_code_and_own_conf(installed: InstalledDoor) -> None:
    assert "finished 3 steps" in installed.run_well("model=own_model:Net", "data=digits", "train.steps=3", *SHORT)
    assert "own_model:Net, 1810 parameters" in installed.run_well("experiment=quick", *SHORT)
    assert "finished 3 steps" in installed.run_well("model=mine", "data=digits", "train.steps=3", *SHORT)
    # A worker is a new process, which imports what it needs in this folder.
    words = ("model=mine", "data=digits", "train.steps=3", "data.workers=1", "seed=1", *SHORT)
    assert "finished 3 steps" in installed.run_well(*words)
    shown = installed.run_well("--help")
    assert "model: cnn, external, gpt, gpt2_124m, gpt_7b, mine, mlp" in shown
    assert "gpt_7b, quick, stdlib_gpt" in shown


def test_a_call_from_python(installed: InstalledDoor) -> None:
    """Beside folders that are called as ours, which come first on the search path."""
    words = ["model=own_model:Net", "data=digits", "train.steps=3", *SHORT]
    code = f"from holdfast import run; result = run({words!r}, show=False); print(result.load(trust=True)[1].name)"
    environment = {**os.environ, "PYTHONPATH": ""}
    python = installed.environment / "bin/python"
    assert subprocess.check_output([python, "-c", code], cwd=installed.cwd, env=environment, text=True) == "default\n"


def test_a_sweep(installed: InstalledDoor) -> None:
    words = ("-m", "model=mine", "data=digits", "seed=0,1", "train.steps=3", *SHORT)
    assert "2 runs: 2 finished" in installed.run_well(*words)
    assert "2 runs: 2 finished" in installed.run_well(*words)


def test_killed_it_goes_on_bit_for_bit(installed: InstalledDoor, make_door: Callable[[str], Door]) -> None:
    """It ends as a run of the checkout does that is left alone."""
    checkout = make_door("checkout")
    # Written while training waits: at step 30 there is certainly something to go on from.
    words = (*SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=10")
    assert checkout.run(*words).returncode == 0
    installed.kill_at(30, *words)
    assert "restored step" in installed.run_well(*words)
    assert_same(installed.the_run, checkout.the_run, 60)


def test_a_drill(installed: InstalledDoor) -> None:
    said = installed.run_well("drill", "--kills", "1", "model=mine", "data=digits", "train.steps=20", *SHORT)
    assert "Killed once. Identical, bit for bit." in said


def test_verbs_find_what_is_shipped_with_them(installed: InstalledDoor) -> None:
    installed.run_well("model=mine", "data=digits", "train.steps=3", *SHORT)
    run = str(installed.the_run.relative_to(installed.cwd))
    assert run in installed.run_well("ls")
    installed.run_well("verify", run)
    assert installed.run_well("recipe", "slurm").startswith("#!/bin/bash")
    installed.run_well("report", "outputs", "--to", "page.html")
    assert (installed.cwd / "page.html").stat().st_size > 10_000
    # `supervise` runs whatever it is given: a run of the same environment.
    holdfast = str(installed.environment / "bin/holdfast")
    installed.run_well("supervise", "--", holdfast, "model=mine", "data=digits", "train.steps=4", *SHORT)
