"""A run that the code before the rooms were moved began, and that was killed there, goes on as if nothing had happened.

tests/fixtures/killed_run holds the directory of that run as the kill left it (without its older checkpoint), and what
later code made of it: that which was the last to change the bits of default runs (CHANGELOG says when and why). Bits
depend on the processor, the number of cores and the version of jax, so they are compared where these are the same;
everywhere else the run must still go on under its name.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import pytest

from runner.inspect.digest_checkpoint import compute_digest
from runner.inspect.lookup import find_checkpoint
from runner.train.compile_cache import processor_id
from tests.conftest import REPO, SMALL, Door

pytestmark = pytest.mark.forked

FIXTURE = REPO / "tests/fixtures/killed_run"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
COMMAND = (*SMALL, "name=street", "ckpt.save.periodic.steps=20")
NAME = "steps_20-batch_size_8-eval_fraction_0.2-path_corpus.txt-seq-40a3258b"


@pytest.fixture
def finished(door: Door) -> Path:
    """The killed run after the same command was typed once more."""
    run = Path(shutil.copytree(FIXTURE / "run", door.cwd / "outputs/street" / NAME, symlinks=True))
    done = door.run(*COMMAND)
    assert done.returncode == 0, done.stderr
    assert "(going on)" in done.stdout
    assert "restored step 20 " in done.stdout
    assert "finished 60 steps" in done.stdout
    return run


def test_it_goes_on_under_its_name_with_what_it_had(finished: Path, door: Door) -> None:
    assert door.the_run == finished
    assert (finished / "config.yaml").read_bytes() == (FIXTURE / "run/config.yaml").read_bytes()
    assert not (finished / "quarantine").exists()
    before, after = (json_lines(folder / "logs/metrics.jsonl") for folder in (FIXTURE / "run", finished))
    restored = [line for line in before if json.loads(line)["step"] <= 20]
    assert restored
    assert after[: len(restored)] == restored
    killed, gone_on = map(json.loads, json_lines(finished / "attempts.jsonl"))
    assert (killed["ending"], killed["attempt"]) == ("killed", 1)
    assert (gone_on["ending"], gone_on["from_step"], gone_on["to_step"]) == ("finished", 20, 60)


@pytest.mark.skipif(
    EXPECTED["machine"] != {"processor": processor_id(), "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__},
    reason="bits are compared on the processor, cores and jax that made the fixture",
)
def test_it_ends_bit_for_bit_as_it_did_when_bits_last_changed(finished: Path) -> None:
    assert (finished / "logs/metrics.jsonl").read_bytes() == (FIXTURE / "expected_metrics.jsonl").read_bytes()
    assert f"sha256:{EXPECTED['sha256_at_60']}" in compute_digest(find_checkpoint(f"{finished}@60"))


def json_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
