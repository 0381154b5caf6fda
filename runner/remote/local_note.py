"""remote.json: what this machine knows of the run's other place, written beside the run and never sent there. No jax.

It says which hold on the run the files here were made under. Where the bucket names the same hold, nobody has worked on
the run since, and what is here goes on from what is there. Where it names another, the files here are of a branch that
was left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from runner import files
from runner.rundir.layout import RunDir
from runner.rundir.side_files import is_count, is_number, is_text, keep_typed, list_of, or_null

TierState = Literal["local", "uploading", "remote"]


@dataclass(frozen=True)
class LocalNote:
    """Hold what is known of a run's other place.

    Attributes:
        url: the place.
        token: of the hold under which the files here were made.
        next_token: of the hold that was about to be taken; a kill may have come between that and the next line.
        steps: the checkpoints that are whole there.
        uploading: the one that is on its way; None for none.
        trouble: why the place is behind; empty where nothing is wrong.
        upload_seconds: what the newest upload of a checkpoint took; 0.0 for none.
        requests: how many requests the last attempt has made, by kind.
        hours: in how many hours of work.
    """

    url: str
    token: str = ""
    next_token: str = ""
    steps: tuple[int, ...] = ()
    uploading: int | None = None
    trouble: str = ""
    upload_seconds: float = 0.0
    requests: Mapping[str, int] | None = None
    hours: float = 0.0

    @property
    def newest(self) -> int | None:
        """Return the newest step that is there; None where none is."""
        return max(self.steps, default=None)

    def state_of(self, step: int) -> TierState:
        """Return where a checkpoint of this machine lies."""
        return "remote" if step in self.steps else "uploading" if step == self.uploading else "local"


CHECKS = {
    **dict.fromkeys(("url", "token", "next_token", "trouble"), is_text),
    "steps": list_of(is_count),
    "uploading": or_null(is_count),
    **dict.fromkeys(("upload_seconds", "hours"), is_number),
    "requests": lambda value: value is None or (isinstance(value, dict) and all(map(is_count, value.values()))),
}


def read_note(run_dir: RunDir) -> LocalNote | None:
    """Return what is known of a run's other place; None where it has none, or where its bytes say nothing."""
    try:
        document = files.read_json_object(run_dir.remote_note)
    except OSError:
        return None
    if document is None:
        return None
    known = keep_typed({key: value for key, value in document.items() if key in CHECKS}, CHECKS)
    if "url" not in known:
        return None
    return LocalNote(**{**known, "steps": tuple(known.get("steps", ()))})


def write_note(run_dir: RunDir, note: LocalNote, *, durable: bool) -> None:
    """Replace what is known of a run's other place. Raises OSError."""
    files.replace_file(run_dir.remote_note, files.format_json(asdict(note), indent=1) + "\n", durable=durable)
