"""The short form of hostile.py, and each link that a foreign run once led a write out with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Door
from tests.laws import hostile
from tests.laws.commands import Ending, start_run
from tests.laws.faults import Forks
from tests.laws.mutations import CANARY, canary_of, plant

FILE, FOLDER = "a link to a file outside", "a link to a folder outside"
# What the first start of a foreign run overwrote, emptied, appended to or deleted, outside of it (issue 16).
LED_OUTSIDE = (
    *((place, FILE) for place in (".README.md", ".lock", ".pulse", ".status.json", "attempts.jsonl", "status.json")),
    *((place, FILE) for place in ("logs/run.log", "logs/metrics.jsonl", "logs/timing.jsonl", "README.md", "data.json")),
    *((place, FOLDER) for place in ("logs", "logs/tensorboard", "checkpoints/.trash", "checkpoints/.writing")),
    *((place, "a link to another run's part") for place in ("checkpoints", "quarantine")),
    ("checkpoints/9", "a link to another checkpoint"),
)


def test_no_bytes_of_a_side_file_break_a_verb_or_a_start(
    templates: list[Path], served: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trial = hostile.Trial(tmp_path, templates, served, sample=6)
    hostile.try_links(trial, 20, seed=0)
    hostile.try_mutations(trial, 50, seed=0)
    assert trial.failures == []
    assert sum(trial.counts.values()) > 400
    # It is not empty: most mutations leave a run that goes on.
    assert trial.counts["start 75"] > 3


@pytest.mark.slow
def test_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert hostile.main(["2000"]) == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def templates(served: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return hostile.make_templates(tmp_path_factory.mktemp("hostile"), served)


@pytest.fixture
def killed(templates: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the killed run, in a working directory of its own with its canary."""
    shutil.copytree(templates[1], tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Door(tmp_path).the_run


@pytest.mark.parametrize(("place", "kind"), LED_OUTSIDE)
def test_a_start_follows_no_link_out_of_a_run(place: str, kind: str, killed: Path) -> None:
    plant(killed, place, kind)
    outside, run = hostile.take_inventory(canary_of(killed)), hostile.take_inventory(killed)
    done = start_run(f"dir={killed.relative_to(Path.cwd())}", "train.steps=14")
    assert done.code == 3, done
    assert f"{place} is a link" in done.err
    assert len(done.err.splitlines()) == 1
    assert hostile.take_inventory(canary_of(killed)) == outside
    # Not even the run itself: whoever made it may be asked what it is.
    assert hostile.take_inventory(killed) == run


def test_the_real_command_refuses_it_and_an_overwrite_leads_nowhere(killed: Path, served: Forks) -> None:
    plant(killed, ".README.md", FILE)
    before = hostile.take_inventory(Path(CANARY))
    for words in (("train.steps=14",), ("resume=never", "overwrite=true")):
        done = served.run(Path.cwd(), f"dir={killed}", *words)
        assert done.returncode == 3, done.stdout
        assert done.stdout.startswith("error: ")
        assert len(done.stdout.splitlines()) == 1
    assert hostile.take_inventory(Path(CANARY)) == before


def test_the_law_sees_what_it_is_made_to_see(templates: list[Path], tmp_path: Path, killed: Path) -> None:
    """A traceback, a file outside that was touched, a control character, a foreign content that was shown."""
    trial = hostile.Trial(tmp_path / "work", templates)
    canary = canary_of(killed)
    before = hostile.take_inventory(canary)
    good = Ending(0, "a line\n", "", 0.0)
    for ending in (
        Ending(None, "", "", 0.0, "KeyError: 'a'"),
        Ending(1, "", "", 0.0),
        Ending(3, "", "a\nb\nc\nd\n", 0.0),
        Ending(0, "\x1b[2J", "", 0.0),
        Ending(0, hostile.SECRET, "", 0.0),
        Ending(0, "", "", hostile.MOST_SECONDS + 1),
    ):
        assert hostile.find_fault(["ls"], ending) is not None, ending
    assert hostile.find_fault(["ls"], good) is None
    trial._judge(["ls"], good, "nothing", canary, before)
    assert trial.failures == []
    (canary / "victim.txt").write_text("")
    trial._judge(["ls"], good, "touched", canary, before)
    assert "touched outside: victim.txt" in trial.failures[0]
