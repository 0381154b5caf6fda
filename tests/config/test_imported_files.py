"""Files beside a user's own that it imports: found, hashed, and refused where another module would be imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.config.code_origins import describe_origins, find_origins, list_changed_files
from runner.config.imported_files import list_imported_files
from runner.errors import ConfigError
from runner.launch.compose import compose_run


def write_files(folder: Path, **files: str) -> Path:
    """Write modules into a folder; return the one called main."""
    for name, code in files.items():
        path = folder.joinpath(*name.split("__of__")[::-1]).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    return folder / "main.py"


def test_what_is_imported_is_found_through_others_and_nothing_else(tmp_path: Path) -> None:
    main = write_files(
        tmp_path,
        main="import os, first\nfrom layers import dense\nimport jax\n",
        first="from second import x\nimport main\n",
        second="x = 1\nimport broken\n",
        broken="def (",
        unused="",
        queue="",
        init__of__layers="",
        dense__of__layers="",
    )
    (tmp_path / "layers" / "init.py").rename(tmp_path / "layers" / "__init__.py")
    found = [str(path.relative_to(tmp_path)) for path in list_imported_files(main)]
    assert found == ["broken.py", "first.py", "layers/__init__.py", "layers/dense.py", "second.py"]


def test_a_change_of_an_imported_file_is_told(tmp_path: Path) -> None:
    main = write_files(tmp_path, main="import helper\nProgram = helper.Program\n", helper="Program = 1\n")
    document = {"program": {"kind": "external", "target": f"{main}:Program"}}
    before = describe_origins(find_origins(document))
    (tmp_path / "helper.py").write_text("Program = 2\n")
    (line,) = list_changed_files(before, describe_origins(find_origins(document)))
    assert "helper.py has changed since then" in line


@pytest.mark.parametrize(
    "files",
    [
        {"main": "import models\n", "models": ""},
        {"main": "def build():\n    from data import load\n", "data": ""},
        {"main": "import helper\n", "helper": "from models import Net\n", "models": ""},
        {"main": "import optax\n", "optax": ""},
        {"main": "from models import Net\n", "__init____of__models": "", "tower__of__models": ""},
    ],
)
def test_another_module_than_the_one_beside_is_refused(tmp_path: Path, files: dict[str, str]) -> None:
    main = write_files(tmp_path, **{**files, "main": f"class Program: pass\n{files['main']}"})
    with pytest.raises(
        ConfigError, match=r"imports (models|data|optax), which is .* and not .*; give that one another"
    ):
        compose_run([f"program={main}:Program"])


@pytest.mark.parametrize(
    "files",
    [
        {"main": "import models\nimport queue\n", "queue": ""},
        {
            "main": "import models.tower\nfrom models.tower import x\n",
            "__init____of__models": "",
            "tower__of__models": "x = 1",
        },
        {"main": "from models import tower\n", "__init____of__models": "", "tower__of__models": ""},
        {"main": "from models import Cnn\n"},
    ],
)
def test_what_python_finds_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    main = write_files(tmp_path, **{**files, "main": f"class Program: pass\n{files['main']}"})
    assert compose_run([f"program={main}:Program"]).config.program.kind == "external"
