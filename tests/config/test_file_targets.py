"""Code of the user's own by the name of its file, and in packages that are called as ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import data
import models
from data.user_target import import_target
from runner.config.code_origins import find_origins
from runner.config.user_code import check_targets_exist
from runner.errors import ConfigError
from tests.conftest import REPO


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with packages of a user's that have our names."""
    for name, text in {
        "nets/tower.py": "from blocks import WIDTH\nclass Tower: width = WIDTH\n",
        "nets/blocks.py": "WIDTH = 7\n",
        "nets/resnet.py": "class Net: whose = 'theirs'\n",
        "pack/__init__.py": "",
        "pack/inner/__init__.py": "",
        "pack/inner/net.py": "from ..base import BASE\nfrom . import side\nclass Net: base, side = BASE, side.SIDE\n",
        "pack/inner/side.py": "SIDE = 2\n",
        "pack/base.py": "BASE = 1\n",
        "models/__init__.py": "",
        "models/tower.py": "from models.layers import LAYER\nfrom .layers import LAYER as SAME\nclass Tower: layer = LAYER, SAME\n",
        "models/layers.py": "LAYER = 5\n",
        "models/resnet.py": "from .layers import LAYER\nclass ResNet: whose = 'theirs', LAYER\n",
        "data/mine.py": "def load(): return 'theirs'\n",
        "a folder/it's 100%.py": "class Net: pass\n",
        "models.py": "class Net: pass\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    path, modules = [*sys.path], set(sys.modules)
    own = {package: [*package.__path__] for package in (models, data)}
    yield tmp_path
    sys.path[:] = path
    for package, folders in own.items():
        package.__path__[:] = folders
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def checked(target: str) -> object:
    document = {"model": {"kind": "external", "target": target}}
    check_targets_exist(document)
    return import_target(target)


def found(target: str) -> None:
    """Look for a target, and import it, as a run does."""
    from runner.config.user_code import _import_target

    check_targets_exist({"model": {"kind": "external", "target": target}})
    _import_target("model.target", target)


def test_a_file_is_found_by_its_path_and_finds_what_lies_beside_it(here: Path) -> None:
    for target in ("nets/tower.py:Tower", "./nets/tower.py:Tower", f"{here}/nets/tower.py:Tower"):
        assert checked(target).width == 7  # type: ignore[attr-defined]
    assert checked("a folder/it's 100%.py:Net").__name__ == "Net"  # type: ignore[attr-defined]


def test_a_file_takes_the_place_of_no_module_of_its_name(here: Path) -> None:
    assert checked("nets/resnet.py:Net").whose == "theirs"  # type: ignore[attr-defined]
    import models.resnet

    assert models.resnet.__file__ == str(REPO / "models/resnet.py")


def test_a_file_of_a_package_imports_as_a_part_of_it(here: Path) -> None:
    net = checked("pack/inner/net.py:Net")
    assert (net.base, net.side) == (1, 2)  # type: ignore[attr-defined]


def test_a_package_that_is_called_as_ours_is_found(here: Path) -> None:
    assert checked("models.tower:Tower").layer == (5, 5)  # type: ignore[attr-defined]
    assert checked("data.mine:load")() == "theirs"  # type: ignore[operator]


def test_a_module_that_ours_has_as_well_is_named_by_its_file(here: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"models.resnet is Holdfast's own; name the file of yours: ./models/resnet.py:ResNet"
    ):
        checked("models.resnet:ResNet")
    assert checked("./models/resnet.py:ResNet").whose == ("theirs", 5)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"models is Holdfast's own; name the file of yours: ./models.py:Net"):
        checked("models:Net")
    assert checked("./models.py:Net").__name__ == "Net"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nets/towr.py:Tower", "there is no file nets/towr.py; did you mean tower.py?"),
        ("nets/tower.py:Towre", "nets/tower.py has no 'Towre'; did you mean Tower?"),
        ("nowhere/tower.py:Tower", "there is no file nowhere/tower.py; check the path"),
        ("nets/tower.py", "expected module:attribute, such as nets/tower.py:MyModel"),
        ("nets/tower.py:", "expected module:attribute"),
        ("nets/tower:Tower", "did you mean nets.tower:Tower"),
        ("nets:Tower", "nets has no 'Tower'"),
        ("models.towr:Tower", "there is no module models.towr"),
    ],
)
def test_a_file_that_is_not_there_is_one_line(target: str, message: str, here: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        found(target)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "globals()['Late'] = int\n",
        "from blocks import *\n",
        "def __getattr__(name): return int\n",
        "import sys\nsetattr(sys.modules[__name__], 'Late', int)\n",
        "if True:\n    Late = int\n",
        "for Late in (int,): pass\n",
        "(first, (Late, *rest)) = (int, (int, int))\n",
        "from builtins import int as Late\n",
        "syntax error (\n",
    ],
)
def test_a_name_that_may_be_there_is_not_refused_before_it_is_imported(text: str, here: Path) -> None:
    (here / "nets/late.py").write_text(text)
    check_targets_exist({"model": {"kind": "external", "target": "nets/late.py:Late"}})


def test_the_files_of_a_target_are_those_that_are_hashed(here: Path) -> None:
    def files(target: str) -> set[str]:
        (origin,) = find_origins({"model": {"kind": "external", "target": target}})
        return {str(file.resolve().relative_to(here.resolve())) for file in origin.files}

    assert files("nets/resnet.py:Net") == {"nets/resnet.py"}
    assert files("pack/inner/net.py:Net") >= {"pack/inner/net.py", "pack/inner/side.py"}
    assert files("models.tower:Tower") == {
        "models/__init__.py",
        "models/tower.py",
        "models/layers.py",
        "models/resnet.py",
    }


def test_a_whole_run_of_files(here: Path) -> None:
    """From the command line, with data that worker processes read as well; and nothing is left of a wrong one."""
    (here / "nets/net.py").write_text(
        "from flax import nnx\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self, in_features: int, num_classes: int, *, rngs):\n"
        "        self.map = nnx.Linear(in_features, num_classes, rngs=rngs)\n"
        "    def __call__(self, x): return self.map(x)\n"
    )
    (here / "data/mine.py").write_text(
        "import numpy as np\ndef load(): return {'inputs': np.eye(40, dtype='f4'), 'label': np.arange(40) % 4}\n"
    )
    words = ("train.steps=4", "train.eval_steps=2", "data.batch_size=4", "log.tensorboard=false", "data.workers=1")
    run = [sys.executable, REPO / "run.py", "model=./nets/net.py:Net", *words]
    for source in ("data=data.mine:load", "data=./data/mine.py:load"):
        done = subprocess.run([*run, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "164 parameters" in done.stdout
    made = sorted(here.glob("outputs/default/*"))
    assert len(made) == 2
    wrong = subprocess.run([*run[:2], "model=./nets/nte.py:Net", *words], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert (
        wrong.stderr == "error: model.target: ./nets/nte.py:Net: there is no file nets/nte.py; did you mean net.py?\n"
    )
    assert sorted(here.glob("outputs/default/*")) == made
