"""The pages show what is: their commands run, their tables name every choice, and what they name is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import signal
import time
import tomllib

import pytest

from runner.__main__ import VERBS, VerbParser
from tests.conftest import QUICK_RUN, REPO, Door
from tests.docs.pages import PAGES, blocks_outside_recipes, find_blocks, shell_lines, transcript_lines
from tests.hf_folders import write_llama, write_tokenizer
from tests.laws.faults import Forks

BLOCKS = blocks_outside_recipes()
README = PAGES["README.md"]
SHORT = ("train.steps=2", "train.eval_steps=1", "train.eval_batches=1", "log.tensorboard=false")
TINY_GPT = ("model.num_layers=1", "model.width=16", "model.hidden=16", "data.seq_len=16")
# What needs a run of a certain name, Slurm, Optuna or several processes is in tests/launch and tests/laws; the example of
# one's own has a test below.
ELSEWHERE = re.compile("dir=outputs|launcher=slurm|sweeper=optuna|hosts=|waves:|init_from=s3")


def commands() -> list[str]:
    """Return every distinct `python run.py …` of the pages: of a sweep its first run (tests/launch has more of them)."""
    lines = [line for line in shell_lines(BLOCKS) if line.startswith("python run.py ") and not ELSEWHERE.search(line)]
    first = [" ".join(part.split(",")[0] for part in line.split()) if " -m " in line else line for line in lines]
    return list(dict.fromkeys(first))


def write_files(door: Door) -> None:
    """Write the files that the pages show, by their titles or first lines, where the commands are typed."""
    for block in BLOCKS:
        named = re.match(r"# (\w+\.py)\b", block.text)
        if file := named[1] if named else block.file:
            (door.cwd / file).parent.mkdir(parents=True, exist_ok=True)
            (door.cwd / file).write_text(block.text)


# --- commands ---


def test_there_are_commands_to_run() -> None:
    assert len(commands()) >= 20
    lines = shell_lines(find_blocks(README))
    assert "pip install -c constraints.txt -e . && python run.py" in lines  # .ci/run types these two
    assert any(re.fullmatch(r"pip install .* && pytest( .*)?", line) for line in lines)


# Always those of the first page and every third of the others; the rest with `pytest -m slow tests/docs`.
ON_THE_FIRST_PAGE = [command for command in commands() if command.split(" -m ")[0] in README]
OTHERS = [command for command in commands() if command not in ON_THE_FIRST_PAGE]


@pytest.mark.parametrize(
    "command",
    [
        *ON_THE_FIRST_PAGE,
        *(pytest.param(command, marks=pytest.mark.slow if at % 3 else ()) for at, command in enumerate(OTHERS)),
    ],
)
def test_its_commands_run(command: str, served: Forks, door: Door) -> None:
    # A bucket of these pages is a folder beside the disk here: tests/laws have a server of S3's protocol.
    here = command.replace("s3://BUCKET", f"file://{door.cwd}/bucket").replace("file:///mnt", f"file://{door.cwd}/mnt")
    words = shlex.split(here.replace("FOLDER", "."))[2:]
    if "--help" in words:
        shown = door.run(*words)
        assert shown.returncode == 0
        rules = sorted(path.stem for path in (REPO / "conf/retention").glob("*.yaml"))
        assert f"retention: {', '.join(rules)}" in shown.stdout
        return
    write_files(door)
    if "hf:llama" in command:
        write_llama(door.cwd / "llama", vocab=write_tokenizer(door.cwd / "llama", door.cwd / "corpus.txt"))
        words.append("data.seq_len=16")
    if "RUN" in command:
        assert served.run(door.cwd, "train.steps=2", *SHORT[1:], *TINY_GPT, **QUICK_RUN).returncode == 0
        words = [word.replace("RUN", str(door.the_run)).replace("step=400", "step=1") for word in words]
    typed = {word.split("=")[0] for word in words} | {"train.steps"}
    own = any(
        word.startswith(("dir=", "program=", "model=mlp", "model=tower:", "model=./", "model=hf", "experiment="))
        for word in words
    )
    words = [word for word in words if not word.startswith("train.steps=")]
    extra = [word for word in (*SHORT, *(() if own else TINY_GPT)) if word.split("=")[0] not in typed]
    # Three epochs of the digits are short.
    length = () if any(word.startswith("train.epochs=") for word in words) else ("train.steps=2",)
    done = served.run(door.cwd, *words, *length, *extra, **QUICK_RUN)
    assert done.returncode == 0, done.stdout


def test_its_verbs_take_what_is_typed() -> None:
    lines = [*transcript_lines(BLOCKS), *shell_lines(BLOCKS)]
    typed = [line for line in lines if line.startswith("python -m runner ")]
    assert len(typed) >= len(VERBS)
    for line in typed:
        verb, *words = shlex.split(re.split(" > | && ", line)[0])[3:]
        tool = importlib.import_module(f"runner.{VERBS[verb][0]}")
        parser = VerbParser()
        tool.add_arguments(parser)
        parser.parse_args(words)  # raises ConfigError where an option or a word is not taken


def test_every_verb_is_shown() -> None:
    shown = {line.split()[3] for line in transcript_lines(BLOCKS) if line.startswith("python -m runner ")}
    assert set(VERBS) <= shown


def test_its_errors_are_what_is_said(door: Door) -> None:
    write_files(door)
    said = [found for page in PAGES.values() for found in re.findall(r"\$ python run\.py (.*)\n(error: .*)\n", page)]
    assert len(said) >= 4
    for command, error in said:
        assert door.run(*command.split()).stderr.strip() == error


# --- the example of one's own model, data and loss ---


def kill_once_saved(door: Door, *words: str) -> None:
    """Start a run, and SIGKILL it as soon as it has a checkpoint."""
    process = door.start(*words)
    while not [*door.cwd.glob("outputs/*/*/checkpoints/[1-9]*/holdfast.json")]:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("at", [0, 1])
def test_its_example_of_ones_own_runs_as_written(at: int, door: Door) -> None:
    """The first command is killed once; typed again it ends near the best possible, -1.21 nats."""
    write_files(door)
    assert len((door.cwd / "waves.py").read_text().splitlines()) < 40
    lines = [line for line in shell_lines(BLOCKS) if "waves:" in line]
    assert len(lines) == 2
    words = shlex.split(lines[at])[2:]
    if at == 0:
        kill_once_saved(door, *words)
        done = door.run(*words)
        assert re.search(r"restored step [1-9]\d\d ", done.stdout)
    else:
        done = door.run(*words)
    assert done.returncode == 0, done.stderr
    assert "finished 600 steps" in done.stdout
    assert json.loads((door.the_run / "status.json").read_text())["last"]["eval/loss"] < -1.1


# --- what they name is there ---


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 200
    (example,) = (block.text for block in find_blocks(README) if block.text.startswith("# tower.py"))
    assert len(example.splitlines()) <= 15


def test_its_tables_name_every_choice() -> None:
    folders = [path for path in (REPO / "conf").glob("**") if len([*path.glob("*.yaml")]) > 1]  # `train` has one
    assert len(folders) == 17
    for folder in folders:
        group = folder.relative_to(REPO / "conf").as_posix()
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group}`"))
        assert set(re.findall(r"`([\w/]+)`", row)[1:]) == {path.stem for path in folder.glob("*.yaml")}, group


def test_paths_in_the_pages_exist() -> None:
    """A path is a word in backticks that begins with a folder or file of ours; `*` stands for any name."""
    ours = re.compile(r"`((?:runner|models|data|conf|docs|tests)/[\w./*-]*|run\.py|pyproject\.toml)`")
    made = {block.file for page in PAGES.values() for block in find_blocks(page) if block.language != "diff"}
    named = {(page, path) for page, text in PAGES.items() for path in ours.findall(text)}
    assert len(named) >= 30
    assert [found for found in sorted(named) if found[1] not in made and not [*REPO.glob(found[1].rstrip("/"))]] == []


def test_links_of_the_first_page_lead_somewhere() -> None:
    """mkdocs checks the others."""
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", README)
    for target, _, anchor in (("".join(link)).partition("#") for link in links):
        assert (REPO / target).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (REPO / target).read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], target


def test_python_in_the_pages_is_python_and_imports_what_there_is() -> None:
    for block in BLOCKS:
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("runner", "models", "data"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_programs_in_the_pages_exist() -> None:
    named = {name for text in PAGES.values() for name in re.findall(r"python -m (tests\.[\w.]+)", text)}
    assert len(named) >= 9
    assert [name for name in sorted(named) if importlib.util.find_spec(name) is None] == []


def test_the_architecture_has_the_rooms_in_the_order_of_the_law() -> None:
    """Each line of its table is in the same place, or in the same layer, as in the contract that lint-imports checks."""
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    height = {room: at for at, layer in enumerate(layers) for room in layer.split(" | ")}
    table = PAGES["docs/architecture.md"].partition("| room | subject |")[2].partition("\n\n")[0]
    named = re.findall(r"`runner/(\w+)(?:/|\.py)`", table)
    assert set(named) == height.keys() - {"__main__"}
    assert [height[room] for room in named] == sorted(height[room] for room in named)
    for room, subject in re.findall(r"^\| `(runner/\w+)/` \| (.*) \|$", table, re.MULTILINE):
        assert [name for name in re.findall(r"`(\w+\.py)`", subject) if not (REPO / room / name).is_file()] == []


def test_the_architecture_names_functions_and_values_that_exist() -> None:
    page = PAGES["docs/architecture.md"]
    road = re.findall(r"^\| \d \| `([\w/.]+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert len(road) == 4
    for file, function in road:
        assert f"\ndef {function}(" in (REPO / file).read_text()
    values = re.findall(r"^\| `([A-Z]\w+)` \|", page, re.MULTILINE)
    assert len(values) == 8
    code = "".join(path.read_text() for path in (REPO / "runner").rglob("*.py"))
    assert [
        name for name in values if not re.search(rf"^(class {name}\b|{name}(: TypeAlias)? = )", code, re.MULTILINE)
    ] == []
