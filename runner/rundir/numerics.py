"""numerics.json: what the bits of a run depend on besides its configuration. Written once, sealed, synced, there twice.

On a CPU, XLA divides large products among the threads of a pool, and where it divides them it adds up in another order.
The pool is as large as the environment variable NPROC says when jax starts, else as many cores as the process may use:
a run that goes on with fewer cores would compute other bits. So a run keeps the size of its first attempt. GPUs and
TPUs compute the same whatever the pool is. No jax.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from runner import files, hosts
from runner.rundir.attempt_lines import read_attempts
from runner.rundir.layout import RunDir
from runner.types import JsonObject
from runner.values import Say

# A new run has at least so many threads: on one core and on two, eight cost about 5 % more processor time than one or
# two, or less than that (measured), and machines of up to so many cores compute the same bits from the same command.
LEAST_THREADS = 8
MOST_THREADS = 1024
# The environment variable that XLA reads, and ours beside it: a child must not take what we set for its user's word.
THREADS, SET_BY_RUN = "NPROC", "HOLDFAST_NPROC"
# Variables that choose what XLA and jax compute, or how precisely (each seen to change bits, or documented so).
NUMERIC_VARIABLES = (
    *("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"),
    *("JAX_ENABLE_X64", "JAX_DEFAULT_DTYPE_BITS", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_DEFAULT_MATMUL_PRECISION"),
    *("JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "JAX_RANDOM_SEED_OFFSET"),
    *("JAX_DISABLE_JIT", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_OPTIMIZATION_LEVEL"),
)
# Flags that say where XLA writes what it does, or how many devices there are: bits do not follow these words.
_HARMLESS_FLAG = re.compile(r"--xla_(dump|force_host_platform_device_count|gpu_dump)\S*")
# What XLA calls the threads of the pool.
_POOL_THREAD = "tf_XLAEigen"


UNKNOWN = "XLA has the threads of this machine, and the last bits may be others than the run's"


@dataclass(frozen=True)
class Numerics:
    """Hold what the bits of a run follow.

    Attributes:
        threads: the size of XLA's thread pool.
        environment: the variables of NUMERIC_VARIABLES that were set at the first attempt.
    """

    threads: int
    environment: Mapping[str, str]


def settle_numerics(run_dir: RunDir, say: Say) -> Numerics:
    """Have XLA compute in this process as in the run's first attempt; for that one, choose how, and write it down.

    Comes after the run is locked, and before jax starts. Says what differs, as warnings.
    Raises OSError where a file is there and cannot be read now, or cannot be written.
    """
    copies = [_read_if_there(path) for path in _find_paths(run_dir)]
    found = next(filter(None, map(_decode, copies)), None)
    trouble = _describe_damage(run_dir, copies)
    # Every process of a run has a pool of its own: the lead's word counts.
    numerics = Numerics(**hosts.agree("numerics", asdict(found or _choose_numerics(run_dir, trouble, say))))
    if hosts.is_lead() and (found is None or None in map(_decode, copies)):
        _write_numerics(run_dir, numerics)
    _apply(numerics, say)
    return numerics


def adopt_numerics(run_dir: RunDir, say: Say) -> None:
    """Have XLA compute in this process as the run does, where that is known; the run is only read."""
    try:
        copies = [_read_if_there(path) for path in _find_paths(run_dir)]
    except OSError as error:
        say(f"warning: numerics.json cannot be read ({error.strerror}): {UNKNOWN}")
        return
    found = next(filter(None, map(_decode, copies)), None)
    threads = found.threads if found else _find_recorded_threads(run_dir)
    if threads is not None:
        _apply(found or Numerics(threads, _environ()), say)
    elif trouble := _describe_damage(run_dir, copies):
        say(f"warning: {trouble}: {UNKNOWN}")


def check_thread_pool(threads: int, say: Say) -> None:
    """Warn where the pool that jax has started is of another size; before jax starts, say nothing."""
    started = count_pool_threads()
    if started not in (0, threads):
        say(
            f"warning: XLA started with {started} threads in this process, and this run has {threads}: it may compute "
            f"other bits; start it in a process of its own, or set {THREADS}={threads} before jax starts"
        )


def count_pool_threads() -> int:
    """Return how many threads XLA's pool has in this process; 0 where it has not started or cannot be seen."""
    names = []
    with suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            # It may end just now.
            with suppress(OSError):
                names.append((thread / "comm").read_text().strip())
    return names.count(_POOL_THREAD)


def count_threads_to_come() -> int:
    """Return the size that XLA's thread pool will have, or has, in this process."""
    return count_pool_threads() or _parse_threads(os.environ.get(THREADS)) or _count_cores()


def _choose_numerics(run_dir: RunDir, trouble: str | None, say: Say) -> Numerics:
    """Return how a run computes that has no file to say it, because it is new, because it is older, or by damage."""
    wish, cores = _read_wish(say), min(_count_cores(), MOST_THREADS)
    # What is begun anew may be computed in any way.
    if not run_dir.holds_checkpoints():
        return Numerics(wish or max(cores, LEAST_THREADS), _environ())
    if (recorded := _find_recorded_threads(run_dir)) is not None:
        say(f"warning: {trouble or 'numerics.json is gone'}: going on with {recorded} threads, as attempts.jsonl says")
        return Numerics(recorded, _environ())
    # An older version had the cores of each attempt.
    threads = wish or cores
    say(
        f"warning: {trouble or 'this run does not say how many threads XLA had'}: going on with {threads}, for good; "
        f"if it was another number, a CPU computes other bits from here on ({THREADS}=N chooses it now)"
    )
    return Numerics(threads, _environ())


def _apply(numerics: Numerics, say: Say) -> None:
    """Tell XLA the size, and the user what is different from the first attempt."""
    wish = _read_wish(say)
    if wish not in (None, numerics.threads):
        say(f"warning: {THREADS}={wish}: this run was begun with {numerics.threads} threads, and keeps them")
    now = _environ()
    for name in NUMERIC_VARIABLES:
        before, here = numerics.environment.get(name), now.get(name)
        if before != here:
            say(f"warning: {name} was {_quote(before)} when this run began and is {_quote(here)}: bits may differ")
    os.environ[THREADS] = os.environ[SET_BY_RUN] = str(numerics.threads)
    check_thread_pool(numerics.threads, say)


def _read_wish(say: Say) -> int | None:
    """Return how many threads the user asks for; None where nothing is asked, or (and say so) no number is."""
    word = os.environ.get(THREADS)
    if not word or word == os.environ.get(SET_BY_RUN):
        return None
    if (threads := _parse_threads(word)) is None:
        say(f"warning: {THREADS}={word[:40]!r} is no number from 1 to {MOST_THREADS}; taken as not set")
        # It is said once.
        del os.environ[THREADS]
    return threads


def _parse_threads(word: str | None) -> int | None:
    word = (word or "").strip()
    return int(word) if re.fullmatch("[0-9]{1,4}", word) and _is_size(int(word)) else None


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MOST_THREADS


def _count_cores() -> int:
    """Return how many cores this process may use: what XLA counts where NPROC is not set."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environ() -> dict[str, str]:
    """Return what numeric variables say here."""
    values = {name: os.environ.get(name, "") for name in NUMERIC_VARIABLES}
    values["XLA_FLAGS"] = _HARMLESS_FLAG.sub("", values["XLA_FLAGS"])
    return {name: " ".join(value.split()) for name, value in values.items() if value.strip()}


def _quote(value: str | None) -> str:
    # It may come from a file of somebody else's.
    return "not set" if value is None else json.dumps(value[:200])


def _find_paths(run_dir: RunDir) -> tuple[Path, Path]:
    return run_dir.path / "numerics.json", run_dir.path / ".numerics.copy.json"


def _read_if_there(path: Path) -> bytes | None:
    try:
        return files.read_file(path)
    except FileNotFoundError:
        return None


def _describe_damage(run_dir: RunDir, copies: Sequence[bytes | None]) -> str | None:
    """Return which files are there and do not hold what was written; None for none."""
    pairs = zip(_find_paths(run_dir), copies, strict=True)
    damaged = [path.name for path, content in pairs if content is not None and _decode(content) is None]
    return f"{' and '.join(damaged)} cannot be believed" if damaged else None


def _write_numerics(run_dir: RunDir, numerics: Numerics) -> None:
    body = json.dumps(asdict(numerics))
    content = f"{body}\n{xxhash.xxh3_128(body.encode()).hexdigest()}\n"
    for path in _find_paths(run_dir):
        files.replace_file(path, content)


def _decode(content: bytes | None) -> Numerics | None:
    """Return what was written; None where the bytes are not those."""
    if content is None:
        return None
    body, _, checksum = content.rstrip(b"\n").rpartition(b"\n")
    if xxhash.xxh3_128(body).hexdigest().encode() != checksum:
        return None
    with suppress(ValueError, TypeError):
        found = Numerics(**files.parse_json(body))
        # A checksum is no signature: somebody else may have made both.
        values = found.environment.items() if isinstance(found.environment, dict) else [(None, None)]
        if _is_size(found.threads) and all(isinstance(word, str) for item in values for word in item):
            return found
    return None


def _find_recorded_threads(run_dir: RunDir) -> int | None:
    """Return what the newest attempt that says it had."""
    return next((line["threads"] for line in _iter_attempts(run_dir) if _is_size(line.get("threads"))), None)


def _iter_attempts(run_dir: RunDir) -> Iterator[JsonObject]:
    """Yield what each attempt says, newest first: the running one, killed ones that have no line yet, the lines."""
    status = run_dir.read_status()
    yield status.get("attempt", {})
    yield from reversed(status.get("unburied", []))
    yield from reversed(read_attempts(run_dir))
