"""What a person sees of a run, and what run.log has of it where the screen takes nothing."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from runner import screen
from runner.log.console import PlainConsole, ProgressBarConsole, QuietConsole, choose_console, fit_rates
from runner.values import Speed

METRICS, SPEED = {"loss": 1.5}, Speed(12.5)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs/run.log"


def lines(log: Path) -> list[str]:
    """Without the time of day."""
    return [line.partition(" ")[2] for line in log.read_text().splitlines()]


class Terminal(io.StringIO):
    """A terminal that shows what was written to it."""

    def isatty(self) -> bool:
        return True


def stand_at_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture: pytest changes sys.stdout between those and the test."""
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return shown


def test_a_loss_is_told_once(log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [["stdout (Input/output error)"]]
    monkeypatch.setattr(screen, "take_screen_losses", lambda: losses.pop() if losses else [])
    console = PlainConsole(log)
    for line in ("one", "two"):
        console.say(line)
    console.close()
    loss = "warning: what goes to stdout (Input/output error) does not arrive; every line is in this file"
    assert lines(log) == ["one", loss, "two"]
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize("kind", [QuietConsole, PlainConsole, ProgressBarConsole])
def test_a_loss_at_the_end_is_told_too(kind: type[QuietConsole], log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stderr may fail while nobody says anything: a library warns there."""
    console = kind(log)
    monkeypatch.setattr(screen, "take_screen_losses", lambda: ["stderr (Input/output error)"])
    console.close()
    assert lines(log) == [
        "warning: what goes to stderr (Input/output error) does not arrive; every line is in this file"
    ]


def test_while_nobody_reads_only_lines_are_kept(
    log: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = PlainConsole(log)
    console.begin(0, 10)
    monkeypatch.setattr(screen, "stdout_state", lambda: "waits")
    console.tick(1, METRICS, None, SPEED)
    console.say("a line")
    assert capsys.readouterr().out == "a line\n"
    monkeypatch.setattr(screen, "stdout_state", lambda: "works")
    console.tick(2, METRICS, None, SPEED)
    assert "step      2/10" in capsys.readouterr().out


def test_the_bar_is_drawn_by_its_ticks(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the training thread: a thread of its own would print its traceback."""
    terminal = stand_at_terminal(monkeypatch)
    console, before = choose_console(log, wanted=True), threading.active_count()
    assert isinstance(console, ProgressBarConsole)
    console.begin(0, 10)
    console.tick(1, METRICS, None, SPEED)
    console.say("a line")
    assert threading.active_count() == before
    console.close()
    console.close()
    assert "1/10" in terminal.getvalue()
    assert "loss 1.5000" in terminal.getvalue()
    assert "a line" in terminal.getvalue()
    assert lines(log) == ["a line"]


def test_the_bar_goes_with_the_terminal(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stand_at_terminal(monkeypatch)
    console = ProgressBarConsole(log)
    console.begin(0, 10)
    monkeypatch.setattr(screen, "stdout_state", lambda: "failed")
    console.tick(1, METRICS, None, SPEED)
    terminal.truncate(0)
    console.tick(2, METRICS, None, SPEED)
    assert terminal.getvalue() == ""
    console.close()


def test_a_bar_that_cannot_be_drawn_is_left_out(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rich meets, training goes on, and every line is in run.log."""
    stand_at_terminal(monkeypatch)
    console: Any = ProgressBarConsole(log)
    console.begin(0, 10)

    def fail(*words: object, **options: object) -> None:
        raise ValueError("no such cursor")

    console._progress.update = fail
    for step in (1, 2):
        console._next_draw = 0.0
        console.tick(step, METRICS, None, SPEED)
    console._rich.print = fail
    console.say("a line")
    console.close()
    assert lines(log) == ["warning: the progress bar is left out: ValueError: no such cursor", "a line"]


@pytest.mark.parametrize(
    ("name", "chosen"), [("xterm", ProgressBarConsole), ("dumb", PlainConsole), ("", ProgressBarConsole)]
)
def test_a_bar_needs_a_cursor(name: str, chosen: type, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_at_terminal(monkeypatch)
    monkeypatch.setenv("TERM", name)
    assert type(choose_console(log, wanted=True)) is chosen


@pytest.mark.parametrize("columns", ["0", "1", "999999"])
def test_lines_are_shown_at_any_width(columns: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = stand_at_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    console = ProgressBarConsole(log)
    console.begin(0, 10)
    console.tick(1, METRICS, None, SPEED)
    console.say("a line that stays")
    console.close()
    assert "a line that stays" in terminal.getvalue()
    assert lines(log) == ["a line that stays"]


def test_run_log_takes_names_that_are_no_text(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    QuietConsole(log).say("in " + os.fsdecode(b"caf\xe9"))
    assert lines(log) == ["in caf\\udce9"]


@pytest.mark.parametrize("since", [0.0, 1e300, float("nan")])
def test_what_is_left_at_an_odd_speed(since: float, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for done in (0, 1):
        console = PlainConsole(log)
        console.begin(0, 10)
        console._since = -since
        console.tick(done, METRICS, None, SPEED)
        assert "left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("speed", "told"),
    [
        (Speed(0.0421), "0.042 steps/s"),
        (Speed(2.0, 32.0), "2.0 steps/s  32.0 examples/s"),
        (Speed(12.5, 1620.0, 101_960.0, 0.41234), "12.5 steps/s  102k tokens/s  MFU 41.2 %"),
        (Speed(999.96, None, 999_999.0), "1k steps/s  1M tokens/s"),
    ],
)
def test_how_fast_it_goes(speed: Speed, told: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(log)
    console.begin(0, 10)
    console.tick(5, METRICS, None, speed)
    assert f"  loss 1.5000  {told}  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("room", "told", "width"),
    [
        (200, "12.5 steps/s · 102k tokens/s · MFU 41.2 %", 28),
        (50, "12.5 steps/s · 102k tokens/s · MFU 41.2 %", 9),
        (46, "12.5 steps/s · MFU 41.2 %", 21),
        (30, "12.5 steps/s", 18),
        (5, "12.5 steps/s", 6),
    ],
)
def test_the_rates_that_have_room_are_in_the_bar(room: int, told: str, width: int) -> None:
    rates = ["12.5 steps/s", "102k tokens/s", "MFU 41.2 %"]
    assert fit_rates(rates, room) == (told, width)


def test_the_bar_tells_how_fast_it_goes(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stand_at_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "140")
    console = ProgressBarConsole(log)
    console.begin(0, 500)
    console.tick(420, METRICS, 400, Speed(12.5, 1620.0, 101_960.0, 0.41234))
    console.close()
    assert "12.5 steps/s · 102k tokens/s · MFU 41.2 %" in shown.getvalue()


def test_a_screen_that_somebody_closed_is_nothing_to_fail_of(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the user's own runs in the same process, and may close what is everybody's."""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stdout", closed)
    console = PlainConsole(log)
    console.begin(0, 10)
    console.say("still here")
    console.tick(5, {"loss": 1.0}, None, SPEED)
    assert "still here" in log.read_text()


def test_what_is_not_remote_is_at_risk(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest: list[int | None] = [None, 300]
    console = PlainConsole(log)
    console.begin(0, 500)
    said = []
    for saved in (None, 400, 400):
        console._next_tick = 0.0
        console.tick(420, METRICS, saved, SPEED)
        said.append(capsys.readouterr().out.strip().split(" left  ")[1])
        # Told once, and asked each time from then on.
        console.watch_remote(lambda: newest[0] if len(said) == 1 else newest[1])
    assert said == [
        "nothing saved yet",
        "saved 400, nothing remote yet, 420 at risk",
        "saved 400, remote 300, 120 at risk",
    ]


def test_without_a_bucket_what_is_saved_is_safe(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(log)
    console.begin(0, 500)
    console.tick(420, METRICS, 400, SPEED)
    assert capsys.readouterr().out.endswith("  saved 400, 20 at risk\n")


def test_the_bar_tells_what_is_remote(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = stand_at_terminal(monkeypatch)
    console = ProgressBarConsole(log)
    console.watch_remote(lambda: 300)
    console.begin(0, 500)
    console.tick(420, METRICS, 400, SPEED)
    console.close()
    assert "saved 400 · remote 300 · 120 at risk" in shown.getvalue()
