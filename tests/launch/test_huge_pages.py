"""A run has its memory in huge pages, unless somebody has chosen otherwise; and the bits are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.launch import huge_pages
from runner.launch.huge_pages import are_offered, are_wanted
from tests.conftest import REPO

needs_huge_pages = pytest.mark.skipif(not are_offered(), reason="this system gives no huge pages on request")
# Started as run.py is: what it prints is the process that works on the run.
PROGRAM = """
import os, sys
sys.path.insert(0, {repo!r})
from runner.launch.huge_pages import restart_with_huge_pages
{before}
restart_with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:], sys.flags.utf8_mode)
"""


def say_what_works(tmp_path: Path, before: str = "", **environment: str) -> tuple[int, list[str]]:
    """Start the program; return its process number, and what it prints."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(repo=str(REPO), before=before))
    clean = {name: value for name, value in os.environ.items() if are_wanted({name: value})}
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", str(script), "two words", "a=1"],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    said, _ = process.communicate()
    assert process.returncode == 0
    return process.pid, said.split()


@needs_huge_pages
def test_the_process_keeps_its_number_and_its_words(tmp_path: Path) -> None:
    number, said = say_what_works(tmp_path)
    assert said == [str(number), "glibc.malloc.hugetlb=1", "two", "words", "a=1", "1"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOLDFAST_HUGE_PAGES", "off"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2"),
        ("MALLOC_ARENA_MAX", "2"),
        ("LD_PRELOAD", "libtcmalloc.so.4"),
    ],
)
def test_who_has_chosen_is_left_alone(name: str, value: str) -> None:
    assert are_wanted({"PATH": "/bin", name: ""})
    assert not are_wanted({"PATH": "/bin", name: value})


@needs_huge_pages
@pytest.mark.parametrize(
    "before",
    [
        "sys.settrace(lambda *_: None)",
        "sys.setprofile(lambda *_: None)",
        pytest.param(
            "sys.monitoring.use_tool_id(sys.monitoring.DEBUGGER_ID, 'one')",
            marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="came with Python 3.12"),
        ),
    ],
)
def test_a_debugger_keeps_its_process(tmp_path: Path, before: str) -> None:
    _, said = say_what_works(tmp_path, before)
    assert said[1] == "None"


@pytest.mark.parametrize(
    ("setting", "library", "offered"),
    [
        ("always [madvise] never", "glibc 2.36", True),
        ("[always] madvise never", "glibc 2.36", False),
        ("always madvise [never]", "glibc 2.36", False),
        ("always [madvise] never", "glibc 2.34", False),
        ("always [madvise] never", "musl 1.2.5", False),
        ("always [madvise] never", "", False),
        (None, "glibc 2.36", False),
    ],
)
def test_a_system_offers_them_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None, library: str, offered: bool
) -> None:
    kernel = tmp_path / "enabled"
    if setting is not None:
        kernel.write_text(setting + "\n")
    monkeypatch.setattr(huge_pages, "KERNEL_SETTING", kernel)
    monkeypatch.setattr(os, "confstr", lambda name: library)
    assert are_offered() == offered


@needs_huge_pages
def test_a_program_that_calls_a_run_is_not_started_again(tmp_path: Path) -> None:
    _, said = say_what_works(tmp_path, "sys.argv = ['run.py', 'a=1']")
    assert said[1] == "None"


@needs_huge_pages
def test_a_run_has_them(tmp_path: Path) -> None:
    """The kernel says so of the memory of a process that `python run.py` became."""
    clean = {name: value for name, value in os.environ.items() if are_wanted({name: value})}
    # Hydra prints what it composed, once the search path is ready: no training is needed to see the environment.
    looking = "import os, sys; sys.stderr.write(os.environ.get('GLIBC_TUNABLES', 'none'))"
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(looking)
    command = [sys.executable, str(REPO / "run.py"), "--cfg", "job"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**clean, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stderr == "noneglibc.malloc.hugetlb=1"
