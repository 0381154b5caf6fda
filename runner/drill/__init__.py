"""Kill a configuration while it runs, and compare every bit with what it does untouched. No jax.

kill_plan.py     where to kill: pure, from a seed and from what the uninterrupted run did when
kill_process.py  a real process, watched through its heartbeat and killed at the chosen moment
compare_runs.py  what differs: every array, the position of the data, every line of the log
diagnosis.py     why, probably: pure reasoning over that
drill_result.py  the verdict, for a person and as data
drill_plot.py    both curves, one on top of the other
drill_verb.py    all of that in order: `python -m runner drill`
"""
