"""The short form of flips.py, and what copying tools and people leave between checkpoints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Door, assert_same
from tests.laws import flips
from tests.laws.faults import LAST, Forks, compiled, forks, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def test_every_damage_is_detected_and_the_older_step_restored(capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--flips", "60", "--truncations", "8", "--deletions", "8", "--commands", "1")
    assert flips.main(short) == 0, capsys.readouterr()
    assert "76 of 76 detected" in capsys.readouterr().out


# --- what is not a checkpoint ---


@dataclass(frozen=True)
class Shelf:
    """A killed run whose newest step is 9, the same run uninterrupted, and a door."""

    killed: Path
    whole: Path
    door: Forks


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    room = tmp_path_factory.mktemp("flips")
    with forks(compiled(room)) as door:
        yield Shelf(*flips.make(room / "runs"), door)


def _resumed(shelf: Shelf, cwd: Path, litter: Callable[[Path], None]) -> tuple[str, Path]:
    """Litter the checkpoints of a killed run, and resume it: from step 9, to the end that was to be expected."""
    shutil.copytree(shelf.killed, cwd, symlinks=True, dirs_exist_ok=True)
    run = Door(cwd).the_run
    litter(run / "checkpoints")
    done = shelf.door.run(cwd, *flips.KEPT)
    assert done.returncode == 0, done.stdout
    assert re.findall(r"^restored step (\d+)", done.stdout, re.MULTILINE) == ["9"], done.stdout
    assert_same(run, Door(shelf.whole).the_run, LAST)
    return done.stdout, run


def _empty(checkpoints: Path) -> None:
    (checkpoints / "99999").mkdir()


def _renumbered(checkpoints: Path) -> None:
    shutil.copytree(checkpoints / "9", checkpoints / "10")


def _half_copied(checkpoints: Path) -> None:
    _renumbered(checkpoints)
    for name in list(flips.contents(checkpoints / "10"))[::2]:
        (checkpoints / "10" / name).unlink()


def _unsealed(checkpoints: Path) -> None:
    _renumbered(checkpoints)
    (checkpoints / "10/holdfast.json").unlink()


@pytest.mark.parametrize(
    ("litter", "said"),
    [
        (_empty, "checkpoint 99999 is not good: no holdfast.json"),
        (_renumbered, "checkpoint 10 is not good: holdfast.json cannot be believed (holdfast.json belongs to step 9)"),
        (_half_copied, "checkpoint 10 is not good: "),
        (_unsealed, "checkpoint 10 is not good: no holdfast.json"),
    ],
    ids=["empty", "renumbered", "half copied", "unsealed"],
)
def test_what_is_named_like_a_step_and_is_none_is_set_aside(
    litter: Callable[[Path], None], said: str, shelf: Shelf, tmp_path: Path
) -> None:
    out, run = _resumed(shelf, tmp_path, litter)
    assert said in out
    (aside,) = (run / "quarantine").iterdir()
    assert f"quarantine/{aside.name}" in out
    assert (aside / "reason.txt").read_text().strip() in out


def test_what_is_not_named_like_a_step_is_left_alone_and_told(shelf: Shelf, tmp_path: Path) -> None:
    names = (".9.AbC123", "0009", "9 (copy)", "9.tmp", "notes.txt")

    def litter(checkpoints: Path) -> None:
        for name in names[:3]:
            shutil.copytree(checkpoints / "9", checkpoints / name)
        for name in names[3:5]:
            (checkpoints / name).write_text("a file\n")

    out, run = _resumed(shelf, tmp_path, litter)
    assert f"checkpoints: {', '.join(sorted(names))} (not a directory named like a step)" in out
    assert not (run / "quarantine").exists()
    assert {path.name for path in (run / "checkpoints").iterdir()} >= set(names)
