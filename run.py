"""Train, resume, sweep: Hydra composes, the configuration is validated, and the outcome becomes an exit code.

python run.py                                        # the default experiment
python run.py ckpt=combined remat=attention_only     # choose by name; type it again to resume
python run.py hydra/launcher=slurm …                 # the same as a Slurm job; with -m as a job array
python run.py --help                                 # what there is to choose
"""

import sys

from runner.launch.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()
    # Not before: what a process has imported by then, it imports twice.
    from runner.launch.main import exit_process, main

    exit_process(main(sys.argv[1:]))
