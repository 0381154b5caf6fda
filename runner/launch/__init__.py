"""Many runs, and runs that are sent elsewhere.

plugin.py     what Hydra's sweepers call: composes every job, and refuses them all or hands them on
members.py    the runs of a sweep: which there are, what differs between them, how each stands
share.py      which cores and devices each of several runs beside each other gets
local.py      one process a run, some at a time; retries, signals, stragglers
table.py      what a person sees meanwhile · summary.py  sweep.json and results.csv
search.py     a search: what was suggested for each trial, kept beside the runs · sweeper.py  Optuna, through Hydra
slurm.py      a run as one Slurm job · array.py  a sweep as one job array · jobs.py  what Slurm has of ours already
"""
