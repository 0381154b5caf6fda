"""Commands that nobody would type are answered in one line and write nothing; all of them: `python -m tests.laws.fuzz`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.laws import fuzz


def fuzzed(*words: str) -> None:
    """In a process of its own: in this one jax may be imported already, and a crash would take the tests along."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.laws.fuzz", *words], cwd=REPO, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout


def test_a_few_commands_are_answered() -> None:
    fuzzed("60")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_commands_are_answered(seed: int) -> None:
    fuzzed("1500", "--seed", str(seed))


def test_every_group_and_every_key_is_typed() -> None:
    grammar = fuzz.Grammar.read()
    assert {"model", "ckpt", "experiment", "hydra/launcher"} <= grammar.groups.keys()
    assert {"model.width", "preempt.notices.a.url", "ckpt.save.a.steps", "seed", "log.wandb.project"} <= {*grammar.keys}
    typed = [word for number in range(3000) for word in fuzz.make_command(grammar, 0, number, ["run"])]
    words = {word.lstrip("+~-").partition("=")[0] for word in typed}
    # Keys are drawn by chance: nearly all of them come up in three thousand commands.
    assert len({*grammar.groups} - words) == 0
    assert len({*grammar.keys} - words) < 0.05 * len(grammar.keys)
    assert len(set(typed)) > 4000


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda: (_ for _ in ()).throw(ValueError("no")), "ValueError: 'no'"),
        (lambda: Path("left").touch(), "wrote: ['left']"),
        (lambda: sys.exit(2), "SystemExit(2)"),
        (lambda: (_ for _ in ()).throw(fuzz.HoldfastError("a\nb\nc\nd")), "a message of 4 lines"),
        (lambda: (_ for _ in ()).throw(fuzz.HoldfastError("x" * 700)), "700 letters"),
        (lambda: (_ for _ in ()).throw(fuzz.HoldfastError("\x1b[31m")), "commands the terminal"),
        (lambda: sys.modules.setdefault("jax", fuzz), "imported jax"),
    ],
)
def test_a_fault_is_found(fault: object, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Whatever the tests before this one have imported; it comes back.
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setattr(fuzz, "compose", lambda words: fault())  # type: ignore[operator]
    found = fuzz.find_fault(0, ("seed=1",), tmp_path)
    sys.modules.pop("jax", None)
    assert found is not None
    assert says in found.why
