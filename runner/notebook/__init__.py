"""Holdfast from a notebook or a program: `run` and `sweep` work in a process of their own and return what came of it.

from_python.py    a call becomes a process, whose lines are shown as they come; an interrupt is a polite stop
run_result.py     what came of a run, its measurements as arrays; the error where nothing good did
stale_modules.py  a model of one's own whose file was edited after its import is refused
"""
