"""Commands that nobody would type, made from the real grammar: each is answered in one line, and writes nothing.

python -m tests.laws.fuzz [N] [--seed S] [--only NUMBER]

Every group, option, key and flag that there is, with prefixes, packages, values and letters that do not belong there.
Each command is parsed, composed, validated and given its directory, in this process, as `python run.py` does before jax
starts. A command is known by the seed and its number, so that one that is found can be tried again alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from runner.config.schema import Config, dump_yaml, validate_config
from runner.errors import HoldfastError
from runner.installation import find_product_conf
from runner.launch.command_line import RunRequest
from runner.launch.command_words import FLAGS
from runner.launch.compose import compose
from runner.session.standing import find_run, inspect_run

# A command that takes so much processor time hangs: ten times what is promised.
HANG_SECONDS = 20
MAX_LINES, MAX_LETTERS = 3, 600
MAX_MEMORY = 300 << 20

# What a value may be, instead of what is expected.
VALUES = (
    *("", "null", "true", "0", "-1", "1", "7", "1.5", "1e5", "1e400", "-inf", "nan", "9" * 30, "9" * 500, "9" * 5000, "0x10"),
    *("[]", "{}", "[1]", "[[1]]", "[null]", "[a,b]", "{a: 1}", "{a: {b: c}}", "{kind: best}", "[" * 60, "[" * 12 + "]" * 12),
    *("${nope}", "${.}", "${..model}", "${seed}", "${oc.env:HOME}", "${oc.env:NOPE}", "${oc.env:}", "${", "${}", "$", "${foo:1}"),
    *("${oc.decode:'[[['}", "${oc.create:1}", "${hydra:run.dir}", "${hydra:nope}", "${model}", "${oc.select:seed}", "'${now:%Y}'"),
    *("a,b", "1,2", "range(1,4)", "range(0,1000000000)", "range(0,1,0)", "choice(1,2)", "choice()", "interval(0,1)", "glob(*)"),
    *("sort(3,1)", "shuffle(1,2)", "tag(a,1)", "int(x)", "float(1)", "json_str([1])", "extend_list(1)", "bool(3)", "str(" * 40),
    *("'", '"', "'a b'", '"\\x"', "a b", "\\", "a=b", "=", "@", ":", "a:b", "a.b:c", "!!python/object:x", "&a", "*a", "#", "%41"),
    *("../../x", "/etc/passwd", "/dev/zero", "/proc/self/mem", "~", "x" * 300, "x" * 5000, "ü", "\u202e", "\ud800", "\x1b[31m", "\0", "\n", "a\nb"),
    *("None", "off", "yes", "1_000", "1:30", "2001-01-01", "--", "-m", "best", "newest", "8GB", "3h", "http://x", "s3://b/k"),
)  # fmt: skip
PREFIXES = ("", "", "", "", "+", "++", "~", "+++", "~~", "~+", "-", "--")
KEYS = (
    *("", "nope", "a.b.c", "model.", ".model", "..", "/", "model/x", "model/../model", "x" * 300, "a." * 60 + "a", "0", "ü", "kind"),
    *("hydra", "hydra.", "hydra.run.dir", "hydra.sweep.dir", "hydra.output_subdir", "hydra.verbose", "hydra.mode", "hydra.job.chdir"),
    *("hydra.searchpath", "hydra/launcher", "hydra/sweeper", "hydra/job_logging", "hydra/help", "hydra.launcher.parallel"),
    *("hydra.launcher", "hydra.launcher.retries", "hydra.sweeper.n_trials", "hydra.sweeper.params", "hydra.sweeper.max_batch_size"),
    *("hydra.callbacks.x._target_", "hydra.job_logging.root.level", "defaults", "_target_", "init_from", "experiment", "db"),
    *("ckpt.save.new", "ckpt.save.new.kind", "retention.new", "preempt.notices.x", "eval.new", "eval.new.kind", "model.options.x"),
)  # fmt: skip
PACKAGES = ("@", "@_global_", "@model", "@x.y", "@_group_", "@:x")
SEPARATORS = ("=", "=", "=", "=", "=", "=", "==", ":", ": ", "", " = ", "=+")
FLAG_VALUES = (
    "",
    "job",
    "all",
    "hydra",
    "nope",
    "config",
    "/",
    "conf",
    "x.yaml",
    "..",
    "searchpath",
    "defaults",
    "${x}",
)


@dataclass(frozen=True)
class Grammar:
    """What there is to type: groups with their options, and the dotted keys of all options."""

    groups: Mapping[str, Sequence[str]]
    keys: Sequence[str]

    @classmethod
    def read(cls) -> Grammar:
        """Read it from conf/ and from the schema."""
        conf = find_product_conf()
        folders = [folder for folder in sorted(conf.rglob("*")) if folder.is_dir()]
        groups = {
            str(folder.relative_to(conf)): sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders
        }
        return cls(groups, sorted(set(_iter_keys(Config, ""))))


@dataclass(frozen=True)
class Fault:
    """A command that was not answered as it should be, and why."""

    number: int
    words: tuple[str, ...]
    why: str

    def __str__(self) -> str:
        return f"{self.number}: {list(self.words)!r:.400}\n    {self.why}"


def make_command(grammar: Grammar, seed: int, number: int, runs: Sequence[str]) -> tuple[str, ...]:
    """Return the command of a number; some of them go on with one of `runs`."""
    rng = random.Random(f"{seed} {number}")
    words = [_make_word(grammar, rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4)))]
    # Much is only looked at where the rest is right.
    if rng.random() < 0.5:
        words = ["model=mlp", "data=digits", *words]
    if rng.random() < 0.15:
        words.append(f"dir={rng.choice(runs)}")
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), "-m")
    for _ in range(rng.choice((0, 0, 0, 0, 1))):
        place = rng.randrange(len(words))
        words[place] = _mutate(words[place], rng)
    return tuple(words)


def find_fault(number: int, words: tuple[str, ...], cwd: Path) -> Fault | None:
    """Do what a command asks for, up to where jax would start. Return what is wrong with how it was answered."""
    before, out = _snapshot(cwd), io.StringIO()
    said, why = "", ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            request = compose(words)
            if isinstance(request, RunRequest):
                inspect_run(find_run(request.config, request.command.overrides), request.config)
    except HoldfastError as error:
        said = str(error)
        if len(said.splitlines()) > MAX_LINES or len(said) > MAX_LETTERS:
            why = f"a message of {len(said.splitlines())} lines, {len(said)} letters: {said[:200]!r}"
        elif not said.isprintable():
            why = f"a message that commands the terminal: {said!r}"
    except SystemExit as ended:
        if ended.code not in (0, None):
            why = f"SystemExit({ended.code}): {out.getvalue()[-300:]!r}"
    # Whatever it is, it would be a traceback.
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next(
            (frame for frame in reversed(frames) if "/runner/" in frame.filename or "/data/" in frame.filename),
            frames[-1],
        )
        why = f"{type(error).__name__}: {str(error)[:200]!r} in {place.filename}:{place.lineno}"
    if _snapshot(cwd) != before:
        why += f" wrote: {sorted(_snapshot(cwd).keys() ^ before.keys())}"
    if "jax" in sys.modules:
        why += " imported jax"
    return Fault(number, words, why.strip()) if why else None


def _read_peak_memory() -> int:
    """The most memory that this program had at once, in bytes."""
    # Not getrusage: it counts what the process that started this one had at that moment.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def try_commands(numbers: Sequence[int], seed: int, tell: Callable[[str], None]) -> list[Fault]:
    """Try the commands of these numbers in a new working directory. Return the faults."""
    grammar, faults, slowest = Grammar.read(), [], (0.0, 0, ())
    began = time.process_time()
    home = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        try:
            runs = _make_runs(Path(folder))
            for number in numbers:
                words = make_command(grammar, seed, number, runs)
                start = time.process_time()
                with _ended_when_hanging(words):
                    fault = find_fault(number, words, Path(folder))
                slowest = max(slowest, (time.process_time() - start, number, words))
                if fault:
                    faults.append(fault)
                    tell(str(fault))
        finally:
            os.chdir(home)
    spent, memory = time.process_time() - began, _read_peak_memory()
    tell(
        f"{len(numbers):,} commands, seed {seed}: {len(faults)} faults; {1000 * spent / len(numbers):.0f} ms of processor time "
        f"each, {slowest[0]:.2f} s at most (number {slowest[1]}: {list(slowest[2])!r:.150}); {memory >> 20} MiB"
    )
    if memory > MAX_MEMORY:
        faults.append(Fault(-1, (), f"took {memory >> 20} MiB"))
    return faults


def main(argv: Sequence[str]) -> int:
    """Try N commands, or one; return 1 where there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.laws.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the command of this number alone")
    arguments = parser.parse_args(argv)
    numbers = range(arguments.count) if arguments.only is None else [arguments.only]
    return 1 if try_commands(numbers, arguments.seed, partial(print, flush=True)) else 0


def _make_word(grammar: Grammar, rng: random.Random) -> str:
    """Return a word: mostly one that Hydra can read, so that the rest is asked as well."""
    kind = rng.choices(("choice", "value", "wild", "flag"), (30, 45, 20, 5))[0]
    if kind == "flag":
        flag = rng.choice(FLAGS)
        return rng.choice((flag, f"{flag}={rng.choice(FLAG_VALUES)}", f"--{flag}"))
    if kind == "choice":
        group = rng.choice(list(grammar.groups))
        value = rng.choice((*grammar.groups[group], rng.choice(VALUES)))
        return f"{group}={value}"
    if kind == "value":
        prefix = rng.choices(("", "+", "++", "~"), (20, 2, 2, 1))[0]
        return f"{prefix}{rng.choice(grammar.keys)}={rng.choice(VALUES)}"
    key = rng.choice((rng.choice(grammar.keys), rng.choice(list(grammar.groups)), *KEYS))
    if rng.random() < 0.2:
        key += rng.choice(PACKAGES)
    return f"{rng.choice(PREFIXES)}{key}{rng.choice(SEPARATORS)}{rng.choice(VALUES)}"


def _mutate(word: str, rng: random.Random) -> str:
    """Return a word with a letter more, less, or another."""
    place = rng.randrange(len(word) + 1)
    letter = rng.choice("=+~@/.:,'\"[]{}()$\\ \t0aé-!&*#%")
    return rng.choice(
        (
            word[:place] + letter + word[place:],
            word[:place] + word[place + 1 :],
            word[:place] + letter + word[place + 1 :],
        )
    )


def _make_runs(folder: Path) -> list[str]:
    """Write configurations of runs, one good and others that nobody should believe; return their directories."""
    good = dump_yaml(validate_config(_compose_quietly("model=mlp", "data=digits")).document)
    bomb = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(20)
    )
    contents = {
        "good": good.encode(),
        "bomb": bomb.encode(),
        "deep": b"[" * 20_000,
        "digits": good.replace("seed: 0", f"seed: {'9' * 4000}").encode(),
        "bytes": good.encode() + b"\xff\xfe",
        "nul": good.encode() + b"\0",
        "tag": b"!!python/object/apply:os.system [touch SPRUNG]",
        "text": good.replace("seed: 0", "seed: ${oc.env:HOME}").encode(),
        "empty": b"",
        "huge": b"#" * (2 << 20),
        "control": good.replace("name: default", 'name: "\\e[31m"').encode(),
    }
    for name, content in contents.items():
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_bytes(content)
    return [*contents, "nowhere", "/dev", "x" * 300, "good/config.yaml"]


def _compose_quietly(*words: str) -> Any:
    request = compose(words)
    assert isinstance(request, RunRequest)
    return request.config.document


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file below a folder with its size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns if path.is_file() else 0)
    return found


@contextlib.contextmanager
def _ended_when_hanging(words: tuple[str, ...]) -> Iterator[None]:
    """Raise where a command takes processor time without end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"hangs: {words!r:.300}")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _iter_keys(annotation: Any, prefix: str) -> Iterator[str]:
    """Yield the dotted key of every field below a type; rules and evaluations are called `a`."""
    if get_origin(annotation) in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _iter_keys(option, prefix)
    elif is_dataclass(annotation):
        hints = get_type_hints(annotation)
        for field in fields(annotation):
            if get_origin(hints[field.name]) is not ClassVar:
                key = f"{prefix}.{field.name}" if prefix else field.name
                yield key
                yield from _iter_keys(hints[field.name], key)
    elif isinstance(origin := get_origin(annotation), type) and issubclass(origin, Mapping):
        yield from _iter_keys(get_args(annotation)[1], f"{prefix}.a")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
