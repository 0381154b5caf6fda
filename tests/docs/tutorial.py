"""Execute docs/tutorial.ipynb in a kernel of its own: `python -m tests.docs.tutorial --write` keeps what it shows."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.conftest import REPO

NOTEBOOK = REPO / "docs/tutorial.ipynb"
HANG_SECONDS = 600


def read_notebook() -> NotebookNode:
    """Return the notebook as it is committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


def execute_notebook(
    notebook: NotebookNode, cwd: Path, watch: Callable[[AsyncKernelManager], None] = lambda kernel: None
) -> None:
    """Execute every cell in this directory, in place. Raises where a cell does. `watch` is told of the kernel before."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPO),
        # Nothing of a home directory is read or written.
        "IPYTHONDIR": str(cwd / ".ipython"),
        "MPLCONFIGDIR": str(cwd / ".matplotlib"),
    }
    with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
        # Through sockets of this machine, whatever a configuration of Jupyter says.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=f"{sockets}/kernel.json")
        resources = {"metadata": {"path": str(cwd)}}
        client = NotebookClient(notebook, km=kernel, timeout=HANG_SECONDS, record_timing=False, resources=resources)

        async def execute_and_end() -> None:
            try:
                await client.async_execute(env={**os.environ, **environment})
            finally:
                await kernel.shutdown_kernel(now=True)

        watch(kernel)
        asyncio.run(execute_and_end())


def join_streams(notebook: NotebookNode) -> None:
    """Put what a cell printed piece by piece into one output, and drop what the next execution would change."""
    for cell in notebook.cells:
        joined: list[NotebookNode] = []
        for output in cell.get("outputs", ()):
            if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        if cell.cell_type == "code":
            cell.outputs = joined
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main() -> None:
    """Execute it anew and write it."""
    notebook = read_notebook()
    with tempfile.TemporaryDirectory() as folder:
        execute_notebook(notebook, Path(folder))
    join_streams(notebook)
    if sys.argv[1:] == ["--write"]:
        nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
