"""The drill: a configuration runs to its end untouched, and again while it is killed; every bit is compared. No jax.

    plan.py          WHERE to kill: pure, from a seed and from what the uninterrupted run did when
    attack.py        a real process, watched through its pulse and killed at the chosen moment
    evidence.py      WHAT differs: every array, the position of the data, every line of the log
    diagnose.py      WHY, probably: pure reasoning over that
    picture.py       both curves, one on top of the other

`runner/drill/drill_verb.py` puts them in order: `python -m runner drill`.
"""
