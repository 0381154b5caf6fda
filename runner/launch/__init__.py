"""From a command line to runs: one here, many beside each other, or jobs that are left to a cluster.

huge_pages.py      memory in pages of 2 MB: before anything else
main.py            the way in: compose → run → exit code
compose.py         a command line becomes validated values (command_line.py) · hydra_errors.py  Hydra's complaints
hydra_plugin.py    what Hydra's sweepers hand their jobs to
sweep.py           a sweep from beginning to end · sweep_members.py  its runs · status_table.py  what a person sees
local_sweep.py     the runs on this machine, some beside each other · child_process.py  one process of these
study.py           a search: what was suggested for each trial · optuna_sweeper.py  Optuna, through Hydra
slurm_job.py       a run as one Slurm job · slurm_array.py  a sweep as job arrays · slurm_queue.py  what Slurm has
submitit_sweep.py  a sweep through hydra-submitit-launcher
supervise.py       run a command again until it is done · restart_policy.py  when, and when not
recipe.py          files that make a scheduler do so
"""
