"""A search whose runs finish without a score says so, and is no success."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import CRASHED, STOPPED
from runner.launch import sweep
from runner.launch.command_line import SearchRequest, SweepRequest
from runner.launch.local_sweep import LocalOptions
from runner.launch.parent_report import ParentReport
from tests.launch.test_study import command, study_at
from tests.launch.test_sweep import member


@pytest.mark.parametrize(
    ("scores", "lacking", "nothing"),
    [
        ([None, None], 2, True),
        (["NaN", None], 2, True),
        ([0.5, None], 1, False),
        ([0.5, 0.25], 0, False),
    ],
)
def test_finished_runs_without_a_score_are_told(tmp_path: Path, scores: list[Any], lacking: int, nothing: bool) -> None:
    study = study_at(tmp_path)
    with study.lock:
        study.work_on_batch([member(tmp_path / name, "ok") for name in "ab"], LocalOptions(), command(tmp_path))
    for name, score in zip("ab", scores, strict=True):
        path = tmp_path / name / "status.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "score": score}))
    assert (len(study.finished_without_score), study.optimizes_nothing) == (lacking, nothing)
    said = [line for line in study.summary_lines() if "the search learns nothing" in line]
    runs = f"{lacking} finished run{'s' * (lacking > 1)}"
    assert said == (
        [f"warning: {runs} measured no eval/loss that is a number: the search learns nothing from that"] * bool(lacking)
    )


def test_failed_runs_alone_are_told_as_before(tmp_path: Path) -> None:
    study = study_at(tmp_path)
    with study.lock:
        study.work_on_batch([member(tmp_path / "a", "raise")], LocalOptions(retries=0), command(tmp_path))
    assert (study.finished_without_score, study.optimizes_nothing) == ([], False)


@pytest.mark.parametrize(
    ("codes", "nothing", "expected"),
    [([0, 0], True, CRASHED), ([0, 0], False, 0), ([0, 5], True, 5), ([0, STOPPED], True, STOPPED)],
)
def test_the_exit_code_of_a_search(
    monkeypatch: pytest.MonkeyPatch,
    codes: list[int],
    nothing: bool,
    expected: int,
) -> None:
    """A search that found nothing to choose by ends with 1, unless something worse is to be told."""

    class Run:
        config = None

    class FakeStudy:
        optimizes_nothing = nothing
        members = results = ()

        def work_on_batch(self, *_: Any) -> tuple[int, list[None]]:
            return codes.pop(0), [None]

    def search(work_on_batch: Any) -> None:
        for _ in range(2):
            work_on_batch(SweepRequest((Run(),), LocalOptions()), FakeStudy())

    monkeypatch.setattr(sweep, "_admit_members", lambda runs: [])
    monkeypatch.setattr(sweep, "refuse_one_of_several", lambda *_: None)
    assert sweep.launch_search(SearchRequest(search), ParentReport(None)) == expected
