"""Call an evaluation of the user's own, and read what it returns: numbers for the log, and files for the run.

Training never ends because of such a function, and what it does to global state changes nothing of training. What it
does wrong is one ConfigError, of which the evaluator decides what becomes of it.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.sources import Source
from data.user_target import import_target, restore_number_keys
from models import InvalidModelOrObjective
from models.objectives import describe_value
from runner.config.evaluations import ASKED_BY_NAME, ExternalEvaluation
from runner.config.user_code import as_config_error
from runner.errors import ConfigError, HoldfastError
from runner.text import shorten
from runner.train.evaluation_files import encode_figure, encode_mosaic, encode_picture

# A line of the log has these beside what was measured.
RESERVED_KEYS = ("step", "split")
# The names of a number and of a text, or a picture, that are returned alone.
ALONE_NUMBER, ALONE_FILE = "value", "file"
# It becomes part of the name of a file.
FILE_KEY = re.compile(r"\w[\w.-]{0,63}")
MAX_KEY = 100
# Grey, colour, and colour with how much of it is to be seen.
CHANNELS = (1, 3, 4)
# Rounding takes a value no further than this out of the range of a picture.
ROUNDING = 1e-3
EXPECTED = "expected a number, a text, a picture (an array [h, w], [h, w, c] or [n, h, w, c]) or a figure of matplotlib"


@dataclass(frozen=True)
class EncodedFile:
    """What becomes a file: its bytes, and the end of its name."""

    content: bytes
    suffix: str


@dataclass(frozen=True)
class UserFindings:
    """What a function of the user's own found.

    Attributes:
        values: numbers and files under the names they have in the log.
        is_alone: whether it returned one value without a name.
        cautions: what is to be told of them, by name.
    """

    values: Mapping[str, float | EncodedFile]
    is_alone: bool = False
    cautions: Mapping[str, str] = field(default_factory=dict)


class HeldOutBatches:
    """Iterate over the held-out examples, each once and in order, as dicts of numpy arrays; the last batch is short.

    What reading them raises is no mistake of who reads: it is remembered, whatever becomes of it there.

    Args:
        source: the examples.
        batch_size: how many of them a batch has.
        between: called before each batch; it may raise to end the evaluation.
    """

    def __init__(self, source: Source, batch_size: int, between: Callable[[], None] = lambda: None):
        self._source, self._batch_size, self._between = source, batch_size, between
        self._position, self._is_closed, self._was_read = 0, False, False
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        # A second loop over them would see nothing, and nobody would be told.
        if self._was_read:
            raise ValueError("batches: they were read to their end; keep what is needed twice (list(batches))")
        return self

    def __len__(self) -> int:
        return math.ceil(len(self._source) / self._batch_size)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._is_closed:
            raise ValueError("batches: the evaluation has ended")
        start = self._position
        if start >= len(self._source):
            self._was_read = True
            raise StopIteration
        self._position = min(start + self._batch_size, len(self._source))
        try:
            self._between()
            return dict(self._source.take(np.arange(start, self._position)))
        except Exception as error:
            self.failure = error
            raise

    def close(self) -> None:
        """Give no more batches: who has kept the iterator does not read data while training does."""
        self._is_closed = True


@dataclass(frozen=True)
class Asked:
    """What a function of the user's own may ask for, by the names in `ASKED_BY_NAME`."""

    batches: HeldOutBatches
    step: int
    key: jax.Array
    decode: Callable[[np.ndarray], str] | None
    classes: tuple[str, ...]


def check_user_evaluation(name: str, option: ExternalEvaluation) -> None:
    """Raise ConfigError where the target of an evaluation is a class: a call would make an object, and no numbers."""
    if inspect.isclass(import_target(option.target)):
        raise ConfigError(
            f"eval.{name}.target: {option.target} is a class; expected a function of what is evaluated, that returns "
            "numbers, texts or pictures"
        )


def call_user_evaluation(
    name: str, option: ExternalEvaluation, make_subject: Callable[[], Any], asked: Asked, seed: int
) -> UserFindings:
    """Return what the target of an evaluation finds.

    Raises ConfigError for what its code does wrong, and what reading the batches raised as it is: a stop, broken data.
    """
    part, batches = f"eval.{name}", asked.batches
    try:
        with as_config_error(part, option.target), apart_from_training(seed, asked.step):
            function = import_target(option.target)
            # Here as well: there may be no memory for arrays of its own.
            # A copy: one that changes its options would be another one when it is called next, and after a restart.
            options = restore_number_keys(option.options)
            returned = function(make_subject(), **_choose_named(function, asked, options), **options)
            # What is computed in the background fails where it is read.
            found = _read_returned(returned)
    except Exception as error:
        if batches.failure is not None:
            raise batches.failure from None
        if isinstance(error, HoldfastError):
            raise
        if os.environ.get("HYDRA_FULL_ERROR"):
            traceback.print_exception(error)
        said = shorten(str(error).strip().partition("\n")[0], 300)
        raise ConfigError(f"{part}.target: {option.target}: {type(error).__name__}: {said}") from error
    finally:
        batches.close()
    # The function may have gone on without the batches that it did not get.
    if batches.failure is not None:
        raise batches.failure
    return found


def _choose_named(function: Any, asked: Asked, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a function asks for by the names of its parameters; the first one gets the subject."""
    try:
        names = [*inspect.signature(function).parameters][1:]
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return {}
    return {name: getattr(asked, name) for name in ASKED_BY_NAME if name in names and name not in options}


@contextmanager
def apart_from_training(seed: int, step: int) -> Iterator[None]:
    """Give a block global random numbers of its own, the same after a resume, and pictures without a window.

    Those of before are put back: data of the user's own may draw from them.
    """
    before, before_numpy = random.getstate(), np.random.get_state()
    (own,) = np.random.SeedSequence([seed, step]).generate_state(1)
    random.seed(int(own))
    np.random.seed(own)
    if not os.environ.get("MPLBACKEND") and (matplotlib := sys.modules.get("matplotlib")):
        # A window belongs to the main thread, and this may be another one.
        matplotlib.use("Agg")
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


def _read_returned(returned: Any) -> UserFindings:
    """Return what a function gave as numbers and files. Raises InvalidModelOrObjective where it is something else."""
    if not isinstance(returned, Mapping):
        value, caution = _read_value(returned)
        if value is None:
            raise InvalidModelOrObjective(f"gave {_describe(returned)}; {EXPECTED}, or a dict of these")
        key = ALONE_NUMBER if isinstance(value, float) else ALONE_FILE
        return UserFindings({key: value}, is_alone=True, cautions={key: caution} if caution else {})
    values, cautions = {}, {}
    for key, each in returned.items():
        value, caution = _read_value(each)
        if value is None:
            raise InvalidModelOrObjective(f"gave {key!r} as {_describe(each)}; {EXPECTED}")
        _check_key(key, value)
        values[key] = value
        if caution:
            cautions[key] = caution
    return UserFindings(values, cautions=cautions)


def _check_key(key: Any, value: float | EncodedFile) -> None:
    """Raise InvalidModelOrObjective where a name can be none in the log, or none of a file."""
    if not isinstance(key, str):
        raise InvalidModelOrObjective(f"gave a value named {key!r}, which is {type(key).__name__}; expected text")
    if not key.strip() or len(key) > MAX_KEY or not key.isprintable() or "/" in key or key in RESERVED_KEYS:
        raise InvalidModelOrObjective(
            f"gave a value named {shorten(key, 60)!r}; expected another name (taken: {', '.join(RESERVED_KEYS)}, and "
            f"names with '/' or of more than {MAX_KEY} letters)"
        )
    if isinstance(value, EncodedFile) and not FILE_KEY.fullmatch(key):
        raise InvalidModelOrObjective(
            f"gave a file named {shorten(key, 60)!r}; expected letters, digits, '-', '_' and '.', 64 at most"
        )


def _describe(value: Any) -> str:
    """Return what a value is, for an error message: its type, and the shape of an array."""
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array of {value.dtype}{list(value.shape)}"
    return describe_value(value)


def _read_value(value: Any) -> tuple[float | EncodedFile | None, str]:
    """Return a value as a number or a file, None where it is neither, and what is to be told of it."""
    if isinstance(value, str):
        return EncodedFile(value.encode(), ".txt"), ""
    if isinstance(value, numbers.Real):
        return float(value), ""
    if (figure := _find_figure(value)) is not None:
        content = encode_figure(figure)
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            # It keeps every figure that it made.
            pyplot.close(figure)
        return EncodedFile(content, ".png"), ""
    if hasattr(value, "__array_interface__") and type(value).__module__.startswith("PIL."):
        value = np.asarray(value.convert("RGB"))
    if not isinstance(value, np.ndarray | np.generic | jax.Array) or not _is_real(value.dtype):
        return None, ""
    array = np.asarray(value)
    return (float(array), "") if array.ndim == 0 else _read_picture(array)


def _is_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _find_figure(value: Any) -> Any:
    """Return a figure of matplotlib, also that of axes; None for other values."""
    if not any(base.__module__.startswith("matplotlib.") for base in type(value).__mro__):
        return None
    figure = value if hasattr(value, "savefig") else getattr(value, "figure", None)
    return figure if hasattr(figure, "savefig") else None


def _read_picture(array: np.ndarray) -> tuple[EncodedFile | None, str]:
    """Return an array as PNG, None where it is no picture, and what is to be told of it."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] not in CHANNELS or not array.size:
        return None, ""
    caution = ""
    if array.dtype == np.uint8:
        array = array / np.float32(255.0)
    elif jnp.issubdtype(array.dtype, jnp.integer):
        return None, ""
    else:
        array = array.astype(np.float32)
        low, high = array.min(), array.max()
        # The other way round, for NaN.
        if not (low >= -ROUNDING and high <= 1.0 + ROUNDING):
            caution = f"is a picture with values from {low:.3g} to {high:.3g}; expected 0 to 1: what is outside is cut"
    if array.shape[-1] == 4:
        array, alpha = array[..., :3], array[..., 3:]
        array = array * alpha + (1.0 - alpha)
    if array.ndim == 3:
        return EncodedFile(encode_picture(array), ".png"), caution
    return EncodedFile(encode_mosaic(array, math.ceil(math.sqrt(len(array)))), ".png"), caution
