"""Verbs on a run that somebody else has made: they stay in it, show nothing of what lies outside, and command nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.__main__ import main
from runner.checkpoint.seal import find_problem
from runner.files import open_folder
from runner.inspect.lookup import list_runs, name_run
from runner.log.console import PlainConsole
from runner.rundir.heartbeat import LAYOUT, MARK, HeartbeatWriter, read_heartbeat
from runner.rundir.layout import RunDir
from runner.rundir.readme import render_readme
from runner.text import escape_markdown, format_code_span, quote_words
from tests import synthetic

Asked = Callable[..., tuple[int, str, str]]
SECRET = "what lies outside"
# A word of a command line that nobody would type.
EVIL = "x`\n```\n## evil\n| <script>alert(1)</script> | \x1b]0;owned\x07 $(touch PWNED) '"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of some logs and sealed checkpoints, beside a file and a run that are somebody else's."""
    (tmp_path / "outside.txt").write_text(f'{{"step": 10, "split": "{SECRET}", "loss": 1.0, "words": "{SECRET}"}}\n')
    synthetic.write(tmp_path / "other", steps=200)
    monkeypatch.chdir(tmp_path)
    return synthetic.write(tmp_path / "outputs/default/run", words=("optim.lr=0.1",), steps=300)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Asked:
    def ask(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return ask


def relink(path: Path, target: str | Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# --- what verbs write ---


def test_a_pin_is_set_in_the_checkpoint_that_was_named_or_not_at_all(run: Path, tmp_path: Path, ask: Asked) -> None:
    pin, victim = run / "checkpoints/300/pinned", tmp_path / "victim"
    relink(pin, victim)
    code, _, err = ask("pin", f"{run}@300")
    assert code == 3
    assert "pinned: is a link" in err
    assert not victim.exists()
    # To take a pin away takes away the link, and nothing else.
    victim.write_text("mine")
    assert ask("unpin", f"{run}@300")[0] == 0
    assert victim.read_text() == "mine"
    assert not pin.is_symlink()
    assert ask("pin", f"{run}@300")[0] == 0
    assert pin.is_file()


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/300", "checkpoints/best"])
def test_a_link_to_another_run_is_not_taken_for_this_one(place: str, run: Path, tmp_path: Path, ask: Asked) -> None:
    moved = run / place
    if moved.is_symlink():
        moved.unlink()
    elif moved.exists():
        moved.rename(tmp_path / "away")
    moved.symlink_to(tmp_path / "other/checkpoints" / ("" if place == "checkpoints" else "200"))
    before = sorted((tmp_path / "other").rglob("*"))
    reference = f"{run}@best" if place == "checkpoints/best" else f"{run}@300"
    for words in (["pin", reference], ["unpin", reference], ["show", reference], ["digest", reference]):
        code, out, err = ask(*words)
        assert (code, out) == (3, ""), (words, out)
        assert len(err.splitlines()) == 1
    assert sorted((tmp_path / "other").rglob("*")) == before
    if place == "checkpoints":
        for looking in (["ls"], ["why"], ["verify", "--all"], ["prune"], ["prune", "--dry-run"]):
            assert ask(*looking, run)[0] == 3, looking


def test_a_run_that_is_reached_through_a_link_of_the_users_own_is_looked_at(
    run: Path, tmp_path: Path, ask: Asked
) -> None:
    (tmp_path / "latest").symlink_to(run)
    (tmp_path / "shortcut").symlink_to(tmp_path / "outputs")
    for path in ("latest", "shortcut/default/run"):
        code, out, err = ask("ls", path)
        assert (code, err) == (0, "")
        assert "finished at step 300 of 1000" in out
        assert ask("pin", f"{path}@300")[0] == 0
    # Once, although two names lead to it.
    (tmp_path / "outputs/default/alias").symlink_to(run)
    (tmp_path / "outputs/default/broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "outputs/default/loop").symlink_to("loop")
    assert [found.path for found in list_runs(tmp_path / "outputs")] == [run]


def test_a_page_beside_a_run_replaces_a_link_and_not_what_it_leads_to(run: Path, tmp_path: Path, ask: Asked) -> None:
    victim = tmp_path / "bashrc"
    victim.write_text("mine")
    for name in ("report.html", ".report.html"):
        relink(run / name, victim)
    assert ask("report", run)[0] == 0
    assert victim.read_text() == "mine"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert not (run / "report.html").is_symlink()
    # A page that was named is the user's own link.
    relink(tmp_path / "page.html", tmp_path / "www.html")
    assert ask("report", run, "--to", "page.html")[0] == 0
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "www.html").is_file()


@pytest.mark.parametrize("place", ["holdfast.json", "progress/metadata", "state/_METADATA"])
@pytest.mark.parametrize("what", ["a device", "a file outside", "a pipe"])
def test_a_checkpoint_with_a_link_or_a_pipe_in_it_is_not_read(
    place: str, what: str, run: Path, tmp_path: Path, ask: Asked
) -> None:
    """A device has no end, a pipe is waited for, and a file outside is nobody's business."""
    path = run / "checkpoints/300" / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if what == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if what == "a device" else tmp_path / "outside.txt")
    said = f"{place} is no plain file" if what == "a pipe" else f"{place} is a link"
    assert find_problem(run / "checkpoints/300") == said
    assert find_problem(run / "checkpoints/300", checksums=False) == said
    for looking in (["ls"], ["verify", "--all"], ["why"]):
        assert said in ask(*looking, run)[1], looking
    for words in (["show", "--json", f"{run}@300"], ["diff", f"{run}@300", f"{run}@200"], ["digest", f"{run}@300"]):
        code, out, err = ask(*words)
        assert code == 3, (words, out)
        assert SECRET not in out + err


# --- what verbs show ---


@pytest.mark.parametrize(
    "name", ["logs/metrics.jsonl", "logs/timing.jsonl", "remat.json", "status.json", "config.yaml"]
)
def test_what_lies_outside_is_shown_by_no_verb(name: str, run: Path, tmp_path: Path, ask: Asked) -> None:
    relink(run / name, tmp_path / "outside.txt")
    for words in (["report", run], ["ls", run], ["goodput", run], ["ls", "--json"], ["why", run]):
        code, out, err = ask(*words)
        assert code in (0, 3), (words, err)
        assert SECRET not in out + err
    assert SECRET not in (run / "report.html").read_text()


def test_a_quarantine_that_leads_outside_is_not_listed_and_a_pipe_is_not_waited_for(
    run: Path, tmp_path: Path, ask: Asked
) -> None:
    (run / "quarantine/7-1").mkdir(parents=True)
    (tmp_path / "reason.txt").write_text(SECRET)
    relink(run / "quarantine/7-1/reason.txt", tmp_path / "reason.txt")
    assert "in quarantine: 7-1: it does not say why" in ask("ls", run)[1]
    (run / "quarantine/7-1/reason.txt").unlink()
    os.mkfifo(run / "quarantine/7-1/reason.txt")
    assert "in quarantine: 7-1: it does not say why" in ask("ls", run)[1]
    (run / "quarantine/7-1/reason.txt").unlink()
    (run / "quarantine/7-1/reason.txt").write_bytes(b"\xff\x1b[2J" + b"x " * 5000)
    code, out, _ = ask("ls", run)
    assert code == 0
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 1100
    (run / "quarantine").rename(tmp_path / "away")
    relink(run / "quarantine", tmp_path / "away")
    assert "quarantine" not in ask("ls", run)[1]


def test_a_configuration_is_bounded_and_data_alone(run: Path, ask: Asked) -> None:
    bomb = "\n".join(
        ["a0: &a0 [x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
    )
    for text, said in (
        (bomb, "becomes more than"),
        ("[" * 20_000, "is nested deeper"),
        ('a: !!python/object/apply:os.system ["touch PWNED"]', "no tag of plain data"),
        ("a: " + "9" * 5000, "digits"),
        ("retention: {x: {kind: [1]}}", "not what this version writes"),
        ("ckpt: 7\nretention: 3\n", "not what this version writes"),
        ("- a\n", "is no configuration"),
    ):
        (run / "config.yaml").write_text(text)
        code, out, err = ask("why", run)
        assert (code, out) == (3, ""), text[:50]
        assert said in err, (text[:50], err)
        assert len(err.splitlines()) == 1
        # What can be told without it is told, and why the rest is not, once.
        code, out, _ = ask("ls", run)
        assert code == 0
        assert out.count("not known which stay") == 1
        assert ask("goodput", run)[0] == 0
        assert ask("report", run)[0] == 0
    assert not Path("PWNED").exists()


# --- the page about a run ---


def test_no_word_of_a_foreign_file_becomes_markup_or_leaves_its_quotes(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    attempt = {
        **lines[0],
        "command": ["python", "run.py", EVIL, "-x"],
        "drift": [EVIL],
        "host": EVIL,
        "git": EVIL,
        "python": EVIL,
        "hardware": EVIL,
        "remat": EVIL,
        "packages": {EVIL: EVIL},
        "external": {EVIL: {"target": EVIL, "file": EVIL, "hash": EVIL}},
        "during": EVIL,
        "seconds": {EVIL: 3.0},
    }
    (run / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    status = {
        "state": EVIL,
        "why": EVIL,
        "step": 3,
        "attempt": attempt,
        "skipped": [{"batch": 1, "step": 2, "why": EVIL}],
    }
    status |= {"best": {"metric": EVIL, "value": 1.0, "step": 1}, "last": {EVIL: 2.0}}
    (run / "status.json").write_text(json.dumps(status))
    page = render_readme(RunDir(run))
    assert "\x1b" not in page
    assert "\n## evil" not in page
    assert [line for line in page.splitlines() if line.startswith("```")] == ["```", "```"]
    # No tag and no code but in a span or a block of code: what is left of the page without those is escaped.
    prose = re.sub(r"(?s)^```$.*?^```$", "", page, flags=re.MULTILINE)
    prose = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", prose)
    assert "<script>" not in prose
    assert not re.search(r"(?<!\\)`", prose)
    # Typed as it stands there it is the command that was written down, and runs nothing else.
    (typed,) = [line for line in page.splitlines() if line.endswith("# resumes; a finished run says so")]
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {typed}"], capture_output=True, cwd=run).stdout
    assert shown.decode().split("\0")[:-1] == attempt["command"]
    assert not (run / "PWNED").exists()


def test_a_page_is_made_of_whatever_is_there(run: Path) -> None:
    odd: tuple[dict[str, Any], ...] = (
        {},
        {"attempt": {}},
        {"attempt": None, "best": 7, "last": []},
        {"skipped": [{}], "steps": "x"},
    )
    for status in odd:
        (run / "status.json").write_text(json.dumps(status))
        (run / "attempts.jsonl").write_bytes(b'{}\n{"attempt": 1}\n\xff\xfe\n[1]\n' + b"[" * 20_000)
        assert "## What differs from the defaults" in render_readme(RunDir(run))


def test_words_and_spans_are_what_a_shell_and_markdown_take_them_for() -> None:
    words = ["it's\n`x` \\é🦊\x1b[2J\u202e", "a\udcff", "\x85", "", "plain", "$x '", "-n", "~", "a\tb"]
    quoted = quote_words(words)
    assert quoted.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {quoted}"], capture_output=True, env={"LC_ALL": "C.UTF-8"})
    assert [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]] == words
    assert quote_words(["a b", "c"]) == shlex.join(["a b", "c"])
    assert format_code_span("plain") == "`plain`"
    assert format_code_span("a`b") == "``a`b``"
    assert format_code_span("`") == "`` ` ``"
    assert format_code_span("``a") == "``` ``a ```"
    assert "\n" not in format_code_span("a\nb")
    assert escape_markdown("a_b 0.1 → 0.2") == "a_b 0.1 → 0.2"
    assert escape_markdown("[x](y) | `z` <b>") == r"\[x\](y) \| \`z\` \<b\>"


# --- the heartbeat ---


def test_a_heartbeat_of_any_bytes_is_one_or_none(tmp_path: Path) -> None:
    path, now = tmp_path / ".pulse", 1_790_000_000.0
    writer = HeartbeatWriter(path)
    writer.beat(7)
    found = read_heartbeat(path)
    assert found is not None
    assert found.step == 7
    good = (MARK, 7, now, now, b"step", b"seal")
    for place, odd in ((1, -1), (1, 2**62), (2, float("nan")), (2, float("inf")), (3, 1e300), (3, -1.0)):
        path.write_bytes(LAYOUT.pack(*(odd if place == number else value for number, value in enumerate(good))))
        assert read_heartbeat(path) is None, (place, odd)
    for place, name in ((4, b"\xff\xfe"), (4, b"\x1b[2J"), (4, b""), (5, b"a b"), (5, "é".encode())):
        path.write_bytes(LAYOUT.pack(*(name if place == number else value for number, value in enumerate(good))))
        assert read_heartbeat(path) is None, (place, name)
    for content in (b"", MARK, bytes(LAYOUT.size), LAYOUT.pack(*good) + b"x", struct.pack("<q", 1) * 8):
        path.write_bytes(content)
        assert read_heartbeat(path) is None, content
    path.unlink()
    os.mkfifo(path)
    assert read_heartbeat(path) is None
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(LAYOUT.pack(*good))
    path.symlink_to(tmp_path / "elsewhere")
    assert read_heartbeat(path) is None
    HeartbeatWriter(path).beat(9)
    assert (tmp_path / "elsewhere").read_bytes() == LAYOUT.pack(*good)


def test_a_link_where_results_go_is_refused_and_a_name_of_dollars_is_no_formula(
    run: Path, tmp_path: Path, ask: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = run.with_name("a$x_{$ \x1b[2J")
    run.rename(odd)
    assert ask("goodput", odd, "--to", "time.png")[0] == 0
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")

    def lead_outside(*_: Any, **__: Any) -> None:
        with open_folder(tmp_path / "link"):
            raise AssertionError("went through a link")

    (tmp_path / "link").symlink_to(tmp_path / "other")
    monkeypatch.setattr("runner.inspect.goodput_table.find_runs", lead_outside)
    assert ask("goodput", odd)[0] == 3


def test_errors_and_data_command_no_terminal(run: Path, ask: Asked) -> None:
    """JSON itself escapes the control characters of ASCII alone: not C1, not the ones that turn a line around."""
    odd = "\x1b]0;owned\x07\x9b2J\u202e\u2066x"
    (run / "config.yaml").write_text(json.dumps({"retention": {"x": {"kind": odd}}}))
    code, out, err = ask("why", run)
    assert (code, out) == (3, "")
    assert err.removesuffix("\n").isprintable()
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": odd}))
    for words in (["ls", "--json", "outputs"], ["why", "--json", run], ["ls", "outputs"]):
        _, out, err = ask(*words)
        assert (out + err).replace("\n", "").isprintable(), words
    assert json.loads(ask("ls", "--json", "outputs")[1])["runs"][0]["state"] == odd


def test_what_is_no_path_is_one_plain_line(run: Path, ask: Asked) -> None:
    for words in (
        ["ls", "~nobody-is-called-so/x"],
        ["show", "a\0b"],
        ["ls", "x" * 5000],
        ["pin", f"{run}@" + "9" * 5000],
    ):
        code, out, err = ask(*words)
        assert (code, out) in ((3, ""), (5, "")), words
        assert len(err.splitlines()) == 1
    assert name_run(run).path == run


def test_a_line_of_a_run_commands_no_terminal_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A start quotes what it finds: the reason of a checkpoint, the name of an array that is not what was sealed."""
    console = PlainConsole(tmp_path / "run.log")
    console.say("warning: checkpoint 3 is not good: \x1b]0;owned\x07\x00\u202e\nsecond line")
    console.close()
    printed = capsys.readouterr().out
    assert printed == "warning: checkpoint 3 is not good: ·]0;owned···\nsecond line\n"
    assert all(line.isprintable() for line in (tmp_path / "run.log").read_text().splitlines())
