"""Measure how easy the product's code is to walk through, and print the figures as one table.

    python -m tests.house                             # the table: measured now, measured once, wanted
    python -m tests.house --list ROW                  # what a row counts, as file:line name
    python -m tests.house --list ROW runner/train     # … in these files and folders alone
    python -m tests.house runner/train                # the rows that mean something for a part of the code
    python -m tests.house --root ../other             # another checkout

The figures are there to be looked at. A figure reached by a trick (a file cut in two at line 399, a comment that says
what the line below says) is a fault, and nothing here can see it.

Everything is read from the source text with `ast` and `tokenize`: nothing is imported, so the tool also measures code
that does not run. Product code is `run.py` and all of `runner/`, `models/` and `data/`; tests and docs are not.

Words
    room: a folder with Python files or a single Python file directly in `runner/`, and `models`, `data`, `run`.
    arrow: one room imports another, however often; imports in functions and for types alone count too.
    per 1,000 lines: of the lines that are not blank, docstrings and comments included.

Rows
    frames: how deep the stack is where a step is called and where it is traced. The real stack is counted by a test.
    road: distinct names of ours in the functions from `run.py` to the step (`road.ROADS`). A name of ours is a bare name
        that its module imports from the product or defines at its top level (a function, class or constant), or an
        attribute called like a top-level function or class of the product (`build.describe`). Locals, parameters,
        annotations, methods and fields do not count.
    rooms: how many rooms there are.
    floors: the longest path along the arrows, counted in rooms, without those that run back up.
    arrows: pairs of rooms.
    back: the arrows that run up the order of the `layers` contract in pyproject.toml. In a knot that no contract
        orders, the fewest arrows that must go to untie it (exact up to 16 rooms).
    knot: the largest number of rooms that all reach each other along arrows.
    one-word: functions, methods included and dunder methods not, whose name is a single word (leading underscores apart).
    riddles: of the docstrings of functions, those that open with What, Whether, How, Where, Why, Which, When, Who, A, An,
        As, One or The same: they are no sentence, or need another docstring.
    comments: lines that hold a comment and nothing else, without shebangs and orders to tools (noqa, type:).
    lazy: imports of the product inside functions; one for each module imported.
    names: functions and classes at the top level of modules, of the same name in three or more files.
    classes: class names that are defined more than once, nested classes included.
    files: file names (without folder) that are used more than once, `__init__` and `__main__` apart.
    renames: imports of the product under another name (`import build as building`).
    readme: lines of README.md.
    any: mentions of `Any`, imports apart.
    long-functions, long-files: over 80 and over 400 lines, all lines counted.
    parameters: functions that take more than 6, `self` and `cls` apart.
    fields: dataclasses with 14 or more fields of their own.
    stars: literals unpacked in a literal or call (`*(a, b)`), which only please a formatter.

The column "was" is the code before it was put in order, mostly measured by another script. On that code this tool gives
the same figures, except: 17 floors and 9 arrows back where it was 16 and 13 (there an order chosen by hand told what is
up, here the best order does), 5.0 imports in functions where it was 5.4, 29 names where it was 28. The rows renames,
parameters, fields and stars were measured by this tool alone.

A row becomes a law, which a test enforces, when its key is in `table.LAWS`.
"""
