"""What looks at runs tells that one ended before its last step, because a metric got no better."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from runner.files import format_json
from runner.inspect import ls_runs
from runner.report.facts import read_facts
from runner.rundir.layout import RunDir

STATUS = {"state": "finished", "step": 65, "steps": 200, "why": "eval/loss has not improved in 3 evaluations"}


def make_run(folder: Path, **status: Any) -> RunDir:
    run = RunDir(folder)
    run.checkpoints.mkdir(parents=True)
    run.config.write_text("{}")
    run.status.write_text(format_json({**STATUS, **status}))
    return run


@pytest.mark.parametrize(
    ("status", "state", "steps"),
    [
        ({"stopped_early": True}, "finished early", "65/200"),
        ({"why": "", "step": 200}, "finished", "200/200"),
        ({"state": "preempted", "why": "SIGTERM"}, "preempted", "65/200"),
        # Of a run of so many epochs the length is not known before its data was read.
        ({"state": "failed", "steps": None, "step": 0}, "failed", "0/?"),
    ],
)
def test_in_a_list_of_runs(tmp_path: Path, status: dict[str, Any], state: str, steps: str) -> None:
    make_run(tmp_path / "runs" / "a", **status)
    said: list[str] = []
    found = ls_runs.run_verb(Namespace(run=str(tmp_path / "runs"), verify=False), said.append).document
    (entry,) = found["runs"]
    assert entry["stopped_early"] == (state == "finished early")
    assert said[1].startswith(f"{state}  ")
    assert steps in said[1]


def test_of_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", stopped_early=True)
    said: list[str] = []
    ls_runs.run_verb(Namespace(run=str(run), verify=False), said.append)
    assert f"finished at step 65 of 200 ({STATUS['why']})" in "\n".join(said)
    assert read_facts(run).status.why == STATUS["why"]
