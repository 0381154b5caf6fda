"""Tell how a run of several processes ended to the script that started them with srun. No jax.

srun tells the highest exit code of all tasks. Where one was killed (137), that hides the word of the run itself, which
its process 0 has: 75, stopped with its state saved.
"""

from __future__ import annotations

import os
from contextlib import suppress

# The environment variable that the recipe sets: the file in which it reads the exit code of process 0.
EXIT_CODE_FILE = "HOLDFAST_EXIT_CODE_FILE"


def tell_exit_code(code: int) -> None:
    """Write the exit code where a script waits for it, if this is process 0. The last thing before the process ends."""
    path = os.environ.get(EXIT_CODE_FILE)
    # By Slurm's own word: a process may end before the run knows who leads.
    if path and os.environ.get("SLURM_PROCID", "0") == "0":
        # Then the script goes by what srun says.
        with suppress(OSError), open(path, "w") as out:
            out.write(f"{code}\n")
