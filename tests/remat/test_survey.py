"""What `python -m runner remat` says: counted, compiled, timed, compared; and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from matplotlib.figure import Figure

from runner.__main__ import main
from runner.config.remat_policies import AttentionOnly, AutoRemat, Dots, DotsNoBatch, Full, Names, NoRemat, Offload
from runner.config.schema import Config, validate_config
from runner.remat import compile_target, memory_plot, remat_survey
from runner.remat.candidates import trace_candidate
from runner.remat.cost_table import PolicyCosts, SurveyReport, SurveySetting
from runner.trace.step_requirements import CompiledMemory
from runner.train.dataset import read_sources
from tests.config.test_config import changed
from tests.conftest import HANG_SECONDS, REPO, composed

LAYERS, WIDTH, HIDDEN, SEQ, BATCH = 8, 32, 128, 32, 4
HERE = SurveySetting("gpt", "cpu", "cpu", 1, "scan", "fp32", BATCH, 1, None)


def config_of(**more: Any) -> Config:
    return validate_config(
        changed(
            model={"kind": "gpt", "num_layers": LAYERS, "num_heads": 2, "width": WIDTH, "hidden": HIDDEN},
            data={"kind": "synthetic", "gives": "tokens", "seq_len": SEQ, "batch_size": BATCH, "size": 32},
            **more,
        )
    )


@pytest.fixture(scope="module")
def counted() -> SurveyReport:
    config = config_of()
    return remat_survey.survey_policies(
        config, read_sources(config.data), remat_survey.SurveyRequest(compiles=False), None, lambda line: None
    )


def row(name: str, counted: int, flops: int, **more: Any) -> PolicyCosts:
    return PolicyCosts(name, NoRemat(), {"": counted}, counted, flops, 0.0, **more)


def memory(temporaries: int, peak: int | None = None) -> CompiledMemory:
    return CompiledMemory(arguments=10, outputs=10, donated=10, temporaries=temporaries, host=0, peak=peak, seconds=1.0)


def test_the_menu_is_weighed_and_its_frontier_found(counted: SurveyReport) -> None:
    names = [row.name for row in counted.ordered]
    assert names[0] == "none"
    assert names[-1] == "full"
    assert set(names) > {"attention_core", "attention_only", "ffn_only", "every_n(2)", "dots", "dots_no_batch"}
    assert "everything_saveable" not in names
    assert not counted.refused
    assert not counted.is_compiled
    best = [row.name for row in counted.frontier]
    assert best[0] == "dots"  # it computes no product again, and stores less than none
    assert best[-1] == "full"
    assert not {"none", "attention_only", "every_n(2)"} & set(best)
    assert counted.setting.blocks == "scan"


def test_a_tag_spares_what_is_counted_by_hand(counted: SurveyReport) -> None:
    tags = {tag.name: tag for tag in counted.tags}
    assert tags["ffn_pre"].num_bytes == LAYERS * BATCH * SEQ * HIDDEN * 4
    assert tags["ffn_pre"].alone == tags["ffn_pre"].last == LAYERS * BATCH * SEQ * HIDDEN * WIDTH * 2
    assert all(tag.pays for tag in counted.tags)


def test_other_ways_out_are_counted_for_this_configuration(counted: SurveyReport) -> None:
    changes = {change.words: change for change in counted.changes}
    now = counted.row(counted.now)
    assert changes["train.microbatches=2"].num_bytes < 0.6 * now.num_bytes
    assert changes["train.microbatches=2"].flops == now.flops
    assert changes["train.microbatches=4"].num_bytes < changes["train.microbatches=2"].num_bytes
    assert changes["train.precision=bf16"].num_bytes < 0.8 * now.num_bytes
    assert changes["remat=full"].flops == counted.row("full").flops > now.flops
    assert "remat=none" not in changes


def test_what_the_configuration_has_is_the_beginning_of_every_change() -> None:
    remat = {"kind": "names", "save": ["qkv"]}
    config = config_of(remat=remat)
    trace = remat_survey.CandidateCache(config, read_sources(config.data))
    options = remat_survey.list_policies(trace, [], whole=True)
    assert options[-1] == Names(save=("qkv",))
    assert [option.kind for option in options[:2]] == ["none", "everything_saveable"]
    words = [words for words, _ in remat_survey.suggest_changes(replace(config, remat=Full()))]
    assert words[:3] == ["train.microbatches=2", "train.microbatches=4", "train.precision=bf16"]
    assert all(other.remat == Full() for _, other in remat_survey.suggest_changes(replace(config, remat=Full())))


@pytest.mark.slow
def test_under_a_scan_the_compiler_agrees_with_what_was_counted() -> None:
    """On a CPU as well; there only where blocks are under a scan."""
    config = config_of()
    trace = remat_survey.CandidateCache(config, read_sources(config.data))
    options = [NoRemat(), Dots(), DotsNoBatch(), Full()]
    rows = list(remat_survey.measure_policies(trace, options, remat_survey.SurveyRequest(rounds=2), lambda line: None))
    temporaries = {row.name: row.memory.temporaries for row in rows if row.memory}
    by_count = sorted(rows, key=lambda row: row.num_bytes)
    assert [row.name for row in by_count] == sorted(temporaries, key=lambda name: temporaries[name])
    assert temporaries["full"] <= 0.3 * temporaries["none"]
    assert all(len(row.step_seconds) == 2 for row in rows)
    report = SurveyReport(remat_survey.describe_setting(trace), "none", rows)
    assert report.is_believed
    assert report.is_timed
    none = report.row("none")
    assert none.memory
    assert report.in_all(none) == none.memory.footprint > none.memory.temporaries


def test_what_waits_in_the_memory_of_the_host_is_not_counted_on_the_device() -> None:
    config = config_of()
    away, full = (
        trace_candidate(config, option, read_sources(config.data)) for option in (Offload(offload=("qkv",)), Full())
    )
    assert away.flops < full.flops
    assert away.num_bytes == full.num_bytes


def test_the_compiler_is_not_believed_of_a_loop_on_a_cpu() -> None:
    rows = [row("none", 100, 10, memory=memory(5)), row("full", 20, 13, memory=memory(50))]
    scan, loop = (SurveyReport(replace(HERE, blocks=blocks), "none", rows, budget=30) for blocks in ("scan", "loop"))
    assert [each.name for each in scan.frontier] == ["none"]
    assert [each.name for each in loop.frontier] == ["none", "full"]
    assert [loop.fits(each) for each in rows] == [False, True]
    assert loop.in_all(rows[0]) == 100
    gpu = SurveyReport(
        replace(HERE, blocks="loop", backend="gpu"), "none", [row("none", 100, 10, memory=memory(5, peak=40))]
    )
    assert gpu.in_all(gpu.base) == 40


def test_the_frontier_is_by_time_where_steps_were_taken() -> None:
    rows = [row("none", 100, 10, step_seconds=(3.0, 4.0, 5.0)), row("full", 20, 13, step_seconds=(1.0, 2.0, 9.0))]
    report = SurveyReport(HERE, "none", rows)
    assert [each.name for each in report.frontier] == ["full"]
    assert report.lines()[0]["step_seconds"]["median"] == 4.0
    assert rows[1].quartiles == (1.5, 2.0, 5.5)


def test_the_budget_is_what_is_asked_for_or_configured_or_a_part_of_the_device() -> None:
    def budget(asked: int, remat: Any, devices: Any = None, **stats: int) -> int | None:
        device = SimpleNamespace(memory_stats=lambda: stats or None)
        built = SimpleNamespace(mesh=SimpleNamespace(devices=SimpleNamespace(flat=[device])))
        traced: Any = (SimpleNamespace(built=built), 0.0)
        trace = remat_survey.CandidateCache(replace(config_of(), remat=remat), None, devices, {NoRemat(): traced})  # type: ignore[arg-type]
        return remat_survey._find_budget(trace, asked)

    assert budget(7, AutoRemat(budget_bytes="8MB"), bytes_limit=1000) == 7
    assert budget(0, AutoRemat(budget_bytes="8MB"), bytes_limit=1000) == 8_000_000
    assert budget(0, AutoRemat(fraction=0.5), bytes_limit=1000) == 500
    assert budget(0, NoRemat(), bytes_limit=1000) == 900
    assert budget(0, NoRemat()) is None  # a CPU does not say
    assert budget(0, NoRemat(), devices=[], bytes_limit=1000) is None  # nor is this device the one


def test_steps_are_timed_in_turns_and_what_finds_no_room_is_left_out() -> None:
    calls: list[str] = []

    def program(name: str) -> Any:
        def step(state: int, batch: str) -> tuple[int, dict[str, float]]:
            calls.append(name)
            if name == "large":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
            return state + 1, {}

        return step

    built = SimpleNamespace(put=lambda batch: batch, stream=iter(["batch"]), init=lambda: 0)
    base: Any = SimpleNamespace(built=built)
    said: list[str] = []
    programs = {name: program(name) for name in ("a", "large", "b", "c")}
    found = remat_survey.time_steps(base, programs, 3, said.append)
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert calls == ["a", "large", "b", "c", *"bca", *"cab", *"abc"]
    assert said == ["  large: does not fit: Out of memory allocating 9 bytes"]


def test_a_compiler_without_room_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch, counted: SurveyReport) -> None:
    config = config_of()

    def refuse(_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20G of 16G hbm\nmore")

    monkeypatch.setattr(remat_survey, "compile_candidate", refuse)
    trace = remat_survey.CandidateCache(config, read_sources(config.data))
    (found,) = remat_survey.measure_policies(trace, [NoRemat()], remat_survey.SurveyRequest(), lambda line: None)
    assert found.trouble == "does not fit: Used 20G of 16G hbm"
    report = replace(counted, rows=[found], budget=10)
    assert report.fits(found) is False
    assert report.frontier == []
    memory_plot.plot_survey(report)  # of nothing


def test_no_label_lies_on_another() -> None:
    names = [
        "none",
        "every_n(2)",
        "attention_only",
        "names(" + ", ".join(f"tag_{i}" for i in range(9)) + ")",
        "dots",
        "full",
    ]
    rows = [row(name, 1000 - 9 * i, 100 + 2 * i) for i, name in enumerate(names)]
    rows += [row("far", 100, 200), row("the same", 100, 200)]
    figure = memory_plot.plot_survey(SurveyReport(HERE, "none", rows, budget=500))
    boxes = {text: box for text, box in _labels(figure)}
    assert any(words == "far\nthe same" for words in boxes)
    assert any("tag_8" in words for words in boxes)
    assert not [(one, other) for one, other in combinations(boxes, 2) if boxes[one].overlaps(boxes[other])]


def _labels(figure: Figure) -> Iterator[tuple[str, Any]]:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    (axes,) = figure.axes
    for text in axes.texts:
        yield text.get_text(), text.get_window_extent(renderer)


def test_the_verb_tells_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here for a model in a Python loop, and without attention."""
    place = tmp_path / "report"
    words = ["--no-compile", "--budget", "1.4MB", "--to", str(place), "model=mlp", "data=digits", "model.num_layers=6"]
    process = [sys.executable, "-m", "runner", "remat", *words, "remat=every_n", "remat.n=3"]
    said = subprocess.run(process, check=True, capture_output=True, text=True, cwd=REPO, timeout=HANG_SECONDS).stdout
    assert "blocks in a Python loop" in said
    assert "now (remat=every_n(3))" in said
    assert "left out: attention_core, attention_only, ffn_only: the model does not declare" in " ".join(said.split())
    assert "train.microbatches=2" in said
    lines = [json.loads(line) for line in (place / "remat.jsonl").read_text().splitlines()]
    assert {line["policy"] for line in lines} >= {"none", "every_n(2)", "every_n(3)", "full"}
    assert {line["fits"] for line in lines} == {True, False}
    assert lines[0]["remat"] == {"kind": "none"}
    assert lines[0]["memory_is"] == "counted"
    assert (place / "remat.png").read_bytes().startswith(b"\x89PNG")
    assert main(["remat", *words]) == 3
    assert "name a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "tpu:v5e"), "libtpu is not installed"),
        (("--target", "tpu:v9"), "expected tpu:v4, tpu:v5e"),
        (("--target", "gpu"), "expected tpu:v4, tpu:v5e"),
        (("--target", "gpu:h100:0"), "or so many of them, as tpu:v5e:4x4 or gpu:h100:8"),
        (("--target", "gpu:h100:2000"), "or so many of them"),
        (("--target", "gpu:h100:8"), "what compiles for it (there is none); in an environment of its own: pip install"),
        (("--target", "tpu:v5e", "--no-compile"), "leave one of them out"),
        (("--time", "5", "--no-compile"), "leave one of them out"),
        (("--time", "5", "--target", "tpu:v5e"), "leave one of them out"),
        (("--time", "-1"), "expected 1 to"),
        (("--budget", "lots"), "expected a number of bytes"),
    ],
)
def test_impossible_wishes_are_refused(
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compile_target, "find_spec", lambda name: None)
    assert main(["remat", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_twelve_layers_compile_to_what_was_measured_before() -> None:
    """GPT 12 × 512 under a scan, batch 8 × 512 tokens: full needs less than 0.15 of what none does, in this order."""
    config = composed(
        *("data=synthetic", "data.gives=tokens", "data.seq_len=512", "data.batch_size=8", "data.size=32"),
        *("model.num_layers=12", "model.num_heads=8", "model.width=512", "model.hidden=2048", "model.activation=gelu"),
    )
    trace = remat_survey.CandidateCache(config, read_sources(config.data))
    options = [NoRemat(), AttentionOnly(), Dots(), DotsNoBatch(), Full()]
    rows = remat_survey.measure_policies(trace, options, remat_survey.SurveyRequest(), lambda line: None)
    found = [row.memory.temporaries for row in rows if row.memory]
    assert found == sorted(found, reverse=True)
    assert found[-1] <= 0.15 * found[0]
