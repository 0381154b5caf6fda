"""How often Python looks for garbage. Importing and tracing make a million objects and next to none of it: looking for
some each 700 new ones, as usual, takes a fifth of the processor time of a restart (measured). No jax.
"""

import gc

USUAL = gc.get_threshold()
SELDOM = (100_000, *USUAL[1:])  # still bounded; and nothing large is overdue when it is as usual again


def seldom() -> None:
    """While a process starts."""
    gc.set_threshold(*SELDOM)


def as_usual() -> None:
    """While it trains: what garbage holds there may be large."""
    gc.set_threshold(*USUAL)
