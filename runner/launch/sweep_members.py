"""The runs of a sweep: what differs between them, how each stands on disk, and the files that say so."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runner import files
from runner.config.schema import Config
from runner.errors import CRASHED, STOPPED, ConfigError
from runner.launch.child_process import describe_signal
from runner.launch.restart_policy import has_lost_process
from runner.rundir.layout import RunDir
from runner.rundir.run_lock import is_in_use
from runner.session.standing import is_finished
from runner.text import display_path, mask_unprintable

SWEEP_JSON, RESULTS_CSV = "sweep.json", "results.csv"
# A spreadsheet computes a cell that begins like this, and a formula may open a page or start a program.
FORMULA_STARTS = ("=", "+", "-", "@")

MemberState = Literal["waiting", "queued", "running", "finished", "stopped", "failed", "in use"]


@dataclass(frozen=True)
class SweepMember:
    """One run of a sweep.

    Attributes:
        config: its configuration.
        words: what is typed for it after `python run.py`.
        run_dir: where it lives.
        distinguishing: the overrides that not every run of the sweep has.
    """

    config: Config
    words: tuple[str, ...]
    run_dir: RunDir
    distinguishing: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its distinguishing overrides in one text: `ckpt=best remat=full`."""
        return " ".join(self.distinguishing) or self.run_dir.path.name

    def read_status(self) -> dict[str, Any]:
        """Return its status.json; empty where there is none."""
        return self.run_dir.read_status()

    @property
    def is_finished(self) -> bool:
        """True if nothing is left to do."""
        return is_finished(self.config, self.run_dir, self.read_status())


@dataclass(frozen=True)
class MemberResult:
    """How a run of a sweep stands, or ended.

    Attributes:
        state: in one word.
        tries: how many processes worked on it.
        seconds: how long all of these took.
        code: the exit code of the last one; -N where signal N killed it.
        why: the reason, where it is not finished.
        job: the Slurm job that has it, and how that stands.
    """

    state: MemberState
    tries: int = 0
    seconds: float = 0.0
    code: int | None = None
    why: str = ""
    job: str = ""


def find_distinguishing_overrides(jobs: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return for each job the overrides that not every job has, in the order they were typed."""
    shared = set(jobs[0]).intersection(*jobs[1:]) if jobs else set()
    return [tuple(word for word in job if word not in shared) for job in jobs]


def refuse_duplicates(members: Sequence[SweepMember]) -> None:
    """Raise ConfigError where two members are one run, or work in one directory."""
    seen: dict[Path, SweepMember] = {}
    for member in members:
        before = seen.setdefault(member.run_dir.path, member)
        if before is not member:
            jobs = " and ".join(" ".join(each.words) for each in (before, member))
            raise ConfigError(f"{jobs} are one run, {display_path(member.run_dir.path)}; leave one of them out")


def classify_exit(member: SweepMember, code: int, last_line: str) -> tuple[MemberState, str]:
    """Return how a process ended, and why: from its exit code, and from what it wrote down or printed last."""
    status = member.read_status()
    if code == 0:
        # The run's own word, where it was expected: an exit code alone may be that of another one.
        if member.is_finished or member.config.train.steps == 0:
            return "finished", ""
        where = display_path(member.run_dir.path)
        return "failed", f"its process ended well, but {where} is {status.get('state', 'not there')}"
    if has_lost_process(code, status):
        return "failed", status.get("why") or "one of its processes has gone"
    if code == STOPPED:
        return "stopped", status.get("why") or "stopped with its state saved"
    if code < 0:
        return "failed", f"died of {describe_signal(-code)}"
    # status.json goes first: jax prints a note of its own below a traceback.
    if code == CRASHED and status.get("state") == "failed":
        return "failed", status.get("why") or f"exit code {code}"
    last = last_line.strip().splitlines()[-1] if last_line.strip() else ""
    # The text is looked at as well: whoever had the run may have let go since.
    if is_in_use(member.run_dir) or "in use by" in last:
        return "in use", last.removeprefix("error: ")
    return "failed", last.removeprefix("error: ") or f"exit code {code}"


def sweep_folder(members: Sequence[SweepMember]) -> Path:
    """Return where the sweep of these runs is written down: the same for the same runs, in any order."""
    names = sorted(str(member.run_dir.path) for member in members)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return members[0].run_dir.path.parent / ".sweep" / digest


def write_results(folder: Path, members: Sequence[SweepMember], results: Sequence[MemberResult]) -> None:
    """Write sweep.json and results.csv, each replaced in one move."""
    rows = [_result_row(member, result) for member, result in zip(members, results, strict=True)]
    files.make_folder(folder)
    files.replace_file(folder / SWEEP_JSON, files.format_json({"runs": rows}, indent=1) + "\n")
    keys = list(dict.fromkeys(key for row in rows for key in row["own"]))
    facts = ("state", "step", "score", "best_step", "best_value", "seconds", "peak_memory_bytes", "tries", "why")
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow([_format_cell(name) for name in ("directory", *keys, *facts)])
    for row in rows:
        cells = [row["directory"], *(row["own"].get(key) for key in keys), *(row[fact] for fact in facts)]
        table.writerow([_format_cell(cell) for cell in cells])
    files.replace_file(folder / RESULTS_CSV, out.getvalue())


def _format_cell(value: object) -> object:
    """Return what stands in a cell of a table; a text that a spreadsheet takes for a formula begins with a quote."""
    if not isinstance(value, str):
        return value
    shown = mask_unprintable(value)
    return f"'{shown}" if shown[:1] in FORMULA_STARTS and not _is_number(shown) else shown


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _result_row(member: SweepMember, result: MemberResult) -> dict[str, Any]:
    status = member.read_status()
    best = status.get("best") or {}
    pairs = [word.partition("=") for word in member.distinguishing]
    return {
        "directory": display_path(member.run_dir.path),
        "own": {key.lstrip("+~"): value for key, _, value in pairs},
        "state": result.state,
        "step": status.get("step", 0),
        "score": status.get("score"),
        "best_step": best.get("step"),
        "best_value": best.get("value"),
        "seconds": round(result.seconds, 3),
        "peak_memory_bytes": status.get("attempt", {}).get("peak_memory_bytes"),
        "tries": result.tries,
        "code": result.code,
        "why": result.why,
        "job": result.job,
    }
