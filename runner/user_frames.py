"""Say in one line what a user's own code raised, and the last place of it that is in a file of his."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

from runner.installation import OWN_PACKAGES, PACKAGE
from runner.text import display_path, shorten

MAX_SAID = 300


def explain_raised(error: BaseException, place: str) -> str:
    """Return what a user's code raised, where, and how to see all of it."""
    return f"{describe_error(error)} ({place}); HYDRA_FULL_ERROR=1 shows the whole traceback"


def describe_error(error: BaseException) -> str:
    """Return the type of an error and the first line of what it says: `KeyError: 'loss'`."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {shorten(said, MAX_SAID)}"


def find_user_frame(error: BaseException) -> str | None:
    """Return the last place of a traceback that is in nobody's library: `net.py, line 12`; None where there is none."""
    libraries = (*map(os.path.realpath, (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"])),)
    own = tuple(str(PACKAGE.parent / name) + os.sep for name in OWN_PACKAGES)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and not os.path.realpath(frame.filename).startswith((*libraries, *own))
        and os.path.basename(frame.filename) not in ("run.py", "holdfast")
    ]
    return f"{display_path(Path(frames[-1].filename))}, line {frames[-1].lineno}" if frames else None
