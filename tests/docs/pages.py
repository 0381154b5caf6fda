"""The README and the pages of docs/, taken apart: their blocks of code, the commands in them, the paths they name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.conftest import REPO

PAGES = {
    path.relative_to(REPO).as_posix(): path.read_text()
    for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))
}
RECIPES = "docs/recipes.md"  # each of its sections "Add …" is followed in test_recipes.py
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" for a transcript), the file it is, or changes ("" for none), and its text."""

    language: str
    file: str
    text: str


def find_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, or of a part of one, in order."""
    return [Block(*found) for found in FENCE.findall(text)]


def split_sections(text: str) -> dict[str, str]:
    """Split a page at its headings of the second level: title → everything below it."""
    titles = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(titles[1::2], titles[2::2], strict=True))


def blocks_outside_recipes() -> list[Block]:
    """Return the blocks of every page, except those of the recipes: these need a copy of the repository."""
    recipes = "".join(part for title, part in split_sections(PAGES[RECIPES]).items() if title.startswith("Add "))
    inside = find_blocks(recipes)
    return [block for page in PAGES.values() for block in find_blocks(page) if block not in inside]


def shell_lines(blocks: list[Block]) -> list[str]:
    """Return what is typed in ```bash blocks, each line once, without the comment at its end."""
    # A backslash at the end of a line continues it.
    texts = [re.sub(r"\\\n\s*", "", block.text) for block in blocks if block.language == "bash"]
    lines = [line.split(" #")[0].strip() for text in texts for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def transcript_lines(blocks: list[Block]) -> list[str]:
    """Return what is typed in transcripts, behind `$`, without the comment at its end."""
    typed = [line for block in blocks for line in block.text.splitlines() if line.startswith("$ ")]
    return list(dict.fromkeys(line[2:].split("  #")[0].strip() for line in typed))
