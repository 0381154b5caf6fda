"""`recipe`: prints a file that makes a scheduler run the command again after exit code 75, ready to be filled in."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from runner.config.explain import suggest
from runner.errors import ConfigError
from runner.values import Answer, Say

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def arguments(parser: ArgumentParser) -> None:
    """One recipe, or none to see which there are."""
    parser.add_argument("name", nargs="?", help="as in: python -m runner recipe kubernetes > job.yaml")


def run(arguments: Namespace, say: Say) -> Answer:
    """Print a recipe as it is, or list them. Raises ConfigError where there is none of this name."""
    files = {path.stem: path for path in sorted(RECIPES.iterdir()) if path.is_file()}
    if arguments.name is None:
        width = max(map(len, files))
        for name, path in files.items():
            say(f"{name:<{width}}  {_what(path)}")
        return Answer({name: _what(path) for name, path in files.items()})
    if arguments.name not in files:
        near = suggest(arguments.name, list(files))
        raise ConfigError(f"recipe: got {arguments.name}; expected one of {', '.join(files)}{near}")
    text = files[arguments.name].read_text()
    for line in text.splitlines():
        say(line)
    return Answer({"name": arguments.name, "file": files[arguments.name].name, "text": text})


def _what(path: Path) -> str:
    """The first comment: what it is for."""
    comments = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    return comments[0]
