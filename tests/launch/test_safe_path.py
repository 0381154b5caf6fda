"""No file of the working directory is imported in place of a library: it may be the directory of somebody else's run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.config.user_code import check_targets_exist
from runner.errors import ConfigError
from tests.conftest import REPO

# Python's own, which a verb or a run imports sooner or later, and libraries of ours.
PYTHONS = (
    *("argparse", "json", "typing", "dataclasses", "pickle", "struct", "random", "tempfile", "socket", "subprocess"),
    *("signal", "logging", "multiprocessing", "copy", "hashlib", "shutil", "textwrap", "difflib", "math"),
)
LIBRARIES = ("xxhash", "yaml", "numpy", "jax", "hydra", "omegaconf", "pydantic", "rich", "runner_", "models", "data")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory in which every module that may be imported says so."""
    for name in (*PYTHONS, *LIBRARIES):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'SPRUNG')!r}, 'a').write(__name__ + ' ')\n")
    (tmp_path / "corpus.txt").write_text("some text\n" * 50)
    (tmp_path / "other.txt").write_text("more text\n" * 50)
    return tmp_path


def start(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # As a person who has installed it: without the PYTHONPATH of whoever tests.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False
    )


HOLDFAST = str(Path(sys.executable).parent / "holdfast")
STARTS = {
    "a verb": ("-m", "runner", "ls", "."),
    "the verbs": ("-mrunner", "--help"),
    "a run": ("-m", "runner.launch", "model=nope"),
    "a run.py": (str(REPO / "run.py"), "model=nope"),
    "processes": ("-m", "runner", "tokenize", ".", "--to", "tokens", "--workers", "2"),
    "holdfast": (HOLDFAST, "ls", "."),
}


@pytest.mark.parametrize("name", list(STARTS))
def test_what_lies_here_is_not_imported(name: str, trap: Path) -> None:
    if name == "holdfast" and not Path(HOLDFAST).exists():
        pytest.skip("the command is not installed")
    done = start(*STARTS[name], cwd=trap)
    assert not (trap / "SPRUNG").exists(), (trap / "SPRUNG").read_text()
    assert done.returncode in (0, 2, 3), done.stderr
    assert "Traceback" not in done.stderr


def test_the_trap_works(trap: Path) -> None:
    assert start("-c", "import xxhash", cwd=trap).returncode == 0
    assert (trap / "SPRUNG").read_text() == "xxhash "


def test_an_empty_part_of_pythonpath_is_this_directory_too(trap: Path) -> None:
    """What Python itself imports before it asks us is not ours to say: without those of its own."""
    for name in PYTHONS:
        (trap / f"{name}.py").unlink()
    for words in (("-m", "runner", "ls", "."), (str(REPO / "run.py"), "model=nope")):
        done = start(*words, cwd=trap, PYTHONPATH=f"{os.pathsep}{REPO}")
        assert not (trap / "SPRUNG").exists(), (trap / "SPRUNG").read_text()
        assert done.returncode in (2, 3), done.stderr


def test_whoever_only_imports_us_keeps_his_path(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text("import runner, sys; print(sys.path[0])")
    (tmp_path / "mine/__main__.py").write_text("")
    for words in (("-m", "mine"), ("-c", "import mine"), (str(tmp_path / "run.py"),)):
        (tmp_path / "run.py").write_text("import mine")
        done = start(*words, cwd=tmp_path, PYTHONPATH=str(REPO))
        assert done.stdout.strip() in ("", str(tmp_path)), done
        assert done.returncode == 0, done.stderr


def test_a_checkout_that_is_not_installed_works_in_its_own_root(tmp_path: Path) -> None:
    """-S: without site-packages, and so without what an installation has put there."""
    assert start("-S", "-m", "runner", "recipe", cwd=REPO).stdout.startswith("jobset")
    assert "No module named runner" in start("-S", "-m", "runner", "recipe", cwd=tmp_path).stderr


def test_a_module_that_a_library_hides_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for top, says in (
        ("yaml", r"yaml is a module of .*/yaml/__init__\.py; give yaml in this"),
        ("json", "json is a module of Python's own; give json in this"),
        ("data", r"data is Holdfast's own; name the file of yours: \./data\.py:Net"),
    ):
        (tmp_path / f"{top}.py").write_text("class Net: pass")
        with pytest.raises(ConfigError, match=f"^model.target: {top}:Net: {says}"):
            check_targets_exist({"model": {"kind": "external", "target": f"{top}:Net"}})
    (tmp_path / "my_net.py").write_text("class Net: pass")
    check_targets_exist({"model": {"kind": "external", "target": "my_net:Net"}})
    assert sys.path[-1] == str(tmp_path)
