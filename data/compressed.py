"""Files as people have them: compressed or not, and binary ones that must not be read as text."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

# How the bytes of a compressed file begin. The name does not decide: a browser may have unpacked `a.txt.gz` already.
GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
ENDINGS = (".gz", ".bz2", ".xz", ".zst")
# How files that are no text begin, and what they are.
BINARY_KINDS = (
    (b"PAR1", "a Parquet file (data=parquet)"),
    (b"PK\x03\x04", "a zip archive, as .npz and .docx are; unpack it, or say data=arrays"),
    (b"\x93NUMPY", "a NumPy array (data=arrays takes .npz)"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"GIF8", "an image"),
    (b"%PDF", "a PDF"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"Rar!", "a rar archive; unpack it"),
    (b"ARROW1", "an Arrow file (data=hub reads what save_to_disk wrote)"),
    (b"SQLite format 3", "a database"),
    (b"\x7fELF", "a program"),
    (b"\xff\xfe", "text in UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)
# A tar archive says so here, behind the name of its first file.
TAR_AT, TAR = 257, b"ustar"
# The beginning of a file is looked at for bytes that are in no text: control characters, other than those of layout.
LOOKED_AT_BYTES = 64 * 1024
LAYOUT = np.isin(np.arange(256), [*b"\t\n\v\f\r\b\x1b\x1a\x1c\x1d\x1e\x1f"])
IS_CONTROL = (np.arange(256) < 32) & ~LAYOUT
MOST_CONTROL = 0.005


def strip_ending(name: str) -> str:
    """Return the name of a file without the ending that says it is compressed: `a.txt` of `a.txt.gz`."""
    ending = next((ending for ending in ENDINGS if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)]


def read_plain(path: Path) -> bytes:
    """Return what is in a file, unpacked where it is compressed. Raises ValueError, which names it, where it cannot."""
    try:
        return unpack(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; bring it back, or make it readable") from None


def unpack(content: bytes, name: str) -> bytes:
    """Return bytes unpacked where they are compressed, else as they are. Raises ValueError, which names the file."""
    unpacker = _choose_unpacker(content, name)
    if unpacker is None:
        return content
    try:
        return unpacker(content)
    # Each of the four says in its own way that a file is cut off or damaged.
    except Exception as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"{name}: is compressed and cannot be unpacked ({why}); copy it again") from None


def read_beginning(path: Path) -> bytes:
    """Return the first bytes of a file, unpacked; all of them where it is small. Raises ValueError as `read_plain`."""
    try:
        with path.open("rb") as file:
            head = file.read(LOOKED_AT_BYTES)
            if _choose_unpacker(head, str(path)) is None:
                return head
        openers: dict[bytes, Callable[[Path], IO[bytes]]] = {GZIP: gzip.open, BZIP2: bz2.open, XZ: lzma.open}  # type: ignore[dict-item]
        opener = next((opener for magic, opener in openers.items() if head.startswith(magic)), None)
        if opener is None:
            return read_plain(path)[:LOOKED_AT_BYTES]
        with opener(path) as unpacked:
            return unpacked.read(LOOKED_AT_BYTES)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read ({why}); copy it again") from None


def find_binary_kind(content: bytes) -> str | None:
    """Return what a file is that is no text, with what to do; None where it may be text."""
    known = next((kind for magic, kind in BINARY_KINDS if content.startswith(magic)), None)
    if known:
        return known
    if content[TAR_AT:].startswith(TAR):
        return "a tar archive; unpack it"
    counts = np.bincount(np.frombuffer(content[:LOOKED_AT_BYTES], np.uint8), minlength=256)
    if counts[IS_CONTROL].sum() > MOST_CONTROL * counts.sum():
        return "binary; for files of tokens say data=tokens"
    return None


def _choose_unpacker(content: bytes, name: str) -> Callable[[bytes], bytes] | None:
    """Return what unpacks such content; None where it is not compressed. Raises ValueError where a package lacks."""
    if content.startswith(ZSTD):
        return _find_zstd(name)
    unpackers = {GZIP: gzip.decompress, BZIP2: bz2.decompress, XZ: lzma.decompress}
    return next((unpacker for magic, unpacker in unpackers.items() if content.startswith(magic)), None)


def _find_zstd(name: str) -> Callable[[bytes], bytes]:
    try:
        # From Python 3.14 on.
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        try:
            import zstandard  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise ValueError(
                f"{name}: is compressed with zstd, which needs a package: pip install zstandard; or unpack it: unzstd"
            ) from None
        # Files of several frames, as parallel compressors write them, and those that do not say their size.
        return lambda content: b"".join(zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True))
    return zstd.decompress  # type: ignore[no-any-return, unused-ignore]
