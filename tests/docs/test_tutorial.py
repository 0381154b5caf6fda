"""The tutorial notebook runs as it is committed, and what it shows is of no machine."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from nbformat import NotebookNode

from tests.conftest import REPO, Door
from tests.docs.pages import PAGES, find_blocks
from tests.docs.tutorial import NOTEBOOK, execute_notebook, join_streams, read_notebook


def list_output_kinds(notebook: NotebookNode) -> list[list[str]]:
    """Return what each cell of code shows: streams by their names, results by their richest type."""
    return [
        [output.get("name") or min(output.data) for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_it_runs_and_shows_what_it_says(tmp_path: Path) -> None:
    """Its cells can be executed once more in the same directory, where the runs are finished."""
    committed, notebook = read_notebook(), read_notebook()
    execute_notebook(notebook, tmp_path)
    join_streams(notebook)
    assert list_output_kinds(notebook) == list_output_kinds(committed)
    shown = [
        output.get("text") or output.data["text/plain"] for cell in notebook.cells for output in cell.get("outputs", ())
    ]
    assert "finished, step=300" in shown[2]
    assert shown[-1].startswith("told: [0 1 2 3")
    assert len([*tmp_path.glob("outputs/*/*/config.yaml")]) == 3


def test_its_outputs_are_kept_and_are_of_no_machine() -> None:
    text, notebook = NOTEBOOK.read_text(), read_notebook()
    assert NOTEBOOK.stat().st_size < 60_000
    assert all(list_output_kinds(notebook))
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    prose = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(home|tmp|root|work|usr|Users)/|\.local|https?://", prose)
    assert socket.gethostname() not in prose
    assert getpass.getuser() not in prose


def test_the_programs_of_its_page_run(door: Door) -> None:
    train, rates = (block for block in find_blocks(PAGES["docs/python.md"]) if block.language == "python")
    said = {}
    for block in (train, rates):
        (door.cwd / block.file).write_text(block.text)
        command = [sys.executable, block.file]
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=door.cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        said[block.file] = done.stdout.splitlines()
    assert said[train.file][-5].startswith("finished 200 0.")
    assert [line.split()[0] for line in said[train.file][-4:]] == ["50", "100", "150", "200"]
    assert re.match(r"2 optim\.lr: ", said[rates.file][0])
    assert said[rates.file][1] == "['finished', 'diverged']"
