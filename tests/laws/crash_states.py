"""What a power cut may leave of a directory: the record of recorder.c is played, and legal states are made from it.

Two sets of rules. *Ordered*: the file system has a journal (ext4, XFS), so the names change in order up to some call,
which is not before the last sync of anything. *Weak*: what POSIX says and no more, so that any of the changes to names
may be missing that are not followed by a sync of their folder. Under both a file holds what it held when it was last
synced, and of what was written since, nothing, all, a part, or zeros in its place.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PAGE_BYTES = 4096
Rules = Literal["ordered", "weak"]
Entry = tuple[int, str]  # a folder, and a name in it
Tree = dict[str, bytes | str | None]  # by path: the content of a file, the target of a link (a str), None for a folder
_ROOT = 0


@dataclass(frozen=True)
class Call:
    """One call that changed something, or made something durable."""

    kind: str
    inode: int
    offset: int
    path: str
    to: str
    data: bytes

    def __str__(self) -> str:
        """Return it without steps, clocks and what is drawn by chance, so that calls of one sort look alike."""
        words = " ".join([self.kind, self.path, *([self.to] if self.to else [])])
        return re.sub(r"\d+", "N", re.sub(r"/d/[0-9a-f]+|(?<=/\.writing/)\d+-[0-9a-f]+", "N", words))


def read_calls(log: Path, below: Path) -> list[Call]:
    """Return what recorder.c has written down, with paths relative to `below`; "." for itself."""
    content, calls, at = log.read_bytes(), [], 0
    while at < len(content):
        end = content.index(b"\n", at)
        kind, inode, offset, *lengths = content[at:end].split()
        parts, at = [], end + 1
        for length in map(int, lengths):
            parts.append(content[at : at + length])
            at += length
        names = [os.path.relpath(os.fsdecode(part), below) if part else "" for part in parts[:2]]
        calls.append(Call(kind.decode(), int(inode), int(offset), *names, parts[2]))
    return calls


def read_tree(folder: Path) -> Tree:
    """Return everything below a folder, links as they are."""
    tree: Tree = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        tree[name] = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return tree


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a tree on disk, in a folder that is there."""
    for name, content in sorted(tree.items()):
        path = folder / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


@dataclass(frozen=True)
class NameChange:
    """A name came to stand for something else in call `number`, or for nothing."""

    number: int
    entry: Entry
    node: int | None


@dataclass(frozen=True)
class DataChange:
    """A file was written to in call `number`; without data it was cut, or grew, to `offset` bytes."""

    number: int
    offset: int
    data: bytes | None

    def apply(self, content: bytes, limit: int | None = None) -> bytes:
        """Return the content after this change, or after the first `limit` bytes of it."""
        if self.data is None:
            return content[: self.offset].ljust(self.offset, b"\0")
        data = self.data if limit is None else self.data[:limit]
        return content[: self.offset].ljust(self.offset, b"\0") + data + content[self.offset + len(data) :]


class History:
    """Everything that happened below a folder: names, contents and syncs, each with the number of its call.

    Folders and files are numbered in the order in which they appear, for an inode may be used again.
    """

    def __init__(self, start: Tree, calls: Sequence[Call], inodes: Mapping[str, int]):
        """Play the calls on what was there before; `inodes` are those of `start` by path."""
        self.calls = tuple(calls)
        self.first: dict[Entry, int] = {}
        self.content: dict[int, bytes | str | None] = {_ROOT: None}
        self.names: list[NameChange] = []
        self.data: dict[int, list[DataChange]] = {}
        self.syncs: list[tuple[int, int]] = []
        self._now: dict[Entry, int] = {}
        self._node_of = {inodes["."]: _ROOT}
        for path, content in sorted(start.items()):
            node = self._add(inodes[path], content)
            self._now[self._locate(path)] = node
        self.first = dict(self._now)
        for number, call in enumerate(self.calls):
            self._play(number, call)

    def _add(self, inode: int, content: bytes | str | None) -> int:
        node = len(self.content)
        self.content[node], self._node_of[inode] = content, node
        return node

    def _locate(self, path: str) -> Entry:
        *folders, name = path.split("/")
        folder = _ROOT
        for part in folders:
            folder = self._now[folder, part]
        return folder, name

    def _name(self, number: int, path: str, node: int | None) -> None:
        entry = self._locate(path)
        self.names.append(NameChange(number, entry, node))
        if node is None:
            del self._now[entry]
        else:
            self._now[entry] = node

    def _play(self, number: int, call: Call) -> None:
        if call.kind in ("create", "mkdir", "symlink"):
            content = {"create": b"", "mkdir": None, "symlink": os.fsdecode(call.data)}[call.kind]
            self._name(number, call.path, self._add(call.inode, content))
        elif call.kind == "remove":
            self._name(number, call.path, None)
        elif call.kind == "link":
            self._name(number, call.to, self._now[self._locate(call.path)])
        elif call.kind == "rename":
            node = self._now[self._locate(call.path)]
            self._name(number, call.path, None)
            self._name(number, call.to, node)
        elif call.kind == "sync":
            self.syncs.append((number, self._node_of[call.inode]))
        else:
            data = call.data if call.kind == "write" else None
            self.data.setdefault(self._node_of[call.inode], []).append(DataChange(number, call.offset, data))

    def tree(self) -> Tree:
        """Return what is there at the end, as the process sees it."""
        contents = {node: _replay(self, node, len(self.data.get(node, []))) for node in self.content}
        return _render(self._now, contents)

    def node_at(self, path: str, after: int) -> int | None:
        """Return what a path stands for when so many calls were made, as the process sees it."""
        entries = _apply_names(self.first, [change for change in self.names if change.number < after])
        node: int | None = _ROOT
        for part in path.split("/"):
            node = entries.get((node, part)) if node is not None else None
        return node

    def last_sync(self, node: int, after: int) -> int:
        """Return the number of the last call before `after` that synced a file or folder; -1 where there is none."""
        return max((number for number, synced in self.syncs if synced == node and number < after), default=-1)


@dataclass(frozen=True)
class Cut:
    """A power cut when `after` calls were made, and which of the legal states it leaves."""

    after: int
    rules: Rules
    seed: int

    def __str__(self) -> str:
        return f"{self.rules}, choice {self.seed}, after {self.after} calls"

    def state_of(self, history: History) -> Tree:
        """Return the state: the same one each time."""
        rng = random.Random(f"{self.after} {self.rules} {self.seed}")
        choose = _choose_in_order if self.rules == "ordered" else _choose_weakly
        names = choose(history, self.after, rng)
        how = rng.choice(["none", "all", "zeros", "prefix", "holes", "mixed"])
        contents = {node: _survive(history, node, self.after, how, rng) for node in history.content}
        return _render(_apply_names(history.first, names), contents)


def _choose_in_order(history: History, after: int, rng: random.Random) -> list[NameChange]:
    """Choose how far the journal got: at least to the last sync, whatever was synced."""
    least = max((number for number, _ in history.syncs if number < after), default=-1) + 1
    end = rng.choice([least, after, rng.randint(least, after)])
    return [change for change in history.names if change.number < end]


def _choose_weakly(history: History, after: int, rng: random.Random) -> list[NameChange]:
    """Choose which changes to names survive: those whose folder was synced since, and any of the others.

    A rename is one change: it is there or it is not. Where the folder that something was moved to was synced, all of
    it is there. Where only the one was synced that it came from, it is gone there, and may not have arrived.
    """
    made = [change for change in history.names if change.number < after]
    sure = {change for change in made if history.last_sync(change.entry[0], after) > change.number}
    arrived = {change.number for change in sure if change.node is not None}
    kept_share = rng.choice([0.0, 0.0, 0.5, 0.9, 1.0])
    lucky = {number for number in sorted({change.number for change in made}) if rng.random() < kept_share}
    return [change for change in made if change in sure or change.number in arrived | lucky]


def _apply_names(first: Mapping[Entry, int], changes: Sequence[NameChange]) -> dict[Entry, int]:
    entries = dict(first)
    for change in changes:
        if change.node is None:
            entries.pop(change.entry, None)
        else:
            entries[change.entry] = change.node
    return entries


def _replay(history: History, node: int, count: int, torn: int = 0) -> bytes | str | None:
    """Return the content after so many changes to it, and the first `torn` bytes of the next one."""
    content, changes = history.content[node], history.data.get(node, [])
    if isinstance(content, bytes):
        for change in changes[:count]:
            content = change.apply(content)
        if torn and count < len(changes):
            content = changes[count].apply(content, torn)
    return content


def _survive(history: History, node: int, after: int, how: str, rng: random.Random) -> bytes | str | None:
    """Return what is left of a file: what was synced, and what `how` says of the rest."""
    changes = history.data.get(node, [])
    synced = history.last_sync(node, after)
    sure = sum(change.number < synced for change in changes)
    made = sum(change.number < after for change in changes)
    if sure == made:
        return _replay(history, node, made)
    if how == "mixed":
        how = rng.choice(["none", "all", "zeros", "prefix", "holes"])
    if how == "prefix":
        count = rng.randrange(sure, made)
        return _replay(history, node, count, rng.randint(0, len(changes[count].data or b"")))
    old, new = _replay(history, node, sure), _replay(history, node, made)
    assert isinstance(old, bytes)
    assert isinstance(new, bytes)
    if how in ("none", "all"):
        return old if how == "none" else new
    # The size is that of the new content; what was not written back is old, or zero where nothing was before.
    zeros = old[: len(new)].ljust(len(new), b"\0")
    if how == "zeros":
        return zeros
    starts = range(0, len(new), PAGE_BYTES)
    return b"".join(rng.choice([new, zeros])[start : start + PAGE_BYTES] for start in starts)


def _render(entries: Mapping[Entry, int], contents: Mapping[int, bytes | str | None]) -> Tree:
    """Return what can be reached from the root, by path."""
    below: dict[int, list[tuple[str, int]]] = {}
    for (folder, name), node in entries.items():
        below.setdefault(folder, []).append((name, node))

    def walk(folder: int, prefix: str) -> Iterator[tuple[str, bytes | str | None]]:
        for name, node in below.get(folder, []):
            yield prefix + name, contents[node]
            if contents[node] is None:
                yield from walk(node, f"{prefix}{name}/")

    return dict(walk(_ROOT, ""))
