"""`recipe`: print a file that makes a scheduler run the command again after exit code 75, ready to be filled in."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from runner.config.explain import suggest_word
from runner.errors import ConfigError
from runner.values import Say, VerbResult

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the name of a recipe; none prints which there are."""
    parser.add_argument("name", nargs="?", help="as in: python -m runner recipe kubernetes > job.yaml")


def run_verb(arguments: Namespace, say: Say) -> VerbResult:
    """Print a recipe as it is, or list them. Raises ConfigError where there is none of this name."""
    files = {path.stem: path for path in sorted(RECIPES.iterdir()) if path.is_file()}
    if arguments.name is None:
        width = max(map(len, files))
        purposes = {name: _read_purpose(path) for name, path in files.items()}
        for name, purpose in purposes.items():
            say(f"{name:<{width}}  {purpose}")
        return VerbResult(purposes)
    if arguments.name not in files:
        near = suggest_word(arguments.name, list(files))
        raise ConfigError(f"recipe: got {arguments.name}; expected one of {', '.join(files)}{near}")
    text = files[arguments.name].read_text()
    for line in text.splitlines():
        say(line)
    return VerbResult({"name": arguments.name, "file": files[arguments.name].name, "text": text})


def _read_purpose(path: Path) -> str:
    """Return the first comment of a recipe, which says what it is for."""
    comments = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")]
    return comments[0]
