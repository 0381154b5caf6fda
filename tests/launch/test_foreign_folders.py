"""Files beside the runs, of sweeps and searches: what somebody else has put there is not believed, followed or run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from runner.config.schema import validate_config
from runner.errors import RefusedError
from runner.launch import sweep_members
from runner.launch.local_sweep import read_last_line
from runner.launch.slurm_job import SlurmOptions
from runner.launch.slurm_queue import RUN_MARK, _read_marks
from runner.launch.study import STUDY_JSON, SearchOptions, Study
from runner.launch.sweep_members import RESULTS_CSV, MemberResult, SweepMember
from runner.rundir.layout import RunDir
from tests.config.test_config import changed


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    """A reason, a metric and a word of a run come from a disk; a spreadsheet computes what begins with = + - @."""
    config = validate_config(changed())
    words = ("a==1+1", "b=-0.5", "c=@SUM(1)", "d=+1e-3", "e=x\x1b[2J", "=evil=1", "f=-1+1")
    member = SweepMember(config, words, RunDir(tmp_path / "run"), words)
    sweep_members.write_results(tmp_path, [member], [MemberResult("failed", why='=HYPERLINK("x")')])
    head, row = csv.reader((tmp_path / RESULTS_CSV).read_text().splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells["why"] == '\'=HYPERLINK("x")'
    assert (cells["a"], cells["c"], cells["f"]) == ("'=1+1", "'@SUM(1)", "'-1+1")
    # Numbers stay what they are.
    assert (cells["b"], cells["d"]) == ("-0.5", "+1e-3")
    assert cells["e"] == "x·[2J"
    assert all(not name.startswith(("=", "+", "-", "@")) for name in head)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"trials": 7}', b'{"trials": [1]}', b"{}", b"\xff", b"[" * 20_000, b'{"trials": ' + b"9" * 5000],
)
def test_a_search_whose_file_is_none_is_refused_and_not_begun_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / STUDY_JSON).write_bytes(content)
    with pytest.raises(RefusedError, match="study.json: is not what a search writes") as caught:
        Study(tmp_path, SearchOptions(), "minimize", ["optim.lr=0.1"])
    assert len(str(caught.value).splitlines()) == 1
    assert (tmp_path / STUDY_JSON).read_bytes() == content


def test_a_search_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps({"trials": [{"optim.lr": "0.1"}]}))
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / STUDY_JSON).symlink_to(outside)
    with pytest.raises(RefusedError, match="is not what a search writes"):
        Study(tmp_path / "study", SearchOptions(), "minimize", ["optim.lr=0.1"])


@pytest.mark.parametrize(
    "line",
    [
        *("--output x", "--output=x", "--outpu=x", "--array 1-3", "--requeue", "--sig=B:USR2@1", "--nodes 2"),
        *(
            "--comment=a --output=x",
            "--comment a b",
            "-o x",
            "now",
            "--",
            "--comment='x",
            "--comment=a\nb",
            "--a\x1b[2J",
            "",
        ),
    ],
)
def test_a_line_for_sbatch_is_one_option_and_none_of_ours(line: str) -> None:
    with pytest.raises(ValueError, match="sbatch: "):
        SlurmOptions(sbatch=[line])


@pytest.mark.parametrize(
    "line", ["--constraint=h100", "--comment='a b'", "--comment x", "--exclusive", "--mail-type=END"]
)
def test_an_option_for_sbatch_may_be_any_other(line: str) -> None:
    assert SlurmOptions(sbatch=[line]).sbatch_options() == [line]


def test_a_script_of_a_job_may_hold_anything(tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    for content in (b"\xff", f"{RUN_MARK}- 7\n".encode(), f"{RUN_MARK}- {{}}\n".encode(), f"{RUN_MARK}-".encode()):
        script.write_bytes(content)
        assert _read_marks(script) == {}
    (tmp_path / "outside").write_text(f'{RUN_MARK}- "/somewhere"\n')
    script.unlink()
    script.symlink_to(tmp_path / "outside")
    assert _read_marks(script) == {}


def test_what_a_run_prints_goes_through_no_link(tmp_path: Path) -> None:
    from runner.launch.local_sweep import MachineShare, _start_member

    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    run: dict[str, Any] = {"config": validate_config(changed()), "words": ("pass",), "distinguishing": ()}
    member = SweepMember(run_dir=RunDir(tmp_path / "run"), **run)
    (tmp_path / "output").mkdir()
    (tmp_path / "output/run.txt").symlink_to(victim)
    with pytest.raises(OSError, match="is a link"):
        _start_member(member, 0, MachineShare(), ["true"], tmp_path / "output")
    with pytest.raises(OSError, match="is a link"):
        read_last_line(tmp_path / "output/run.txt")
    assert victim.read_text() == "mine\n"
