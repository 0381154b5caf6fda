"""remat=auto: costs of blocks are those of the whole, the least that fits is taken, and a run keeps what it chose."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runner.config import remat_policies
from runner.config.remat_policies import Names, RematPolicy
from runner.config.schema import Config
from runner.errors import ConfigError
from tests.bench.remat_auto import MODELS, check, measured
from tests.conftest import Door, assert_same, composed
from tests.laws.faults import Forks

AUTO = ("remat=auto", "remat.budget_bytes=1GB")
GPT = (
    *("data=synthetic", "data.gives=tokens", "data.seq_len=32", "data.batch_size=8", "model.num_layers=3"),
    *("model.num_heads=2", "model.width=32", "model.hidden=128", *AUTO),
)
RESNET = ("model=resnet", "data=digits", "model.stages=[1,2]", "model.width=8", "data.batch_size=16", *AUTO)
LOOP = ("model=mlp", "data=digits", "model.num_layers=4", *AUTO)


def _sources(config: Config) -> Any:
    from runner.train.dataset import read_sources

    return read_sources(config.data)


@pytest.mark.parametrize(
    "words",
    [
        (*GPT, "model.dropout=0.1", "train.microbatches=2"),
        pytest.param(
            ("model=vit", "data=digits", "model.num_layers=2", "model.width=16", "train.precision=bf16", *AUTO),
            marks=pytest.mark.slow,
        ),
        pytest.param(RESNET, marks=pytest.mark.slow),
    ],
    ids=["gpt", "vit", "resnet"],
)
def test_what_blocks_cost_is_what_the_whole_costs(words: tuple[str, ...]) -> None:
    """Bytes to the last one (in bf16: of rounded masks), FLOPs exactly; for a model that was traced once."""
    from runner.remat.auto_search import build_menu
    from runner.remat.candidates import trace_candidate

    config = composed(*words)
    sources = _sources(config)
    rows = {row.policy.kind: row for row in build_menu(config, sources).rows}  # of sets of tags, the last one
    for kind in ("names", "dots", "every_n", "none"):
        whole, row = trace_candidate(config, rows[kind].policy, sources), rows[kind]
        assert whole.flops == row.flops
        assert row.counted == pytest.approx(whole.counted, rel=1e-3)


def _fake(needs: dict[str, tuple[int, int]], *, least: bool = False) -> Any:
    """A menu of (bytes, FLOPs) by name; names with a + are sets of tags."""
    from runner.remat.auto_search import Menu, MenuRow

    fixed = {"none": remat_policies.NoRemat(), "dots": remat_policies.Dots(), "full": remat_policies.Full()}
    rows, sizes = [], {}
    for name, (num_bytes, flops) in needs.items():
        option: RematPolicy = fixed[name] if name in fixed else Names(save=tuple(name.split("+")))
        sizes[option] = num_bytes
        rows.append(MenuRow(option, num_bytes, num_bytes // 2 if least else 0, flops))
    known: dict[RematPolicy, int] = {}

    def ask(row: MenuRow) -> int:
        return known.setdefault(row.policy, sizes[row.policy])

    return Menu(sorted(rows, key=lambda row: row.flops), ask, known, is_counted=False)


MENU = {"none": (90, 100), "a+b+c": (60, 101), "dots": (50, 102), "a+b": (55, 104), "a+c": (40, 106), "b": (30, 110)}
MENU |= {"c": (25, 115), "full": (10, 130)}


@pytest.mark.parametrize("least", [True, False])
@pytest.mark.parametrize(
    ("budget", "name", "asked"),
    [(100, "none", 1), (65, "names(a, b, c)", 4), (54, "dots", 4), (45, "names(a, c)", 4), (12, "full", 5)],
)
def test_the_first_that_fits_is_taken(budget: int, name: str, asked: int, *, least: bool) -> None:
    """Where nothing can be ruled out, sets of tags are searched by halves."""
    from runner.remat.auto_search import choose_row

    menu = _fake(MENU, least=least)
    taken = choose_row(menu, budget)
    assert taken is not None
    assert taken.name == name
    assert least or len(menu.known) == asked
    ruled_out = [row for row in menu.rows if row.least > budget]
    assert not {row.policy for row in ruled_out} & menu.known.keys()
    assert choose_row(menu, 9) is None


def test_the_fastest_of_the_first_few_is_taken_where_steps_can_be_measured() -> None:
    from runner.remat.auto_search import choose_row

    seen = []

    def fastest(rows: Any) -> Any:
        seen.append([row.name for row in rows])
        return rows[-1]

    taken = choose_row(_fake(MENU), 52, fastest)
    assert seen == [["dots", "names(a, c)", "names(b)"]]
    assert taken is not None
    assert taken.name == "names(b)"
    only = choose_row(_fake(MENU), 12, fastest)
    assert only is not None
    assert only.name == "full"
    assert len(seen) == 1


def test_what_the_compiler_finds_no_room_for_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from runner.remat import auto_search

    def fails(_: Any, words: str) -> Any:
        raise jax.errors.JaxRuntimeError(words)

    traced: Any = None
    monkeypatch.setattr(
        auto_search, "measure_memory", partial(fails, words="RESOURCE_EXHAUSTED: XLA ran out of memory")
    )
    menu = _fake({"none": (auto_search._compile_bytes(traced), 100), "full": (10, 130)})
    taken = auto_search.choose_row(menu, 10**9)
    assert taken is not None
    assert taken.name == "full"
    assert any("no room" in line and "too large" in line for line in auto_search.format_menu(menu, 10**9, taken))
    monkeypatch.setattr(auto_search, "measure_memory", partial(fails, words="INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError):
        auto_search._compile_bytes(traced)


def test_steps_of_the_finalists_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.remat import auto_search

    monkeypatch.setattr(auto_search, "ROUNDS", 2)
    config, said = composed(*LOOP, "model.num_layers=2"), list[str]()
    rows = auto_search.build_menu(config, _sources(config)).rows[:2]
    taken = auto_search.find_fastest(config, _sources(config), rows, said.append)
    assert taken in rows
    times = {part.split(" with ")[1]: float(part.split(" ms with ")[0].split()[-1]) for part in said[-1].split(", ")}
    assert times.keys() == {row.name for row in rows}
    assert times[taken.name] == min(times.values())


@pytest.mark.parametrize(
    "model", ["resnet", *(pytest.param(model, marks=pytest.mark.slow) for model in ("gpt", "vit"))]
)
def test_no_policy_that_fits_recomputes_less(model: str) -> None:
    """Blocks of the first are in a loop, and are counted on a CPU, whose compiler undoes remat there."""
    lines = list(measured((*MODELS[model], *(("model.width=8",) if model == "resnet" else ()))))
    assert check(lines) >= (1 if model == "resnet" else 4)
    assert all((line.compiles == 0) == (model == "resnet") for line in lines)


def test_many_tags_are_chosen_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.remat import auto_search
    from runner.remat.block_costs import find_block_kinds
    from runner.remat.candidates import trace_candidate

    config = composed(*GPT)
    inside = find_block_kinds(trace_candidate(config, config.remat, _sources(config)), config)
    assert len(auto_search._list_useful_sets(inside)) == 2**4 - 1
    monkeypatch.setattr(auto_search, "MOST_TAGS", 2)
    assert [len(save) for save in auto_search._list_useful_sets(inside)] == [1, 2, 3, 4]


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., tuple[Any, str]]:
    """`resolve_auto` for a configuration: what it chose, and what it said."""

    def ask(config: Config, run: Path) -> tuple[Any, str]:
        from runner.remat.auto_choice import resolve_auto
        from runner.train.build import build

        said: list[str] = []
        found = resolve_auto(config, build(config), run, said.append, lambda: None)
        return found, "\n".join(said)

    return ask


def test_what_was_chosen_is_read_and_never_trusted(
    asked: Callable[..., tuple[Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.remat import auto_search

    once = auto_search.build_menu(composed(*LOOP), _sources(composed(*LOOP)))
    monkeypatch.setattr("runner.remat.auto_choice.build_menu", lambda config, sources: once)
    config = replace(composed(*LOOP), compile_cache=str(tmp_path / "cache"))
    run, other = tmp_path / "run/remat.json", tmp_path / "other/remat.json"
    for folder in (run.parent, other.parent):
        folder.mkdir()
    first, said = asked(config, run)
    assert "chosen\n" in said
    assert asked(config, run) == (first, f"remat=auto: {first.words}, as before")
    (cache,) = (tmp_path / "cache").glob("*/remat/*.json")
    assert asked(replace(config, seed=3), other)[1].endswith("as chosen for these shapes before")
    for broken in (
        "",
        "[]",
        '{"option": {"kind": "none"}}',
        run.read_text()[:80],
        run.read_text().replace("cpu", "gpu"),
        "[" * 20_000,
        '{"words": "\\u001b[2J", "option": {"kind": "none"}, "circumstances": {"budget": ' + "9" * 5000 + "}}",
    ):
        # Where the cache still has a choice it may be another one: that is told as well.
        run.write_text(broken)
        said = asked(config, run)[1]
        assert "chosen anew, because" in said, broken[:80]
        assert said.endswith("as chosen for these shapes before")
        for path in (run, cache):
            path.write_text(broken)
        said = asked(config, run)[1]
        assert "chosen anew, because" in said
        assert "looking for" in said
    cache.unlink()
    kept = json.loads(run.read_text()) | {"option": {"kind": "full"}}  # what a run chose counts, whatever is best now
    run.write_text(json.dumps(kept))
    assert asked(config, run)[0].option == remat_policies.Full()
    kept["option"] = {"kind": "names", "save": ["no such tag"]}
    run.write_text(json.dumps(kept))
    said = asked(replace(config, compile_cache="off"), run)[1]
    assert "chosen anew, because remat.json names a policy that this model does not have" in said
    assert "looking for" in said
    smaller = replace(config, remat=remat_policies.AutoRemat(budget_bytes="900MB"))
    assert "because of another budget" in asked(smaller, run)[1]


def test_a_choice_is_for_a_model_that_is_computed_in_that_way() -> None:
    """Keys of the model that may change in a continued run are not in its identity, but decide how much is stored."""
    from runner.config.identity import FREE_KEYS
    from runner.remat.auto_choice import _describe_circumstances
    from runner.train.build import build

    config = composed(*GPT)
    built = build(config)
    here = _describe_circumstances(config, built, 1)
    assert {key.removeprefix("model.") for key in FREE_KEYS if key.startswith("model.")} <= here.keys()
    chunked = replace(config, model=replace(config.model, loss_chunks=2))  # type: ignore[arg-type, call-arg]
    assert _describe_circumstances(chunked, built, 1) != here


def test_data_that_moved_needs_no_other_policy(tmp_path: Path) -> None:
    from runner.remat.auto_choice import _describe_circumstances
    from runner.train.build import build

    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for path in paths:
        Path(path).write_text("some text " * 400)
    before, after = (
        composed("data=text", "data.seq_len=16", f"data.path={path}", "model.num_layers=2", "remat=auto")
        for path in paths
    )
    built = build(before)
    here = _describe_circumstances(before, built, 1)
    assert _describe_circumstances(after, built, 1, {"data.path": paths[0]}) == here
    assert _describe_circumstances(after, built, 1) != here


def test_where_nothing_fits_it_is_told_what_would(asked: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    config = replace(composed(*LOOP), remat=remat_policies.AutoRemat(budget_bytes=1000), compile_cache="off")
    with pytest.raises(ConfigError, match=r"least is remat=\w+ with [\d.]+ kB; .*train.microbatches=2 \([\d.]+ kB\)"):
        asked(config, tmp_path / "remat.json")
    with pytest.raises(ConfigError, match="a cpu does not tell how much memory there is"):
        asked(replace(config, remat=remat_policies.AutoRemat()), tmp_path / "remat.json")
    assert not (tmp_path / "remat.json").exists()


def test_a_killed_run_goes_on_as_it_chose_and_ends_bit_for_bit(served: Forks, door: Door, tmp_path: Path) -> None:
    few = ("train.steps=20", "train.eval_steps=10", "train.eval_batches=1", "log.tensorboard=false")
    words = ("model=mlp", "data=digits", "model.num_layers=4", "model.dropout=0.1", "remat=auto", *few)
    words = (*words, "remat.budget_bytes=1GB", "ckpt=periodic", "ckpt.save.periodic.steps=5")
    whole = Door(tmp_path / "whole")
    whole.cwd.mkdir()
    done = served.run(whole.cwd, *words)
    assert done.returncode == 0, done.stdout
    assert served.run(door.cwd, *words, kill_at=12).returncode == -9
    chosen = json.loads((door.the_run / "remat.json").read_text())
    for cached in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("remat/*"):
        cached.unlink()
    done = served.run(door.cwd, *words)
    assert done.returncode == 0, done.stdout
    assert f"remat=auto: {chosen['words']}, as before" in done.stdout
    assert_same(door.the_run, whole.the_run, 20)
    lines = [json.loads(line) for line in (door.the_run / "attempts.jsonl").read_text().splitlines()]
    assert lines[-1]["needs"]["remat"] == chosen["option"]["kind"] != "auto"
    assert f"- remat: {chosen['words']}" in (door.the_run / "README.md").read_text()
    done = served.run(door.cwd, *words, "remat.budget_bytes=1000", "seed=1")
    assert done.returncode == 2
    assert "nothing fits into 1 kB" in done.stdout
    assert len(list(door.cwd.glob("outputs/*/*"))) == 1
