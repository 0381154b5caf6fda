"""What is done with runs after they were made, one file a verb: `python -m runner VERB …`.

A verb's module says which arguments it takes, in `arguments(parser)`, and does its work in `run(arguments, say)`: what
it says is for a person, what it returns is the same as data, for `--json`. To add one: a module here, and a line in the
table of runner/__main__.py.

    place.py settings.py text.py    what verbs share: runs and checkpoints by name, what was chosen for a run, tables
    rerun.py                        when `supervise` runs a command again
    account.py timeline.py          what goodput adds up, and draws
    card.py load.py                 the page beside exported weights; `from runner import load`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any



