"""Runs as one page of HTML, which needs no network: facts from their directories, and how they are drawn.

    facts.py           what the files of a run say, as frozen values
    config_diff.py     what differs between runs, in as few columns as tell them apart
    remat_tradeoff.py  memory against time and FLOPs, where runs differ in what they recompute
    run_table.py       the table of runs
    script_data.py     what the scripts of the page draw, in few bytes
    page.py            facts become the page; template/ is what it looks like
    report_verb.py     `python -m runner report`

There is no plotting library in it: a page of six runs would be fifty times as large with one. The browser draws lines
from the facts, in SVG, in the colours of its own light or dark style; Jinja2 escapes every name that came from a disk.
"""
