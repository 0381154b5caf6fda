"""Files of text: which there are, what parts of a data set they are, and the documents in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from data.compressed import find_binary_kind, read_beginning, read_plain, strip_ending
from data.json_lines import is_json_name, read_json_texts
from data.splits import AmbiguousSplitError, Split, group_by_split

# Which files of a folder are text, unless it is said.
USUAL_PATTERN = "**/*.txt"
# What reads files of these endings, which are no text.
OTHER_READERS = {
    **dict.fromkeys((".parquet", ".csv", ".tsv"), "data=parquet or data=csv, for tables"),
    ".bin": "data=tokens",
    ".npz": "data=arrays",
    ".arrow": "data=hub",
    **dict.fromkeys((".png", ".jpg", ".jpeg"), "data=images"),
}


def group_text_files(files: Sequence[Path], root: Path) -> dict[Split, list[Path]] | None:
    """Return files by the part that they are, where their names say so. Raises ValueError where it is not clear."""
    try:
        return group_by_split(files, root) if len(files) > 1 else None
    except AmbiguousSplitError as error:
        raise ValueError(
            f"path={root} {error}; choose with data.pattern, or name data.path and data.eval_path"
        ) from None


def find_text_files(path: Path, pattern: str) -> tuple[list[Path], str]:
    """Return a file, or the files of a folder that match `pattern`, in the order of their names; and what is left out.

    With the usual pattern, compressed files count where there are no others. Raises ValueError where none matches.
    """
    if not path.is_dir():
        return [path], ""
    found = sorted(file for file in path.glob(pattern) if file.is_file() and not _is_of_macos(file, path))
    if found and pattern != USUAL_PATTERN:
        return found, ""
    everything = [file for file in path.rglob("*") if file.is_file() and not is_hidden(file.relative_to(path))]
    if not found and pattern == USUAL_PATTERN:
        found = sorted(file for file in everything if strip_ending(file.name).endswith(".txt"))
    chosen = set(found)
    others = count_endings(file.name for file in everything if file not in chosen)
    if found:
        return found, others
    ending = others.partition(" ")[2].partition(",")[0]
    way_out = OTHER_READERS.get(ending, f"data.pattern='**/*{ending}'")
    there = f"; it holds {others}: say {way_out}" if others else ""
    raise ValueError(f"path={path} holds no file that matches pattern={pattern}{there}")


def is_hidden(path: PurePath) -> bool:
    """Tell whether a file, or a folder it is in, is hidden, or is what macOS puts into archives."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _is_of_macos(file: Path, root: Path) -> bool:
    # Such a file has the name of a text with `._` before it, and holds none.
    return file.name.startswith("._") or "__MACOSX" in file.relative_to(root).parts


def count_endings(names: Iterable[str]) -> str:
    """Return how many files there are of each ending, most first: `12 .jsonl.gz, 1 .md`."""
    counts = Counter(_find_ending(name) for name in names)
    return ", ".join(f"{count:,} {ending}" for ending, count in sorted(counts.items(), key=lambda item: -item[1])[:4])


def _find_ending(name: str) -> str:
    plain = strip_ending(name)
    return PurePath(plain).suffix + name[len(plain) :] or "without an ending"


def read_documents(file: Path, field: str | None) -> list[bytes]:
    """Return the texts of a file: each object of JSON is one, any other file is one. Unpacks what is compressed.

    Raises ValueError where it holds no text.
    """
    content = read_plain(file)
    if kind := find_binary_kind(content):
        raise ValueError(f"path={file} is no text: it is {kind}")
    if is_json_file(file, field):
        return [text.encode(errors="replace") for text in read_json_texts(content, field, str(file))]
    return [content]


def is_json_file(file: Path, field: str | None) -> bool:
    """Tell whether a file is read as JSON: by its name, or because a field of it is asked for."""
    return field is not None or is_json_name(file.name)


def check_text_file(file: Path, field: str | None) -> None:
    """Raise ValueError where the beginning of a file is not what `read_documents` takes."""
    content = read_beginning(file)
    if kind := find_binary_kind(content):
        raise ValueError(f"path={file} is no text: it is {kind}")
    if is_json_file(file, field):
        # The first line alone: the rest of it may be cut off here. A list is read as a whole later.
        first = content.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0]
        if not first.startswith(b"[") and len(first) < len(content):
            read_json_texts(first, field, str(file))
