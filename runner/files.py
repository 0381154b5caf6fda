"""Read and write files so that a kill or a power loss leaves the old content or the new one, and never through a link.

The directory of a run may come from somebody else. A link in it (`logs/run.log → ~/.bashrc`) must not lead a write, a
rename or a deletion outside. So every folder on the way is opened as it is, one below the other, and never through a
link: a path that is given to this module has to be resolved (`Path.resolve`) where links above a run are meant.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runner.types import JsonObject

# A folder that is only passed through needs no permission to list it (Linux; elsewhere it is opened for reading).
_PASS_THROUGH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A named pipe in the place of a file would be waited for without O_NONBLOCK; plain files do not know the difference.
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What the system says where a link, a folder, a pipe or a device is in the place of a file, or where it has no end.
NOT_A_FILE = (errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.EFBIG)
# Larger than any side file that a run makes: status, attempts, data.json.
READ_LIMIT = 64 << 20
# What no number of JSON can say, by the text that says it.
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Open a folder for use as `dir_fd`, without following a link anywhere on the way. Yields its handle.

    Raises OSError: ELOOP where the path leads through a link, ENOENT where a part of it is not there.
    """
    parts = Path(os.path.abspath(path)).parts
    handle = os.open(parts[0], _PASS_THROUGH if len(parts) > 1 else _FOLDER)
    try:
        for number, name in enumerate(parts[1:], 2):
            try:
                below = os.open(name, _FOLDER if number == len(parts) else _PASS_THROUGH, dir_fd=handle)
            except OSError as error:
                raise _explain(error, Path(*parts[:number]), name, handle) from None
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing, durably and never through a link. Raises OSError."""
    path = Path(os.path.abspath(path))
    missing = [path]
    while not os.path.lexists(missing[-1]) and missing[-1].parent != missing[-1]:
        missing.append(missing[-1].parent)
    for folder in reversed(missing[:-1]):
        with open_folder(folder.parent) as parent, suppress(FileExistsError):
            os.mkdir(folder.name, dir_fd=parent)
            # Else a power loss takes the folder, with everything that is durable in it.
            os.fsync(parent)
    # Whatever is there now has to be a folder, and no link to one.
    with open_folder(path):
        pass


def open_file(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a plain file with the flags of `os.open`, never through a link; return the handle.

    Raises OSError: ELOOP for a link, EINVAL for what is no plain file (a pipe, a device).
    """
    with open_folder(path.parent) as folder:
        try:
            handle = os.open(path.name, flags | _PLAIN, mode, dir_fd=folder)
        except OSError as error:
            raise _explain(error, path, path.name, folder) from None
    try:
        if not stat.S_ISREG(look_at_open(handle, path).st_mode):
            raise OSError(errno.EINVAL, "is no plain file", str(path))
    except OSError:
        os.close(handle)
        raise
    return handle


def look_at_open(handle: int, path: Path) -> os.stat_result:
    """Return what an open file is. Raises OSError with its name, which the system does not give with a handle."""
    try:
        return os.fstat(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_file(path: Path, limit: int = READ_LIMIT) -> bytes:
    """Return the content of a plain file, never through a link.

    Raises OSError: besides the usual, ELOOP for a link, EINVAL for no plain file, EFBIG for more than `limit` bytes.
    """
    handle = open_file(path, os.O_RDONLY)
    with os.fdopen(handle, "rb", closefd=True) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit} bytes", str(path))
    return content


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text. Raises ValueError for anything that is none, whatever the bytes are."""
    try:
        return json.loads(content)
    # Brackets nested thousands deep.
    except RecursionError:
        raise ValueError("is nested too deep") from None


def format_json(value: Any, *, indent: int | None = None, ensure_ascii: bool = True) -> str:
    """Return a value as strict JSON: numbers that JSON does not have are the texts "NaN", "Infinity", "-Infinity"."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)
    # Rare, so that looking at every value is left to json, which is faster at it.
    except ValueError:
        return json.dumps(_spell_nonfinite(value), indent=indent, ensure_ascii=ensure_ascii, allow_nan=False)


def _spell_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spell_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell_nonfinite(item) for item in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse_nonfinite(value: Any) -> Any:
    """Return the number that one of the texts of `format_json` stands for; any other value as it is.

    Files of older versions have such numbers bare, which `parse_json` reads as well.
    """
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def read_json_object(path: Path) -> JsonObject | None:
    """Return the JSON object in a file; None where there is no file, or where its bytes are no JSON object.

    Raises OSError where it is there and cannot be read: that is no reason to believe that nothing is written in it.
    """
    try:
        document = parse_json(read_file(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def replace_file(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file in one move: a reader sees the old content or the new one, and nothing between.

    Its folder must be there (`make_folder`): a run that was moved away is not begun again by a write. Without `durable`
    the kernel writes it back when it likes: a kill loses nothing, a power loss may.
    Raises OSError; then the old content stands.
    """
    # Always the same temporary name: what a kill leaves behind is removed by the next call. Each file has one writer,
    # so that two of them cannot meet there.
    fresh = f".{path.name}"
    with open_folder(path.parent) as folder:
        with suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=folder)
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666, dir_fd=folder)
        with os.fdopen(handle, "wb") as out:
            out.write(content if isinstance(content, bytes) else content.encode())
            out.flush()
            # Before the rename: some file systems make the new name durable first, and the file would be empty.
            if durable:
                os.fsync(out.fileno())
        os.replace(fresh, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        if durable:
            os.fsync(folder)


def append_json_line(path: Path, record: JsonObject) -> None:
    """Append one JSON line, durably. Raises OSError."""
    handle = open_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    with os.fdopen(handle, "r+b", buffering=0) as out:
        size = look_at_open(handle, path).st_size
        # A power loss may have torn the last line: the new one must not become part of it.
        is_torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        line = b"\n" * is_torn + format_json(record).encode() + b"\n"
        if out.write(line) != len(line):
            # A disk that is almost full takes a part and raises nothing.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(handle)
    if size == 0:
        sync_path(path.parent)


def append_text(path: Path, text: str) -> None:
    """Append text to a file. Raises OSError."""
    with os.fdopen(
        open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8", errors="backslashreplace"
    ) as out:
        out.write(text)


def rename_path(old: Path, new: Path) -> None:
    """Give a file or folder another name, and neither through a link. Raises OSError."""
    with open_folder(old.parent) as source, open_folder(new.parent) as target:
        os.rename(old.name, new.name, src_dir_fd=source, dst_dir_fd=target)


def remove_file(path: Path) -> None:
    """Remove a file, or a link itself, where it is there. Raises OSError."""
    with suppress(FileNotFoundError), open_folder(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


def remove_tree(path: Path) -> None:
    """Delete a folder and all below it as far as that can be done; a link is removed, and what it leads to stays."""
    with suppress(OSError), open_folder(path.parent) as folder:
        if stat.S_ISDIR(os.lstat(path.name, dir_fd=folder).st_mode):
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=folder)
        else:
            os.unlink(path.name, dir_fd=folder)


def sync_path(path: Path) -> None:
    """Make the content of a file, or the names in a directory, survive a power loss. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: OSError, path: Path, name: str, folder: int) -> OSError:
    """Return the error with the whole path, and ELOOP where a link is what was met (a folder says ENOTDIR then)."""
    with suppress(OSError):
        if stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode):
            return OSError(errno.ELOOP, "is a link, which is not followed here", str(path))
    return OSError(error.errno, error.strerror, str(path))
