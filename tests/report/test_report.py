"""`python -m runner report`: what the page says is what the directories hold, and a real browser shows it."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import signal
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from runner.__main__ import main
from runner.profiling.window import Window
from runner.report.config_diff import DEFAULT, compare_configs
from runner.report.facts import read_facts, thin_curve
from runner.report.page import order_runs, render_page
from runner.report.remat_tradeoff import group_comparable_runs, measure_memory
from runner.report.run_table import MOST_ROWS, SHOWN_ROWS
from runner.report.script_data import MOST_POINTS, MOST_SAVES
from runner.rundir.layout import RunDir
from tests import synthetic
from tests.browser import Browser, browser, lacking
from tests.conftest import Door
from tests.laws.faults import Forks
from tests.profiling.test_profile_record import publish

# What a page has without any run, and a row of those that are in its text.
TEMPLATE_BYTES, ROW_BYTES = 60_000, 1000
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"{{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.facts: dict[str, Any] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.cells[-1] += data.strip()
        if self._open and self._open[-1] == "script" and self.tags[-1][1].get("id") == "facts":
            self.facts = json.loads(data)
            self.facts["runs"] = [self._decode(values) for values in self.facts["runs"]]

    def _decode(self, values: list[Any]) -> dict[str, Any]:
        """A run as the scripts see it."""
        empty = {"curves": [], "spans": [], "saves": [], "profiles": [], "undrawn": 0, "steps": None}
        run = {**empty, **dict(zip(self.facts["fields"], values, strict=False))}
        for name in ("state", "why", "metric"):
            run[name] = self.facts["words"][run[name]]
        return run


def of(*paths: Path, folder: Path | None = None, title: str = "title") -> str:
    facts = [read_facts(RunDir(path)) for path in paths]
    differs = compare_configs([each.document for each in facts], [each.words for each in facts])
    return render_page(facts, differs, title, folder or paths[0].parent)


def lr(value: float) -> dict[str, Any]:
    return {"optim": {"kind": "adamw", "lr": value}}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: two learning rates of which the larger sorts first as a word, one killed, one failed, one evil."""
    root = tmp_path_factory.mktemp("report") / "outputs" / "four"
    synthetic.write(root / "a", lr(0.5), ("optim.lr=0.5",), rate=0.004)
    synthetic.write(root / "b", lr(10), ("optim.lr=10",), killed_at=350)
    synthetic.write(root / "c", lr(9), ("optim.lr=9",), state="failed", why=f"ValueError: {EVIL}", steps=0)
    synthetic.write(root / "d", {**lr(1e-05), "model": {"kind": EVIL, "width": 128}}, ("optim.lr=1e-05",), rate=0.02)
    return root


def test_a_typed_word_stands_for_the_keys_that_it_chose() -> None:
    periodic = {"ckpt": {"save": {"periodic": {"steps": 100}}}, "optim": {"lr": 0.1}}
    best = {"ckpt": {"save": {"best": {"metric": "loss"}}}, "optim": {"lr": 0.1}}
    columns = compare_configs([periodic, best], [("ckpt=periodic",), ("ckpt=best", "optim.lr=0.1")]).columns
    assert [(column.key, column.values) for column in columns] == [("ckpt", ("periodic", "best"))]
    (column,) = compare_configs([periodic, best], [(), ("ckpt=best",)]).columns
    assert column.values == (DEFAULT, "best")
    other = {"ckpt": {"save": {"periodic": {"steps": 7}}}, "optim": {"lr": 0.1}}  # the YAML was edited in between
    (column,) = compare_configs([periodic, other], [("ckpt=periodic",), ("ckpt=periodic",)]).columns
    assert (column.key, column.values) == ("ckpt.save.periodic.steps", (100, 7))


def test_where_a_run_lives_is_no_difference_and_one_run_has_none() -> None:
    found = compare_configs([{"name": "a", "seed": 1}, {"name": "b", "seed": 2}], [(), ()])
    assert [column.key for column in found.columns] == ["seed"]
    assert found.name(1) == "seed=2"
    rates = compare_configs([lr(0.003), lr(1e-05), {"seed": 0}, lr(10)], [()] * 4)
    assert rates.order(4) == [1, 0, 3, 2]
    assert not compare_configs([{"seed": 1}], [()]).columns
    wide = [{f"key{number}": run for number in range(20)} for run in range(2)]
    assert len(compare_configs(wide, [(), ()]).columns) + len(compare_configs(wide, [(), ()]).more) == 20


def test_a_thinned_curve_keeps_its_spike_and_its_ends_and_invents_nothing() -> None:
    curve = [(step, 1.0) for step in range(5000)]
    curve[3400], curve[1717] = (3400, 90.0), (1717, -3.0)
    thin = thin_curve(curve, 50)
    assert len(thin) <= 50
    assert {curve[0], curve[1717], curve[3400], curve[-1]} <= set(thin)
    assert set(thin) <= set(curve)
    assert thin == sorted(thin)
    assert thin_curve(curve[:50], 50) == curve[:50]


def test_facts_are_what_the_files_say(tmp_path: Path) -> None:
    run = RunDir(synthetic.write(tmp_path / "run", killed_at=350, rate=0.02))
    with run.metrics.open("a") as out:
        out.write(
            '{"step": 1010, "split": "train", "loss": NaN}\n[1]\n{"step": 1020, "split": "tr'
        )  # torn, by a power loss
    facts = read_facts(run)
    assert [save.step for save in facts.saves] == list(range(100, 1001, 100))
    kept = {save.step: save.kept for save in facts.saves if save.kept is not None}
    (best,) = [save.step for save in facts.saves if save.is_best]
    assert kept.keys() == {int(path.name) for path in run.checkpoints.iterdir()} == {best, 900, 1000}
    assert "best" in kept[best]
    assert "newest" in kept[1000]
    assert facts.best is not None
    assert facts.best[0] == best
    assert [step for step, _ in facts.curves["train/loss"]] == list(range(10, 1001, 10))
    assert (facts.account.interruptions, facts.account.lost_steps) == (1, 50)
    assert facts.step_cost.seconds == pytest.approx(0.002)


def test_a_run_of_which_little_is_left_is_shown_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("[")
    assert "unknown" in Page(of(tmp_path / "run")).cells


def test_the_page_tells_what_the_runs_hold_and_links_lead_there(sweep: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "elsewhere" / "page.html"
    page.parent.mkdir()
    assert main(["report", str(sweep), "--to", str(page)]) == 0
    assert "4 runs" in capsys.readouterr().out
    found = Page(page.read_text())
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert {(page.parent / unquote(link or "")).resolve() for link in links} == set(sweep.glob("[a-d]"))
    told = read_facts(RunDir(sweep / "b"))
    assert told.best is not None
    for cell in ("optim.lr", "failed", f"{told.best[1]:.5g}", f"{100 * told.account.goodput:.1f} %", "50"):
        assert cell in found.cells, cell
    (run,) = (run for run in found.facts["runs"] if run["path"] == "b")
    index = found.facts["metrics"].index("eval/loss")
    grid, values = run["curves"][index]
    assert list(zip(found.facts["grids"][grid], values, strict=True)) == [
        (step, float(f"{value:.5g}")) for step, value in told.curves["eval/loss"]
    ]


def test_no_name_becomes_markup_and_nothing_is_loaded(sweep: Path) -> None:
    text = of(*sorted(sweep.glob("[a-d]")), title=EVIL)
    found = Page(text)
    assert [attributes.get("type") for tag, attributes in found.tags if tag == "script"] == ["application/json", None]
    assert not [tag for tag, _ in found.tags if tag in ("img", "iframe", "object", "embed")]
    assert EVIL in found.cells  # as text
    assert found.facts["runs"][2]["why"] == f"ValueError: {EVIL}"
    assert "49" not in found.cells
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "./").startswith((".", "data:,")), (tag, attributes)
    assert html.escape("default-src 'none'", quote=False) in text
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML", text)


def test_several_places_make_one_page_with_each_run_once(sweep: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(sweep / "a"), str(sweep)]) == 0
    names = [run["path"] for run in Page((tmp_path / "report.html").read_text()).facts["runs"]]
    assert names == ["d", "a", "c", "b"]  # by learning rate


def test_json_is_the_table(sweep: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["report", str(sweep / "b"), "--to", str(tmp_path / "one.html"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (run,) = document["runs"]
    assert (run["state"], run["interruptions"], run["lost_steps"]) == ("finished", 1, 50)
    assert document["bytes"] == (tmp_path / "one.html").stat().st_size


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("report", "nowhere"), 3, "nowhere: there is no such directory"),
        (("report", ".", "--to", "page.png"), 2, "a name that ends in .html"),
        (("report", ".", "--to", "no/page.html"), 2, "there is no directory no"),
    ],
)
def test_a_mistake_is_one_plain_line_and_makes_nothing(
    words: tuple[str, ...], code: int, told: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_really_killed(served: Forks, door: Door) -> None:
    words = ("model=mlp", "data=digits", "train.steps=60", "train.log_steps=5", "train.eval_steps=10")
    words = (*words, "ckpt.save.periodic.steps=10", "log.tensorboard=false")
    assert served.run(door.cwd, *words, kill_at=25).returncode == -signal.SIGKILL
    assert served.run(door.cwd, *words).returncode == 0
    assert main(["report", str(door.the_run)]) == 0
    assert read_facts(RunDir(door.the_run)).step_cost.needs is not None
    run = Page((door.the_run / "report.html").read_text()).facts["runs"][0]
    assert [(span[3], span[5]) for span in run["spans"]] == [("killed", 25), ("finished", 60)]
    there = {int(path.name) for path in (door.the_run / "checkpoints").iterdir() if path.name.isdecimal()}
    assert {save[0] for save in run["saves"] if save[2] is not None} == there
    metrics = [json.loads(line) for line in (door.the_run / "logs/metrics.jsonl").read_text().splitlines()]
    assert len(run["curves"][0][1]) == sum(line["split"] == "train" for line in metrics)


def needing(root: Path, name: str, remat: str, needs: dict[str, Any] | None, pace: float, **more: Any) -> Path:
    """A run of a policy, that says what its step needs."""
    document = {"remat": {"kind": remat}, **more}
    words = (f"remat={remat}", *(f"{key}={value}" for key, value in more.items() if not isinstance(value, dict)))
    return synthetic.write(root / name, document, words, pace=pace, needs=needs)


@pytest.fixture(scope="module")
def remats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies of one model, two of them with two seeds, and a model under a loop; what each needs is known by hand."""
    root, needs = tmp_path_factory.mktemp("remats") / "outputs" / "remats", synthetic.needs
    vit = {"model": {"kind": "vit", "width": 64}}
    needing(root, "a", "none", needs("none", 1000, 0), 0.010)
    needing(root, "b", "none", needs("none", 1000, 0), 0.014, seed=1)
    needing(root, "c", "full", needs("full", 200, 330), 0.016)
    needing(root, "d", "full", needs("full", 200, 330), 0.020, seed=1)
    needing(root, "e", "dots", needs("dots", 600, 0), 0.015)
    needing(root, "f", "ffn_only", needs("ffn_only", 800, 100), 0.017)  # dots needs less and is faster
    needing(root, "g", "full", needs("full", 300, 250, blocks="loop"), 0.030, **vit)
    needing(root, "h", "none", needs("none", 700, 0), 0.020, **vit)
    needing(root, "i", "none", None, 0.011, seed=2)  # of an old version
    return root


def all_of(root: Path) -> tuple[list[Any], Any]:
    facts = [read_facts(RunDir(path)) for path in sorted(root.glob("[a-z]"))]
    return facts, compare_configs([each.document for each in facts], [each.words for each in facts])


def test_policies_are_compared_where_runs_do_the_same_work(remats: Path) -> None:
    facts, differs = all_of(remats)
    mlp, vit = group_comparable_runs(facts, differs)
    assert [(point.policy, point.runs, point.memory) for point in mlp.points] == [
        *(("full", (2, 3), 500), ("dots", (4,), 1300)),
        *(("ffn_only", (5,), 1700), ("none", (0, 1), 2100)),
    ]
    full, dots, ffn_only, none = mlp.points
    assert full.seconds == pytest.approx((0.016, 0.018, 0.020))
    assert (full.extra, dots.extra, ffn_only.extra, none.extra) == (0.33, 0.0, 0.1, 0.0)
    assert mlp.best(lambda point: point.pace) == (0, 1, 3)
    assert mlp.best(lambda point: point.extra) == (0, 1)  # none needs more for the same
    assert (mlp.compiled, vit.compiled) == (True, False)
    assert [(point.policy, point.memory) for point in vit.points] == [("full", 400), ("none", 800)]
    assert "mlp" in mlp.name
    assert "vit" in vit.name
    assert measure_memory(facts, differs) == [2100, 2100, 500, 500, 1300, 1700, 400, 800, None]


def test_what_changes_a_step_is_not_compared_and_a_seed_is_no_change(tmp_path: Path) -> None:
    needs = synthetic.needs
    needing(tmp_path, "a", "none", needs("none", 1000, 0), 0.01)
    needing(tmp_path, "b", "full", needs("full", 200, 330), 0.01, seed=5)
    assert [len(group.points) for group in group_comparable_runs(*all_of(tmp_path))] == [2]
    needing(tmp_path, "c", "dots", needs("dots", 500, 0, held=150), 0.01)  # another optimizer
    needing(tmp_path, "d", "dots", needs("dots", 500, 0), 0.01, train={"precision": "bf16"})
    needing(tmp_path, "e", "dots", needs("dots", 500, 0) | {"flops": 2000}, 0.01)
    synthetic.write(tmp_path / "f", {"remat": {"kind": "dots"}}, needs=needs("dots", 500, 0), hardware="1 × H200")
    assert [[point.policy for point in group.points] for group in group_comparable_runs(*all_of(tmp_path))] == [
        ["full", "none"]
    ]


def test_a_policy_that_auto_chose_is_told_apart(tmp_path: Path) -> None:
    needing(tmp_path, "a", "dots", synthetic.needs("dots", 500, 0), 0.01)
    auto = needing(tmp_path, "b", "auto", synthetic.needs("dots", 500, 0), 0.01)
    (auto / "remat.json").write_text(json.dumps({"words": "dots: 600 bytes of 1 kB"}))
    (group,) = group_comparable_runs(*all_of(tmp_path))
    assert [point.policy for point in group.points] == ["dots", "auto: dots"]
    assert "auto chose dots: 600 bytes of 1 kB" in of(tmp_path / "a", auto)


def test_the_page_tells_memory_where_it_is_known(remats: Path, sweep: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(remats), "--to", str(page), "--json"]) == 0
    runs = {Path(run["run"]).name: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert (runs["c"]["memory_bytes"], runs["c"]["recompute"]) == (500, 0.33)
    assert (runs["i"]["memory_bytes"], runs["i"]["recompute"]) == (None, None)
    found = Page(page.read_text())
    for cell in ("memory", "500 bytes", "33 %", "16 – 20"):
        assert cell in found.cells, cell
    assert [figure["compiled"] for figure in found.facts["frontiers"]] == [True, False]
    assert "as it was counted" in page.read_text()
    without = Page(of(*sorted(sweep.glob("[a-d]"))))
    assert without.facts["frontiers"] == []
    assert "memory" not in without.cells
    one = Page(of(remats / "a", remats / "b"))  # one policy, two seeds
    assert one.facts["frontiers"] == []
    assert "2.1 kB" in one.cells


def test_a_run_whose_record_is_torn_has_no_memory(tmp_path: Path) -> None:
    needing(tmp_path, "a", "none", synthetic.needs("none", 1000, 0), 0.01)
    needing(tmp_path, "b", "full", {"remat": EVIL, "compiled": None}, 0.01)
    facts, differs = all_of(tmp_path)
    assert measure_memory(facts, differs) == [2100, None]
    assert "ms / step" in Page(of(tmp_path / "a", tmp_path / "b")).cells


def test_a_run_of_many_takes_less_than_a_kilobyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand runs are then less than ten megabytes: here a tenth of them, with a tenth of what they share."""
    monkeypatch.setattr("runner.report.script_data.MOST_POINTS", MOST_POINTS // 10)
    monkeypatch.setattr("runner.report.script_data.MOST_SAVES", MOST_SAVES // 10)
    needs = {0.004: synthetic.needs("none", 1000, 0), 0.01: synthetic.needs("full", 100, 330)}
    few = [
        read_facts(RunDir(synthetic.write(tmp_path / str(rate), killed_at=350, rate=rate, needs=found)))
        for rate, found in needs.items()
    ]
    facts = [few[number % 2] for number in range(1000)]
    differs = compare_configs(
        [lr(number) for number in range(1000)], [(f"optim.lr={number}",) for number in range(1000)]
    )
    text = render_page(facts, differs, "thousand", tmp_path)
    assert len(text.encode()) - SHOWN_ROWS * ROW_BYTES - TEMPLATE_BYTES < 1000 * 1000
    assert len(Page(text).facts["runs"]) == 1000
    (figure,) = Page(text).facts["frontiers"]
    assert [len(runs) for _, runs, *_ in figure["points"]] == [500, 500]


def test_a_trace_of_some_steps_is_on_the_page(tmp_path: Path) -> None:
    run = RunDir(synthetic.write(tmp_path / "run"))
    publish(run.profile, Window(100, 104, 100))
    (told,) = Page(of(run.path)).facts["runs"][0]["profiles"]
    assert told == [
        "100-104",
        "steps 100 to 104, 42 ms a step: matrix products 61.0 %, copies 3.0 %, other work 20.0 %, idle 16.0 %",
        [["dot.3", "matmul", 0.5, 0.1, 15]],
    ]


def test_how_fast_it_went_is_in_the_table(tmp_path: Path) -> None:
    run = RunDir(synthetic.write(tmp_path / "run"))
    more = '"paused": 1.0, "examples_per_second": 320.0, "tokens_per_second": 40960.4, "mfu": 0.4123'
    lines = [f'{{"step": {step}, "event": "train", "steps": 10, "seconds": 1.5, {more}}}' for step in (10, 20, 30)]
    run.timing.write_text("\n".join(lines))
    cells = Page(of(run.path)).cells
    head, row = cells[: len(cells) // 2], cells[len(cells) // 2 :]
    found = dict(zip(head, row, strict=True))
    # Without what training waited for.
    assert (found["ms / step"], found["tokens / s"], found["MFU"]) == ("50", "40,960", "41.2 %")
    assert "examples / s" not in found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if reason := lacking():
        pytest.skip(reason)
    with browser() as found:
        yield found


@pytest.fixture
def opened(chromium: Browser, sweep: Path, tmp_path: Path) -> Callable[..., Browser]:
    """The page of the sweep in a real browser."""
    page = tmp_path / "page.html"
    page.write_text(of(*sorted(sweep.glob("[a-d]")), folder=tmp_path, title=EVIL))

    def open_page(**look: Any) -> Browser:
        chromium.open(page, **look)
        return chromium

    return open_page


def column(page: Browser, number: int) -> list[str]:
    return page.run(
        f"return [...document.querySelectorAll('#table tbody tr')].map(row => row.cells[{number}].innerText)"
    )


def test_the_table_is_sorted_by_a_click_and_numbers_as_numbers(opened: Callable[..., Browser]) -> None:
    page = opened()
    head = page.run("return [...document.querySelectorAll('#table thead th')].map(head => head.innerText)")
    rate, best = head.index("optim.lr"), head.index("best eval/loss")
    page.click(f"#table thead th:nth-child({rate + 1}) button")
    assert column(page, rate) == ["1e-05", "0.5", "9", "10"]
    page.click(f"#table thead th:nth-child({rate + 1}) button")
    assert column(page, rate) == ["10", "9", "0.5", "1e-05"]
    state = head.index("state")
    page.click(f"#table thead th:nth-child({state + 1}) button")
    assert column(page, state) == ["failed", "finished", "finished", "finished"]
    for _ in range(2):  # what has no score comes last, whichever way
        page.click(f"#table thead th:nth-child({best + 1}) button")
        assert column(page, best)[-1] == ""
    assert page.complaints() == []


def test_curves_are_drawn_with_a_cross_and_the_legend_switches_them(opened: Callable[..., Browser]) -> None:
    page, curves = opened(), "return document.querySelectorAll('figure:first-child path.curve').length"
    assert page.run(curves) == 3  # one of the four never logged anything
    assert page.run("return document.querySelector('figure path.stop').getAttribute('d').split('M').length - 1") == 1
    page.click("#legend .chip:nth-child(2)")
    assert page.run(curves) == 2
    assert page.run("return document.querySelector('figure path.stop').getAttribute('d')") == ""
    before = page.run("return document.querySelector('figure path.curve').getAttribute('d')")
    page.click("figure .chip")
    assert page.run("return document.querySelector('figure path.curve').getAttribute('d')") != before
    page.run(
        "const box = document.getElementById('filter'); box.value = 'failed'; box.dispatchEvent(new Event('input'))"
    )
    assert page.run("return [...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden).length") == 1
    assert page.complaints() == []


def test_curves_that_lie_on_one_another_are_told(chromium: Browser, tmp_path: Path) -> None:
    same = [synthetic.write(tmp_path / name, {"seed": name}, (f"seed={name}",)) for name in "ab"]
    other = synthetic.write(tmp_path / "c", {"seed": "c"}, ("seed=c",), rate=0.5)
    page = tmp_path / "page.html"
    for runs, told in (([*same, other], "3 runs on 2 curves: equal in five digits"), ([same[0], other], None)):
        page.write_text(of(*runs))
        chromium.open(page)
        assert chromium.run("return document.querySelector('figure .same')?.textContent ?? null") == told
    assert chromium.complaints() == []


def test_a_click_on_a_run_shows_its_attempts_and_checkpoints(opened: Callable[..., Browser]) -> None:
    page = opened()
    page.click("#table tbody tr:nth-child(2) td:nth-child(3)")
    shown = page.run("return document.getElementById('run').innerText")
    for words in ("2 attempts", "killed during step", "350", "10 checkpoints, 3 kept", "every 100 steps", "deleted"):
        assert words in shown, words
    assert page.complaints() == []


def test_what_is_pointed_at_is_told(opened: Callable[..., Browser], sweep: Path) -> None:
    page = opened()

    def told(shape: str, place: str) -> str:
        return page.run(
            f"const shape = document.querySelector({shape!r}); shape.scrollIntoView({{block: 'center'}});"
            f"const box = shape.getBoundingClientRect(), [x, y] = {place};"
            f"shape.dispatchEvent(new PointerEvent('pointermove', {{clientX: x, clientY: y, bubbles: true}}));"
            "const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.innerText"
        )

    start, end = "[box.left + 2, box.top + 2]", "[box.right - 4, box.bottom - 4]"
    found = re.search(r"^lr=0.5 .*\ntrain/loss ([0-9.]+) at step ([0-9,]+)$", told("figure path.curve", end))
    assert found
    losses = dict(read_facts(RunDir(sweep / "a")).curves["train/loss"])
    assert float(found[1]) == float(f"{losses[int(found[2].replace(',', ''))]:.4g}")
    saved = told("#saves path.kept", end)
    assert "saved: every 100 steps" in saved
    assert "kept: " in saved
    assert told("#time path[style*=import]", start) == "lr=0.5 kind=mlp\nstarting Python 4 s\nattempt 1, finished"
    assert page.complaints() == []


def test_the_frontier_is_drawn_by_time_and_by_what_is_recomputed(
    chromium: Browser, remats: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(of(*sorted(remats.glob("[a-z]")), folder=tmp_path))
    for width, dark in ((1280, False), (390, True)):
        chromium.open(page, width=width, dark=dark)
        assert chromium.run("return document.querySelectorAll('#remat figure svg').length") == 2
        first = "document.querySelector('#remat figure[data-place=\"0\"]')"
        kept = f"return [...{first}.querySelectorAll('circle.kept')].map(each => each.dataset.policy)"
        assert chromium.run(kept) == ["full", "dots", "none"]
        assert chromium.run(f"return {first}.querySelectorAll('circle.gone').length") == 1
        names = chromium.run(f"return [...{first}.querySelectorAll('text.name')].map(each => each.textContent)")
        assert sorted(names) == ["dots", "ffn_only", "full", "none"]
        told = (
            f"const box = {first}.querySelector('circle.touch').getBoundingClientRect();"
            f"{first}.querySelector('circle.touch').dispatchEvent(new PointerEvent('pointermove', {{clientX: box.left, clientY: box.top}}));"
            "return document.getElementById('tip').innerText"
        )
        assert chromium.run(told) == (
            "full, 2 runs\n500 bytes on one device, says the compiler\n18 ms / step (16 – 20)\n33 % recomputed"
        )
        chromium.click("#remat figure .chip")
        assert chromium.run(kept) == ["full", "dots"]
        assert chromium.run("return document.documentElement.scrollWidth") <= width
    head = chromium.run("return [...document.querySelectorAll('#table thead th')].map(head => head.innerText)")
    size = head.index("memory")
    chromium.click(f"#table thead th:nth-child({size + 1}) button")
    assert column(chromium, size)[:3] == ["400 bytes", "500 bytes", "500 bytes"]
    assert column(chromium, size)[-2:] == ["2.1 kB", ""]
    assert chromium.complaints() == []


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A page of more runs than it draws at once, and how many these are; the scores get better with the number."""
    folder, count = tmp_path_factory.mktemp("crowd"), MOST_ROWS + 100
    few = read_facts(RunDir(synthetic.write(folder / "run", killed_at=350)))
    found = [dataclasses.replace(few, best=(1000, 2.0 - number / count)) for number in range(count)]
    differs = compare_configs(
        [lr(number) for number in range(count)], [(f"optim.lr={number}",) for number in range(count)]
    )
    order = order_runs(found, differs)
    page = folder / "page.html"
    page.write_text(render_page([found[run] for run in order], differs.reorder(order), "crowd", folder))
    return page, count


def test_of_many_runs_the_best_are_listed_and_drawn_first(chromium: Browser, crowd: tuple[Path, int]) -> None:
    page, count = crowd
    chromium.open(page)
    assert column(chromium, 0) == [f"lr={number}" for number in range(count - 1, count - 1 - SHOWN_ROWS, -1)]
    assert chromium.run("return document.querySelectorAll('#time .name').length") == SHOWN_ROWS
    assert chromium.run("return document.querySelector('figure .many').querySelectorAll('.curve').length") == SHOWN_ROWS
    for place in ("#left", "#curves .note"):
        told = chromium.run(f"return document.querySelector('{place}').innerText")
        assert f"the first {SHOWN_ROWS} of {count} runs" in told
    chromium.click("#left button")
    assert len(column(chromium, 0)) == 2 * SHOWN_ROWS
    assert not chromium.complaints()


def test_of_many_runs_any_is_found_by_sorting_and_by_words(chromium: Browser, crowd: tuple[Path, int]) -> None:
    page, count = crowd
    chromium.open(page)
    chromium.click("#table thead th:nth-child(2) button")
    assert column(chromium, 0)[:3] == ["lr=0", "lr=1", "lr=2"]
    chromium.click("#table thead th:nth-child(2) button")
    assert column(chromium, 0)[:2] == [f"lr={count - 1}", f"lr={count - 2}"]
    typed = (
        "const box = document.getElementById('filter'); box.value = 'optim.lr=7'; box.dispatchEvent(new Event('input'))"
    )
    chromium.run(typed)
    found = column(chromium, 0)
    assert found == sorted((name for name in found if name.startswith("lr=7")), key=lambda name: -int(name[3:]))
    assert len(found) == 11
    assert chromium.run("return document.getElementById('left').hidden")
    # A row that the script made has all that one of the page's own has.
    chromium.click("#table tbody tr:last-child td")
    assert "lr=7" in chromium.run("return document.getElementById('run').innerText")
    made, own = (
        chromium.run(f"return [...document.querySelector('{row}').cells].map(cell => [cell.tagName, cell.className])")
        for row in ("#table tbody tr:last-child", "#table tbody tr:first-child")
    )
    assert made == own
    assert not chromium.complaints()


def test_a_finger_is_told_as_well_until_it_taps_elsewhere(opened: Callable[..., Browser]) -> None:
    page = opened(width=390)
    place = "const box = document.querySelector('#saves path.kept').getBoundingClientRect(); return [box.right - 4, box.bottom - 4]"
    page.run("document.querySelector('#saves').scrollIntoView({block: 'center'})")
    told = "const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.innerText"
    page.tap(*page.run(place))
    assert "saved: every 100 steps" in page.run(told)
    page.tap(2, 2)
    assert page.run(told) == ""
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways_and_no_name_is_run(opened: Callable[..., Browser], width: int, *, dark: bool) -> None:
    page = opened(width=width, dark=dark)
    assert page.run("return document.documentElement.scrollWidth") <= width
    background = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background) < 64) is dark
    wide = "return [...document.querySelectorAll('main svg')].filter(each => each.scrollWidth > each.parentElement.clientWidth)"
    assert page.run(wide) == []
    assert page.run("return document.querySelectorAll('img, main script').length") == 0
    assert page.run("return document.querySelectorAll('#time path').length") > 5
    assert page.complaints() == []
