"""The law: a checkpoint is loaded only if every byte of it is the byte that was written; else the next older one is.

    python -m tests.laws.flips                                   500 flips, 50 truncations, 50 deletions
    python -m tests.laws.flips RUN --flips 5000 --seed 1         on a copy of a run of yours

Each damage hits one file of the newest checkpoint, any of all of them: one bit flipped, cut at some length, or gone.
For some of them the command of the run is typed again, and its end compared with that of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.checkpoint.record import STATE, list_steps
from runner.checkpoint.restore import restore_newest
from runner.checkpoint.seal import find_problem
from runner.errors import RefusedError
from tests.conftest import Door, assert_same
from tests.laws.faults import LAST, TINY, Window, compiled, forks

KEPT = (*TINY, "retention=all")
KINDS = ("flip", "truncation", "deletion")
Bytes = dict[str, bytes]  # the leaves of a state, or the files of a checkpoint, by name


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written. `where` is a bit of it, or the length it is cut to."""

    kind: str
    file: str
    where: int = 0

    def strike(self, directory: Path) -> None:
        path = directory / self.file
        if self.kind == "deletion":
            path.unlink()
        elif self.kind == "truncation":
            os.truncate(path, self.where)
        else:
            content = bytearray(path.read_bytes())
            content[self.where // 8] ^= 1 << self.where % 8
            path.write_bytes(content)


def damage(kind: str, directory: Path, rng: random.Random) -> Damage:
    """Some damage of this kind to one file, any of all; an empty one can only be deleted."""
    sizes = {name: len(content) for name, content in contents(directory).items()}
    file = rng.choice([name for name, size in sizes.items() if size or kind == "deletion"])
    bound = {"flip": 8 * sizes[file], "truncation": sizes[file], "deletion": 1}
    return Damage(kind, file, rng.randrange(bound[kind]))


def contents(directory: Path) -> Bytes:
    """Every file below a directory, by name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


# --- the runs ---


def make(room: Path) -> tuple[Path, Path]:
    """A run that was killed between steps 9 and 12, with all of its checkpoints, and the same run uninterrupted."""
    killed, whole = room / "killed", room / "whole"
    killed.mkdir(parents=True)
    whole.mkdir()
    with forks(compiled(room)) as door:
        window = Window(f"/.writing/{LAST}").environment(killed / "outputs", room / "fatal.txt", at=1)
        assert door.run(killed, *KEPT, **window).returncode == -9
        assert door.run(whole, *KEPT).returncode == 0
    return killed, whole


def reader(state: Path) -> Any:
    """The runner's own way to read a checkpoint, for the structure that this one has; it gives plain bytes."""
    import jax
    import numpy as np

    from runner.checkpoint import arrays, store

    def shape(leaf: arrays.LeafSpec) -> jax.ShapeDtypeStruct:
        if leaf.generator is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        kind = jax.eval_shape(lambda: jax.random.key(0, impl=leaf.generator)).dtype
        return jax.ShapeDtypeStruct(leaf.shape[:-1], kind, sharding=here)

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = {name: shape(leaf) for name, leaf in arrays.read_leaf_specs(state).items()}

    def read(directory: Path) -> Bytes:
        tree = store.read_state(directory, template)
        keys = {name for name, leaf in template.items() if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)}
        words = {name: jax.random.key_data(leaf) if name in keys else leaf for name, leaf in tree.items()}
        return {name: np.asarray(leaf).tobytes() for name, leaf in words.items()}

    return read


# --- the proof ---


@dataclass
class Trial:
    """A run directory whose newest checkpoint is damaged again and again, and put right each time."""

    run: Path
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoints, self.quarantine = self.run / "checkpoints", self.run / "quarantine"
        *_, self.older, self.newest = list_steps(self.checkpoints)
        self.directory = self.checkpoints / str(self.newest)
        self.good = contents(self.directory)
        self.read = reader(self.directory / STATE)
        self.values = {step: self.read(self.checkpoints / str(step)) for step in (self.older, self.newest)}
        assert self.values[self.older] != self.values[self.newest]
        self.check_undamaged()

    def check_undamaged(self) -> None:
        found = restore_newest(self.checkpoints, self.quarantine, self.read, print)
        assert found is not None
        assert (found[0].step, found[1]) == (self.newest, self.values[self.newest])

    def suffer(self, harm: Damage) -> None:
        """Damage, look, restore, and put everything back."""
        harm.strike(self.directory)
        if wrong := self._wrong():
            self.failures.append(f"{harm}: {wrong}")
        for aside in self.quarantine.glob("*"):
            shutil.rmtree(aside)
        self.directory.mkdir(exist_ok=True)
        for name, content in self.good.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _wrong(self) -> str | None:
        """What the damage was not met with; None where all is as promised."""
        if find_problem(self.directory) is None:
            return "not detected"
        said: list[str] = []
        left = contents(self.directory)
        try:
            found = restore_newest(self.checkpoints, self.quarantine, self.read, said.append)
        except RefusedError as error:
            return f"refused: {error}"
        if found is None or found[0].step != self.older:
            return f"restored {found and found[0].step} instead of {self.older}"
        if found[1] != self.values[self.older]:
            return f"what was restored is not what step {self.older} was"
        aside = list(self.quarantine.glob(f"{self.newest}-*"))
        if len(aside) != 1 or self.directory.exists():
            return "not set aside"
        kept = contents(aside[0])
        if not kept.pop("reason.txt", b"").strip() or kept != left:
            return "not kept as it was, with a reason"
        return None if f"checkpoint {self.newest} is not good" in "".join(said) else "not told"


def typed_again(killed: Path, whole: Path, harm: Damage, cwd: Path) -> None:
    """The real command after the damage: it says so, goes on from the older step, and ends bit for bit the same."""
    shutil.copytree(killed, cwd, symlinks=True)
    try:
        door = Door(cwd)
        checkpoints = door.the_run / "checkpoints"
        *_, older, newest = list_steps(checkpoints)
        harm.strike(checkpoints / str(newest))
        done = door.run(*KEPT)
        assert done.returncode == 0, done
        assert f"checkpoint {newest} is not good" in done.stdout, done
        assert re.findall(r"^restored step (\d+)", done.stdout, re.MULTILINE) == [str(older)], done
        assert [path.name.partition("-")[0] for path in (door.the_run / "quarantine").iterdir()] == [str(newest)]
        assert_same(door.the_run, Door(whole).the_run, LAST)
    finally:
        shutil.rmtree(cwd)


def main(argv: Sequence[str] | None = None) -> int:
    """Gives 0 where every damage was detected and met as promised, 1 where one was not."""
    parser = argparse.ArgumentParser(prog="python -m tests.laws.flips", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", help="a run with two good checkpoints; left out: a small new one")
    for kind, default in zip(KINDS, (500, 50, 50), strict=True):
        parser.add_argument(f"--{kind}s", type=int, default=default, metavar="N")
    parser.add_argument("--commands", type=int, default=5, metavar="N", help="so often the real command is typed again")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    if asked.run is not None and len(list_steps(asked.run / "checkpoints")) < 2:
        parser.error(f"{asked.run} does not have two checkpoints")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # plain Orbax, as conftest uses it, has something to say
    with tempfile.TemporaryDirectory() as room:
        try:
            return _tried(asked, Path(room), random.Random(asked.seed))
        except RefusedError as error:  # the run that was given has no good checkpoint before any damage
            print(f"error: {error}", file=sys.stderr)
            return 1


def _tried(asked: argparse.Namespace, room: Path, rng: random.Random) -> int:
    killed, whole = make(room) if asked.run is None else (None, None)
    run = asked.run if killed is None else Door(killed).the_run
    shutil.copytree(run, room / "copy", symlinks=True)
    trial = Trial(room / "copy")
    kinds = [kind for kind in KINDS for _ in range(getattr(asked, f"{kind}s"))]
    harms = [damage(kind, trial.directory, rng) for kind in kinds]
    for harm in harms:
        trial.suffer(harm)
    trial.check_undamaged()
    sample: list[Damage] = []
    if killed and whole and not trial.failures:
        sample = rng.sample(harms, min(asked.commands, len(harms)))
        for harm in sample:
            typed_again(killed, whole, harm, room / "again")
    _report(trial, harms, len(sample))
    return 1 if trial.failures else 0


def _report(trial: Trial, harms: Sequence[Damage], num_commands: int) -> None:
    many, hit = Counter(harm.kind for harm in harms), Counter(harm.file for harm in harms)
    counts = ", ".join(f"{many[kind]} {kind}s" for kind in KINDS)
    print(
        f"{counts}: {len(harms) - len(trial.failures)} of {len(harms)} detected, set aside, and step {trial.older} "
        f"restored bit for bit instead of {trial.newest}; {len(hit)} of {len(trial.good)} files hit; "
        f"{num_commands} times the command was typed again and ended as if uninterrupted"
    )
    for failure in trial.failures:
        print(f"FAILED: {failure}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
