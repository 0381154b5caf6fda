"""A logger of the user's own as a sink of metrics: what it is made with, and what it is asked for.

The target is called with the names of its parameters:

    target(run_dir: Path, config: dict, attempt: int, say: Callable[[str], None], **options)

as far as it has them. What it makes has `log(step, split, metrics)`, and, where it likes, `catch_up(lines)` and
`close()`. A function whose first three parameters are `step`, `split` and `metrics` is a logger by itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from data.user_target import import_target, restore_number_keys
from runner.log.jsonl import read_metric_lines
from runner.log.sinks import SinkContext
from runner.user_frames import describe_error, find_user_frame
from runner.values import MetricValues

LINE = ("step", "split", "metrics")
# What a target is made with, where it has a parameter of that name.
OFFERED = ("run_dir", "config", "attempt", "say")


class UserSinkError(Exception):
    """Raised where a logger of the user's own raised, with the place; the sink is then left out."""


class UserSink:
    """Hand each line to a logger of the user's own.

    Attributes:
        name: what the configuration calls it.
        catches_up: whether it takes the lines that it lacks; one that does not gets after a restart what comes then.
    """

    def __init__(self, name: str, target: str, options: Mapping[str, Any], context: SinkContext):
        self.name, self._target, self._context = name, target, context
        with self._naming_its_errors():
            function, options = import_target(target), restore_number_keys(options)
            takes_lines = is_logging_function(function)
            self._made: Any = None if takes_lines else function(**self._offer(function, options), **options)
            self._log: Any = function if takes_lines else getattr(self._made, "log", None)
            self._options = options if takes_lines else {}
        if not callable(self._log):
            raise UserSinkError(
                f"{target}: made a {type(self._made).__name__}, which has no log(step, split, metrics); give it one"
            )
        self.catches_up = callable(getattr(self._made, "catch_up", None))

    def catch_up(self) -> None:
        """Give it every line of metrics.jsonl, which is cut back to where training goes on from, if it takes them."""
        if self.catches_up:
            with self._naming_its_errors():
                _refuse_unread(self._made.catch_up(read_metric_lines(self._context.metrics)))

    def log(self, step: int, split: str, metrics: MetricValues) -> None:
        """Give it one line; a copy, for the other sinks get the same."""
        with self._naming_its_errors():
            _refuse_unread(self._log(step, split, dict(metrics), **self._options))

    def close(self) -> None:
        """Let it close, if it has something to close."""
        if callable(close := getattr(self._made, "close", None)):
            with self._naming_its_errors():
                close()

    def _offer(self, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
        context = self._context
        values = (context.run_path, copy.deepcopy(dict(context.document)), context.attempt, context.say)
        takes = _list_parameters(function)
        return {
            name: value
            for name, value in zip(OFFERED, values, strict=True)
            if name in takes and name not in options and takes[name].kind is not inspect.Parameter.VAR_KEYWORD
        }

    @contextmanager
    def _naming_its_errors(self) -> Iterator[None]:
        try:
            yield
        # SystemExit as well: what ends Python would look like a run that was asked to end.
        except (Exception, SystemExit) as error:
            place = find_user_frame(error)
            # The error is the user's own as well, and so is its text.
            try:
                said = describe_error(error)
            except Exception:
                said = type(error).__name__
            said = said.encode("utf-8", "replace").decode()
            raise UserSinkError(f"{self._target}: {said}" + (f" ({place})" if place else "")) from error


def is_logging_function(function: Any) -> bool:
    """Return whether a target takes lines itself, and makes nothing that does."""
    return not inspect.isclass(function) and tuple(_list_parameters(function))[:3] == LINE


def find_wrong_call(function: Any, options: Mapping[str, Any]) -> str | None:
    """Return why a logger cannot be made, or called, with what it will get; None where it can, or cannot be told."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    names = [name for name in OFFERED if name in signature.parameters and name not in options]
    positional = LINE if is_logging_function(function) else ()
    try:
        signature.bind(*positional, **dict.fromkeys(() if positional else names), **options)
    except TypeError as error:
        called = ", ".join([*positional, *(f"{name}=…" for name in (*(() if positional else names), *options))])
        return f"({', '.join(signature.parameters)}) cannot be called as ({called}): {error}"
    if inspect.isclass(function) and not _may_have_log(function):
        return " has no log(step, split, metrics); give it one"
    # What is no plain function may take anything.
    log = getattr(function, "log", None) if inspect.isclass(function) else None
    if inspect.isfunction(log) and isinstance(inspect.getattr_static(function, "log"), FunctionType):
        try:
            inspect.signature(log).bind(None, *LINE)
        except TypeError as error:
            return f".log{inspect.signature(log)} cannot be called as log(step, split, metrics): {error}"
    return None


def _refuse_unread(answer: Any) -> None:
    """Raise TypeError where a call has done nothing yet: a function with `yield` or `async` runs when it is read."""
    if inspect.isgenerator(answer) or inspect.isasyncgen(answer) or inspect.iscoroutine(answer):
        # Else Python warns that it was never awaited.
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError(f"gave a {type(answer).__name__}, which does nothing by itself; leave out yield and async")


def _may_have_log(kind: type) -> bool:
    """Return whether the objects of a class have, or may get, an attribute `log`."""
    if callable(getattr(kind, "log", None)) or hasattr(kind, "__getattr__"):
        return True
    # `self.log = …`
    return any("log" in getattr(getattr(base, "__init__", None), "__code__", _NoCode).co_names for base in kind.__mro__)


class _NoCode:
    co_names = ()


def _list_parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        # Some callables that are written in C do not say what they take.
        return {}
