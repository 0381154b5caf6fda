"""Side files of a run as an adversary, a power loss or a copying tool leaves them: each mutation from a seed.

A mutation is a pure function of the run it is made for and a random generator: a number and a seed name it for ever.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

SIDECAR = "holdfast.json"
CHECKSUM = re.compile(rb',\n "xxh3": "[0-9a-f]{32}"\n}\n\Z')
# What no output may ever show: the content of the files beside the run.
SECRET = "SECRET-OF-THE-CANARY"
# Where a planted command would leave its mark, beside the run.
CANARY, PWNED = "canary", "PWNED"
LONG_LINE = 10 << 20
NAMES = (
    "canary/victim.txt",
    "../../../canary/victim.txt",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/../../b",
    "x\0y",
    "~/.bashrc",
)
SHELL = (
    f"touch {CANARY}/{PWNED}",
    f"`touch {CANARY}/{PWNED}`",
    f"$(touch {CANARY}/{PWNED})",
    "=1+1",
    "@SUM(1)",
    "-1+1",
)
TEXTS = (
    *(
        "",
        "x",
        "\x1b]0;owned\x07",
        "\x1b[2J\r\n",
        "\u202e\u200b",
        "\ud800",
        "a\nb\n\n# c",
        "| a | b |",
        "``` \n`",
        "a`b",
    ),
    *("<script>alert(1)</script>", "{metric}", "%s%n", "{{1}}", "${oc.env:HOME}", "nan", "x" * 100_000, "\0", "🦊"),
    *("2026-01-01", "2026-01-01T00:00:00", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+14:00", "best"),
)
NUMBERS = (0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**400, -(10**400), 1e308, -1e308, 1e-320, 0.5, -0.0, 1e19)
ODD = (math.nan, math.inf, -math.inf)
SHAPES: tuple[Any, ...] = (None, True, False, [], [1], ["x"], [[]], {}, {"a": None}, {"": {}}, [None], {"step": []})
DEEP = 20_000


@dataclass(frozen=True)
class Mutation:
    """One change to a run: what was done, to which file or folder of it."""

    kind: str
    place: str
    strike: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.kind} {self.place}"


def draw_mutation(run: Path, rng: random.Random) -> Mutation:
    """Return some mutation of this run: of bytes, of a value, of the kind of a file; some of them twice at once."""
    chosen = rng.choices((_draw_bytes, _draw_value, _draw_structure), (3, 5, 3))[0](run, rng)
    if rng.random() > 0.15:
        return chosen
    other = _draw_value(run, rng)

    def strike(target: Path) -> None:
        chosen.strike(target)
        # The first may have taken away what the second is about.
        if (target / other.place).is_file() and not (target / other.place).is_symlink():
            other.strike(target)

    return Mutation(f"{chosen.kind} {chosen.place} and {other.kind}", other.place, strike)


def side_files(run: Path) -> list[str]:
    """Return the files of a run that are no arrays, and those that it may get, relative to it."""
    there = [path.relative_to(run).as_posix() for path in sorted(run.rglob("*")) if path.is_file()]
    return [name for name in there if "/state/d/" not in name and "/array_metadatas/" not in name]


# --- bytes ---


def _draw_bytes(run: Path, rng: random.Random) -> Mutation:
    name = rng.choice(side_files(run))
    content = (run / name).read_bytes()
    kind = rng.choice(list(BYTES))
    changed = BYTES[kind](content, rng)
    is_sealed = name.startswith("checkpoints/") and rng.random() < 0.7
    return Mutation(kind, name, lambda target: _write(target, name, changed, is_sealed=is_sealed))


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice((1, 1, 1, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(what: bytes) -> Callable[[bytes, random.Random], bytes]:
    def insert(content: bytes, rng: random.Random) -> bytes:
        place = rng.randrange(len(content) + 1)
        return content[:place] + what + content[place:]

    return insert


def _double_a_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True) or [b"\n"]
    place = rng.randrange(len(lines))
    return b"".join([*lines[: place + 1], *lines[place:]])


def _glue_lines(content: bytes, rng: random.Random) -> bytes:
    return content.replace(b"\n", b"", 1)


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": _flip,
    "cut": lambda content, rng: content[: rng.randrange(len(content) + 1)],
    "emptied": lambda content, rng: b"",
    "zeroed": lambda content, rng: bytes(len(content)),
    "zeros after a part": lambda content, rng: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "garbage": lambda content, rng: rng.randbytes(rng.choice((1, 64, 4096))),
    "no UTF-8": _insert(b"\xff\xfe\xc3\x28"),
    "a byte order mark": lambda content, rng: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content, rng: content.decode("utf-8", "replace").encode("utf-16"),
    "nested lists": lambda content, rng: b"[" * DEEP,
    "nested objects": lambda content, rng: b'{"a":' * DEEP,
    "nested and closed": lambda content, rng: b'{"attempt": ' + b"[" * DEEP + b"]" * DEEP + b"}\n",
    "5000 digits": _insert(b'{"step": ' + b"9" * 5000 + b"}\n"),
    "a long line": lambda content, rng: content + b'{"step": 1, "split": "' + b"x" * LONG_LINE + b'"}\n',
    "a doubled line": _double_a_line,
    "glued lines": _glue_lines,
    "control characters": _insert(b"\x1b]0;owned\x07\x1b[2J"),
    "the content of a page": lambda content, rng: b"<script>alert(1)</script>\n" * 3,
    "an alias bomb": lambda content, rng: _alias_bomb().encode(),
    "a tag of Python": lambda content, rng: (
        f'a: !!python/object/apply:os.system ["touch {CANARY}/{PWNED}"]\nmodel: {{_target_: os.system}}\n'.encode()
    ),
    "JSON of another kind": lambda content, rng: (
        rng.choice((b"[]", b"7", b'"x"', b"null", b"true", b"{}", b"NaN")) + b"\n"
    ),
}


def _alias_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return "\n".join(lines) + "\n"


# --- values ---


def _draw_value(run: Path, rng: random.Random) -> Mutation:
    names = [name for name in side_files(run) if name.endswith((".json", ".jsonl", ".yaml", "progress/metadata"))]
    name = rng.choice(names)
    changed, what = _mutate_document(name, (run / name).read_bytes(), rng)
    # What lies in a checkpoint is sealed again: else the seal alone would be tested.
    return Mutation(f"a value ({what})", name, lambda target: _write(target, name, changed, is_sealed=True))


def _mutate_document(name: str, content: bytes, rng: random.Random) -> tuple[bytes, str]:
    if name.endswith(".yaml"):
        tree, what = _mutate_tree(yaml.safe_load(content), rng)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "replace"), what
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        if not lines:
            return b"{}\n", "{}"
        place = rng.randrange(len(lines))
        tree, what = _mutate_tree(json.loads(lines[place]), rng)
        lines[place] = json.dumps(tree).encode()
        return b"\n".join(lines) + b"\n", what
    # Some end with a checksum of their first line.
    first, *rest = content.splitlines()
    is_signed = [line for line in rest if line.strip()] == [xxhash.xxh3_128(first).hexdigest().encode()]
    tree, what = _mutate_tree(json.loads(first if is_signed else content), rng)
    body = json.dumps(tree, indent=None if is_signed else 1).encode()
    return body + b"\n" + (xxhash.xxh3_128(body).hexdigest().encode() + b"\n") * is_signed, what


def _mutate_tree(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """Return a document with one to three odd values, keys more or keys less, and what was done in words."""
    tree, said = copy.deepcopy(tree), []
    for _ in range(rng.choice((1, 1, 1, 3))):
        places = list(_iter_places(tree))
        if not places or rng.random() < 0.03:
            tree = _draw_odd(rng)
            return tree, f"all of it: {json.dumps(tree)[:40]}"
        node, key = rng.choice(places)
        move = rng.random()
        if move < 0.15:
            said.append(f"no {key}")
            del node[key]
        elif move < 0.2 and isinstance(node, dict):
            said.append(f"{key} by another name")
            node[rng.choice(TEXTS)[:99]] = node.pop(key)
        elif move < 0.25 and isinstance(node, dict):
            said.append("a key more")
            node[rng.choice((*NAMES, *TEXTS))[:99]] = _draw_odd(rng)
        else:
            node[key] = _draw_odd(rng)
            said.append(f"{key}: {json.dumps(node[key])[:40]}")
    return tree, ", ".join(said)


def _draw_odd(rng: random.Random) -> Any:
    pool: Sequence[Any] = rng.choice((SHAPES, NUMBERS, ODD, TEXTS, NAMES, SHELL))
    return copy.deepcopy(rng.choice(pool))


def _iter_places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with each of its keys."""
    for key, value in list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from _iter_places(value)


# --- kinds of files ---

# Names that a run writes, makes, moves or deletes, and that somebody may have taken already.
PLANTED = (
    *(".README.md", ".status.json", ".config.yaml", ".data.json", ".remat.json", ".lock", ".pulse", ".lease", "STOP"),
    *("attempts.jsonl", "status.json", "config.yaml", "data.json", "remat.json", "README.md", "report.html"),
    *(".report.html", "logs", "logs/run.log", "logs/metrics.jsonl", "logs/timing.jsonl", "logs/tensorboard"),
    *("logs/metrics.cut-2.jsonl", "logs/metrics.cut-3.jsonl", "logs/timing.cut-3.jsonl", "logs/wandb", "eval"),
    *("checkpoints", "checkpoints/.trash", "checkpoints/.writing", "checkpoints/best", "quarantine"),
    *("quarantine/7-1", "quarantine/7-1/reason.txt", "eval/9", "eval/9/results.json", "media"),
    # Both runs of the law have this step.
    *("checkpoints/9", "checkpoints/9/pinned", f"checkpoints/9/{SIDECAR}", "checkpoints/9/progress/metadata"),
    *("checkpoints/9/progress", "checkpoints/9/state", "decisions.json", ".decisions.copy.json"),
)


def _draw_structure(run: Path, rng: random.Random) -> Mutation:
    place, kind = rng.choice(PLANTED), rng.choice(list(STRUCTURES))
    return Mutation(kind, place, lambda target: plant(target, place, kind))


def plant(run: Path, place: str, kind: str) -> None:
    """Put something of another kind in the place of a file or folder of a run."""
    target = run / place
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    STRUCTURES[kind](target, canary_of(run))


def canary_of(run: Path) -> Path:
    """Return the folder beside a run that nothing may touch: `canary` where `outputs` lies."""
    return run.parents[2] / CANARY


def _hard_link(target: Path, canary: Path) -> None:
    # A file with two names is as much this run's as anybody's: it may be read, and must not be written.
    (canary / "victim.txt").write_text((canary / "victim.txt").read_text().replace(SECRET, "not so secret"))
    os.link(canary / "victim.txt", target)


def _socket(target: Path, canary: Path) -> None:
    # The path of a socket is short: it is made elsewhere and moved.
    short = canary.parent / "s"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(short))
    short.rename(target)


STRUCTURES: dict[str, Callable[[Path, Path], None]] = {
    "a link to a file outside": lambda target, canary: target.symlink_to(canary / "victim.txt"),
    "a link to a folder outside": lambda target, canary: target.symlink_to(canary),
    "a link to another run's part": lambda target, canary: target.symlink_to(canary / "run/checkpoints"),
    "a link to another checkpoint": lambda target, canary: target.symlink_to(canary / "run/checkpoints/9"),
    "a relative link": lambda target, canary: target.symlink_to(os.path.relpath(canary / "victim.txt", target.parent)),
    "a link to what is not there": lambda target, canary: target.symlink_to(canary / "new.txt"),
    "a link to itself": lambda target, canary: target.symlink_to(target.name),
    "a link to a device": lambda target, canary: target.symlink_to("/dev/zero"),
    "a hard link to a file outside": _hard_link,
    "a named pipe": lambda target, canary: os.mkfifo(target),
    "a socket": _socket,
    "a folder": lambda target, canary: (target / "x").mkdir(parents=True),
    "an empty file": lambda target, canary: target.touch(),
    "nothing": lambda target, canary: None,
}


# --- writing ---


def _write(run: Path, name: str, content: bytes, *, is_sealed: bool) -> None:
    """Write a file of a run; one of a checkpoint with a seal that is right."""
    path = run / name
    if not is_sealed or not name.startswith("checkpoints/"):
        path.write_bytes(content)
    elif path.name == SIDECAR:
        path.write_bytes(_seal(content))
    else:
        path.write_bytes(content)
        step = run / "checkpoints" / name.split("/")[1]
        facts = {"bytes": len(content), "xxh3": xxhash.xxh3_128(content).hexdigest()}
        # Of two mutations the other one may have hit the sidecar.
        with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
            document = json.loads((step / SIDECAR).read_bytes())
            document["files"][path.relative_to(step).as_posix()] = facts
            (step / SIDECAR).write_bytes(_seal(json.dumps(document, indent=1).encode() + b"\n"))


def _seal(content: bytes) -> bytes:
    """Return the bytes of a sidecar with the checksum that is right for them, where they have the place for one."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(document, dict):
        return content
    document.pop("xxh3", None)
    body = json.dumps(document, indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "xxh3": "%s"\n}\n' % xxhash.xxh3_128(body).hexdigest().encode()
