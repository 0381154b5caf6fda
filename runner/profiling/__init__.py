"""What the device did in some steps, one by one: traces of `jax.profiler`, taken while a run trains, and what they say.

options.py         the option `profile=`
window.py          which steps are traced: a pure function
step_profiler.py   starts and ends a trace between two steps; looks for the file RUN/PROFILE
operations.py      what kind of work an operation is, from the text of the compiled step
trace_summary.py   a trace becomes shares of matrix products, copies, collectives and idle time
profile_record.py  RUN/profile/FIRST-LAST: the trace with profile.json, there as a whole or not at all
"""
