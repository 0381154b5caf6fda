"""What a wheel is made of, how a program starts its own runs, and the command `holdfast`. tests/laws/test_wheel.py installs one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner import installation
from tests.conftest import HANG_SECONDS, REPO

# The packages of the wheel and the files in each, as setuptools finds them; nothing is built or written.
FIND_FILES = """
import json, setuptools
from distutils.core import run_setup
found = run_setup("setup.py", stop_after="config")
found.include_package_data = False  # else a manifest is written beside the sources
build = found.get_command_obj("build_py")
build.ensure_finalized()
print(json.dumps({package: [f"{source}/{file}" for file in files] for package, source, _, files in build.data_files}))
"""


def run_python(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


def run_holdfast(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.pop(0); from runner.__main__ import run_console_script; run_console_script()"
    return run_python("-c", code, *words, cwd=cwd, **environment)


# --- what is in a wheel ---


@pytest.fixture(scope="module")
def packaged() -> dict[str, list[str]]:
    done = run_python("-c", FIND_FILES, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_wheel_has_every_choice(packaged: dict[str, list[str]]) -> None:
    shipped = {Path(name).relative_to("conf") for name in packaged["runner.conf"]}
    assert shipped == {path.relative_to(REPO / "conf") for path in (REPO / "conf").rglob("*") if path.is_file()}


def test_the_wheel_has_every_package_and_no_more(packaged: dict[str, list[str]]) -> None:
    """Each folder with Python files is a package; one that is none would be left out without a word."""
    folders = {
        path.parent.relative_to(REPO).as_posix().replace("/", ".")
        for name in ("runner", "models", "data")
        for path in (REPO / name).rglob("*.py")
    }
    assert packaged.keys() == {*folders, "runner.conf"}


def test_the_wheel_has_what_is_no_python(packaged: dict[str, list[str]]) -> None:
    others = {
        path.relative_to(REPO).as_posix()
        for name in ("runner", "models", "data")
        for path in (REPO / name).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert {name for files in packaged.values() for name in files if not name.startswith("conf/")} == others


# --- how a program starts its own runs ---


def test_a_checkout_starts_its_own_run_py(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.find_product_conf() == REPO / "conf"
    assert installation.find_run_program() == (str(REPO / "run.py"),)
    monkeypatch.setattr(sys, "argv", [str(REPO / "runner/__main__.py")])
    assert installation.find_typed_program() == (str(REPO / "run.py"),)


def test_an_installed_package_starts_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside it in site-packages is somebody else's."""
    for name in ("runner/conf/config.yaml", "conf/config.yaml", "run.py", "bin/holdfast"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "runner")
    assert installation.find_product_conf() == tmp_path / "runner/conf"
    assert installation.find_run_program() == ("-P", "-m", "runner.launch")
    for argv, words in (
        (tmp_path / "bin/holdfast", (str(tmp_path / "bin/holdfast"),)),
        (tmp_path / "runner/launch/__main__.py", ("-P", "-m", "runner.launch")),
        ("-c", ("-P", "-m", "runner.launch")),
    ):
        monkeypatch.setattr(sys, "argv", [str(argv)])
        assert installation.find_typed_program() == words


@pytest.mark.parametrize("marker", [[], ["__init__.py"]])
def test_packages_of_the_same_name_do_not_hide_ours(marker: list[str], tmp_path: Path) -> None:
    for package in ("data", "models"):
        (tmp_path / package).mkdir()
        for name in marker:
            (tmp_path / package / name).touch()
    for words in (("-m", "runner", "ls", "--help"), ("-m", "runner", "model", "model=mlp", "data=digits")):
        done = run_python(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = run_python("-P", "-m", "runner.launch", "--cfg", "job", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr


# --- the command ---


def test_holdfast_is_a_run_or_a_verb(tmp_path: Path) -> None:
    overview = run_holdfast("--help", cwd=tmp_path)
    assert "Groups (GROUP=OPTION):" in overview.stdout
    assert run_holdfast("model=mlp", "data=digits", "--cfg", "job", cwd=tmp_path).stdout.startswith(
        "model:\n  kind: mlp"
    )
    assert run_holdfast("recipe", cwd=tmp_path).stdout.startswith("jobset")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("model=mpl",), 2, "error: model: got mpl; expected one of"),
        (("ls", "nowhere"), 3, "error: nowhere: there is no such directory"),
        (("vreify", "RUN"), 2, "error: unknown verb 'vreify'; did you mean verify?"),
    ],
)
def test_holdfast_answers_a_mistake_in_one_line(words: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    done = run_holdfast(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert done.stderr.startswith(says)


def test_whoever_reads_the_help_may_leave(tmp_path: Path) -> None:
    done = run_python(
        "-c",
        f"""
import os, subprocess, sys
read, write = os.pipe()
os.close(read)
sys.exit(subprocess.run([sys.executable, {str(REPO / "run.py")!r}, "--help"], stdout=write).returncode)
""",
        cwd=tmp_path,
    )
    assert (done.returncode in (0, 141), done.stderr) == (True, "")
