"""In a real kernel: lines come into the cell, an interrupt saves, and the same cell goes on bit for bit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from jupyter_client.manager import AsyncKernelManager
from nbformat.v4 import new_code_cell, new_notebook

from tests.conftest import SMALL, Door, assert_same, last_logged
from tests.docs.tutorial import execute_notebook, join_streams

WORDS = [*SMALL, "ckpt=periodic", "ckpt.save.periodic.steps=10", "train.steps=200"]


def test_an_interrupted_cell_goes_on_when_it_is_executed_again(door: Door, untouched: Callable[..., Door]) -> None:
    """Also beside a jax that the kernel itself uses, whose threads a fork would not survive."""
    reference = untouched(*WORDS)
    cell = f"result = run({WORDS!r}); print(result.ending, result.step)"
    first = f"import jax; from holdfast import run; jax.numpy.ones(3).sum().block_until_ready(); {cell}"
    notebook = new_notebook(cells=[new_code_cell(first), new_code_cell(cell)])

    def interrupt(kernel: AsyncKernelManager) -> None:
        while last_logged(door.cwd) < 20:
            time.sleep(0.002)
        # As jupyter's own square does: the whole group of the kernel gets it.
        os.killpg(os.getpgid(kernel.provisioner.pid), signal.SIGINT)

    thread = None

    def watch(kernel: AsyncKernelManager) -> None:
        nonlocal thread
        thread = threading.Thread(target=interrupt, args=(kernel,))
        thread.start()

    execute_notebook(notebook, door.cwd, watch)
    assert thread is not None
    thread.join()
    join_streams(notebook)
    told = [output.text for cell in notebook.cells for output in cell.outputs]
    # One stream a cell: stdout, in which both of the run's are in order. Nothing is warned of.
    assert len(told) == 2
    assert "SIGINT: saving at the next step boundary" in told[0]
    assert "preempted" in told[0].splitlines()[-1]
    assert "\x1b" not in told[0]
    assert "restored step" in told[1]
    assert told[1].splitlines()[-1] == "finished 200"
    assert_same(door.the_run, reference.the_run, 200)
