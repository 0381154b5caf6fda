"""A shell in a Slurm that is gone when it is left: `python -m tests.slurm`, or with a command to run in it."""

import subprocess
import sys

from tests.slurm import cluster, lacking

if reason := lacking():
    sys.exit(reason)
with cluster() as slurm:
    command = sys.argv[1:] or ["bash", "--norc"]
    code = subprocess.run(command, env={**slurm.environment, "PS1": "slurm$ "}).returncode
sys.exit(code)
