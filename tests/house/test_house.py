"""The tool finds what is planted in small trees, and the product keeps the rows that are laws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.house import table
from tests.house.__main__ import draw_table, list_places, main
from tests.house.road import find_names_of_ours, find_road
from tests.house.source import Product, read_product
from tests.house.street import draw_arrows, find_back_arrows, find_knots, find_longest_path, read_order

REPO = Path(__file__).parents[2]
LAYERS = """
[[tool.importlinter.contracts]]
name = "the street"
type = "layers"
layers = ["run", "runner.top | runner.side", "runner.middle", "runner.ground"]
"""


def plant(root: Path, files: Mapping[str, str]) -> Product:
    """Write files below a folder and read them as a product."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return read_product(root)


def measure(product: Product, key: str) -> table.Figure:
    """Return what a row gives."""
    return table.ROWS[key].measure(product)


def test_rooms_and_arrows(tmp_path: Path) -> None:
    """Lazy, type-only, relative and whole-module imports are arrows; two imports between the same rooms are one."""
    product = plant(
        tmp_path,
        {
            "run.py": "from runner.top import a\nfrom runner.top import b\n",
            "runner/__init__.py": "",
            "runner/top/a.py": "def f():\n    from runner import middle\n",
            "runner/top/b.py": "from . import a\nfrom ..aside import x\n",
            "runner/middle.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import runner.ground\n",
            "runner/ground.py": "import os\n",
            "runner/aside.py": "",
            "models/__init__.py": "from .net import Net\n",
            "models/net.py": "from data.text import T\n",
            "data/text.py": "class T: ...\n",
        },
    )
    assert set(draw_arrows(product)) == {
        ("run", "runner.top"),
        ("runner.top", "runner.middle"),
        ("runner.top", "runner.aside"),
        ("runner.middle", "runner.ground"),
        ("models", "data"),
    }
    assert measure(product, "rooms").value == 8
    assert measure(product, "arrows").value == 5
    assert measure(product, "floors").places == ["run", "runner.top", "runner.middle", "runner.ground"]
    assert measure(product, "knot").value == 0


def test_knot(tmp_path: Path) -> None:
    """Three rooms in a circle are a knot that one arrow unties; a fourth room below them is not in it."""
    product = plant(
        tmp_path,
        {
            "runner/a.py": "import runner.b\n",
            "runner/b.py": "import runner.c\nimport runner.d\n",
            "runner/c.py": "def f():\n    import runner.a\n",
            "runner/d.py": "",
        },
    )
    knot = measure(product, "knot")
    assert (knot.value, knot.places) == (3, ["runner.a, runner.b, runner.c"])
    assert measure(product, "back").value == 1


def test_circle_of_files_within_a_room_is_no_knot(tmp_path: Path) -> None:
    product = plant(tmp_path, {"runner/a/x.py": "import runner.a.y\n", "runner/a/y.py": "import runner.a.x\n"})
    assert measure(product, "knot").value == measure(product, "arrows").value == 0


def test_back_arrow_by_the_contract(tmp_path: Path) -> None:
    """An arrow that closes no circle still runs up where pyproject.toml says so; neighbours on a floor do not."""
    product = plant(
        tmp_path,
        {
            "pyproject.toml": LAYERS,
            "runner/ground.py": "import runner.middle\n",
            "runner/side/x.py": "import runner.top\n",
            "runner/top.py": "",
            "runner/middle.py": "",
        },
    )
    assert read_order(product) == {
        "run": 0,
        "runner.top": 1,
        "runner.side": 1,
        "runner.middle": 2,
        "runner.ground": 3,
    }
    back = measure(product, "back")
    assert (back.value, back.places) == (1, ["runner.ground → runner.middle: runner/ground.py:1 runner.middle"])


def test_containers_and_contracts_within_a_room(tmp_path: Path) -> None:
    text = """
[[tool.importlinter.contracts]]
type = "layers"
containers = ["runner"]
layers = ["(top)", "middle : side"]
"""
    assert read_order(plant(tmp_path, {"pyproject.toml": text})) == {
        "runner.top": 0,
        "runner.middle": 1,
        "runner.side": 1,
    }
    inside = text.replace('["runner"]', '["runner.top"]')
    assert read_order(plant(tmp_path, {"pyproject.toml": inside})) == {}


def test_fewest_back_arrows() -> None:
    """Of two circles through one arrow, that arrow goes; a knot too large for that is untied as well."""
    assert find_back_arrows({("a", "b"), ("b", "c"), ("c", "a"), ("b", "d"), ("d", "a")}, {}) == [("a", "b")]
    ring = {(f"r{i:02}", f"r{(i + 1) % 20:02}") for i in range(20)}
    back = find_back_arrows(ring, {})
    assert len(find_knots(ring)[0]) == 20
    assert find_knots(ring - set(back)) == []
    assert len(find_longest_path({("a", "b"), ("b", "c"), ("a", "c")})) == 3


def test_function_names(tmp_path: Path) -> None:
    """Methods count, dunder methods do not; a leading underscore is no word."""
    text = "def go(): ...\ndef _told(): ...\ndef split_batch(): ...\nclass C:\n    def __init__(self): ...\n    def hold(self): ...\n"
    figure = measure(plant(tmp_path, {"models/m.py": text}), "one-word")
    assert figure.value == 75
    assert figure.places == ["models/m.py:1 go", "models/m.py:2 _told", "models/m.py:6 C.hold"]


@pytest.mark.parametrize(
    ("opening", "riddle"),
    [
        ("What a step needs.", True),
        ("The same, late.", True),
        ("A sum.", True),
        ("Add two.", False),
        ("The sum.", False),
    ],
)
def test_riddles(tmp_path: Path, opening: str, riddle: bool) -> None:
    product = plant(tmp_path, {"data/d.py": f'"""What a module is."""\ndef f():\n    """{opening}"""\n'})
    assert measure(product, "riddles").value == (100 if riddle else 0)


def test_comments(tmp_path: Path) -> None:
    """Comments beside code, in strings and for tools are none; blank lines are not among the lines."""
    text = '# Why.\n\nx = 1  # beside\ny = """\n# in a string\n"""\n# noqa: E501\n    # indented\n'
    product = plant(tmp_path, {"run.py": text, "data/bare.py": "x = 1\n" * 40})
    assert measure(product, "comments").value == pytest.approx(1000 * 2 / 47)
    assert measure(product, "comments").places == ["data/bare.py: 0 comments in 40 lines, 1 wanted"]


def test_imports_in_functions(tmp_path: Path) -> None:
    text = "import os\nfrom data.d import a as b\ndef f():\n    import json\n    from data.d import x, y\n    from data import d as e\n"
    product = plant(tmp_path, {"models/m.py": text, "data/d.py": ""})
    lazy = measure(product, "lazy")
    assert lazy.places == ["models/m.py:5 data.d", "models/m.py:6 data.d"]
    assert lazy.value == pytest.approx(1000 * 2 / 6)
    assert measure(product, "renames").places == ["models/m.py:2 a as b", "models/m.py:6 d as e"]


def test_repeated_names(tmp_path: Path) -> None:
    product = plant(
        tmp_path,
        {
            "data/__init__.py": "class Row: ...\ndef go(): ...\n",
            "models/__init__.py": "class Row: ...\ndef go(): ...\n",
            "models/text.py": "def go():\n    def inner(): ...\n",
            "data/text.py": "def inner(): ...\n",
        },
    )
    assert measure(product, "names").places == ["go (3): data/__init__.py:2, models/__init__.py:2, models/text.py:1"]
    assert measure(product, "classes").places == ["Row (2): data/__init__.py:1, models/__init__.py:1"]
    assert measure(product, "files").places == ["text (2): data/text.py, models/text.py"]


def test_sizes(tmp_path: Path) -> None:
    fields = "".join(f"    f{i}: int\n" for i in range(14))
    text = (
        f"from dataclasses import dataclass\nfrom typing import Any, ClassVar\n@dataclass(frozen=True)\nclass Wide:\n{fields}"
        f"@dataclass\nclass Narrow:\n    c: ClassVar[int]\n{fields.replace('    f0: int', '')}"
        "    def six(self, a, b, c, d, e, *, f): ...\n    def seven(self, a, b, c, d, e, f, **g: Any): ...\n"
        f"def long():\n{'    x = 1' + chr(10)}{'    x = 1' + chr(10) * 1}" + "    x = 1\n" * 78 + "x = [*(1, 2), *y]\n"
    )
    product = plant(tmp_path, {"models/m.py": text, "data/d.py": "\n" * 401, "README.md": "a\nb\n"})
    assert [place.split(" ", 1)[1] for place in measure(product, "fields").places] == ["Wide 14 fields"]
    assert [place.split(" ", 1)[1] for place in measure(product, "parameters").places] == ["Narrow.seven 7 parameters"]
    assert [place.split(" ", 1)[1] for place in measure(product, "long-functions").places] == ["long 81 lines"]
    assert measure(product, "long-files").places == ["data/d.py 401 lines"]
    assert len(measure(product, "any").places) == len(measure(product, "stars").places) == 1
    assert measure(product, "readme").value == 2


def test_road(tmp_path: Path) -> None:
    """Names of ours count once, wherever they are mentioned; locals, annotations, methods and foreign names do not."""
    product = plant(
        tmp_path,
        {
            "runner/launch/__init__.py": "",
            "runner/launch/main.py": "import sys\nfrom runner.session import experiment\nfrom runner.session.experiment import Never\nLIMIT = 3\n"
            "def main(argv: Never):\n    x = sys.argv\n    return experiment.run(x, LIMIT)\n",
            "runner/session/__init__.py": "",
            "runner/session/experiment.py": "from runner.session.attempt import run_attempt\n"
            "class Never: ...\ndef run(x, limit):\n    return run_attempt(x).finish()\n",
            "runner/session/attempt.py": "def run_attempt(x):\n    from runner.train.loop import train\n    return train(x)\n",
            "runner/train/loop.py": "def train(x):\n    return len(x)\n",
        },
    )
    road, missing = find_road(product)
    assert [function.name for _, function in road] == ["main", "run", "run_attempt", "train"]
    assert len(missing) == 1
    assert "train_step" in missing[0]
    assert set(find_names_of_ours(product, road)) == {"experiment", "run", "LIMIT", "run_attempt", "train"}
    assert "5 without" in measure(product, "road").text


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has every row; paths leave out the rows that say nothing of a part, and foreign places of a list."""
    product = plant(tmp_path, {"data/d.py": "def go(): ...\n", "models/m.py": "def go(): ...\ndef split_it(): ...\n"})
    assert [line.split()[0] for line in draw_table(product, [])[1:]] == list(table.ROWS)
    part = {line.split()[0]: line for line in draw_table(product, ["models"])[1:]}
    assert set(part) == {key for key, row in table.ROWS.items() if row.partial}
    assert "50 %" in part["one-word"]
    assert list_places(product, "one-word", ["data/"]) == ["data/d.py:1 go"]
    assert main(["--root", str(tmp_path), "--list", "one-word"]) == 0
    assert capsys.readouterr().out == "data/d.py:1 go\nmodels/m.py:1 go\n"


def test_limits() -> None:
    """A figure at its limit is within it, from either side; a word is neither."""
    most, least = table.ROWS["one-word"], table.ROWS["comments"]
    assert [most.is_reached(table.Figure(value)) for value in (most.limit, most.limit + 1)] == [True, False]
    assert [least.is_reached(table.Figure(value)) for value in (least.limit, least.limit - 1)] == [True, False]
    assert most.is_reached(table.Figure("see elsewhere")) is None


@pytest.fixture(scope="module")
def product() -> Product:
    return read_product(REPO)


def test_everything_is_measured(product: Product) -> None:
    """A folder that is moved or renamed does not silently leave the table."""
    assert len(product.modules) > 100
    assert {module.room for module in product.modules} >= {"run", "models", "data", "runner"}
    assert len(draw_table(product, [])) == len(table.ROWS) + 1


@pytest.mark.parametrize("key", table.LAWS)
def test_law(product: Product, key: str) -> None:
    row = table.ROWS[key]
    figure = row.measure(product)
    assert row.is_reached(figure), f"{row.title}: {figure.text}, wanted {row.want}\n" + "\n".join(figure.places)
