"""Rules of the user's own: asked where training needs them, with copies, and never able to end it.

An option such as `ExternalSave` runs no code: verbs that look at somebody else's run read it as well. Here it becomes a
rule that asks, in the process that trains. What a rule raises, or what it returns that says nothing, is told once.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from data.user_target import import_target, restore_number_keys
from runner.checkpoint.record import Record
from runner.checkpoint.retention import ExternalRetention, RetentionRule
from runner.checkpoint.strategy import ExternalSave, History, SaveRule
from runner.text import display_path, mask_unprintable, shorten
from runner.user_frames import describe_error, find_user_frame
from runner.values import Say, StepInfo

Answer = TypeVar("Answer")

MAX_REASON = 200  # characters
MAX_ANSWERS = 1_000_000  # more steps than a run can have on disk: what gives so many does not end


class UnclearAnswer(ValueError):
    """Raised where a rule returned what says neither yes nor no."""


class UserRule:
    """Ask a function of the user's own, and tell once where it cannot be asked.

    Attributes:
        target: its name, as the configuration has it.
    """

    def __init__(self, key: str, target: str, options: Mapping[str, Any], tell: Say):
        self.target = target
        self._key, self._options, self._tell = key, options, tell
        # Once: rules are asked after every step.
        self._function, self._has_told = import_target(target), False

    def ask(self, read: Callable[[Any], Answer], fallback: Answer, otherwise: str, *arguments: Any) -> Answer:
        """Return what `read` makes of the function's answer; `fallback` where it has none.

        `otherwise` says for people what the fallback does.
        """
        try:
            # A copy: a rule that changes its options would be another one at the next step, and after a restart.
            return read(self._function(*arguments, **restore_number_keys(self._options)))
        # SystemExit as well: what ends Python would look like a run that was asked to end.
        except (Exception, SystemExit) as error:
            if not self._has_told:
                self._has_told = True
                self._tell(f"warning: {self._key}: {self.target}: {self._explain(error)}; {otherwise}; told once")
            return fallback

    def _explain(self, error: BaseException) -> str:
        where = None if isinstance(error, UnclearAnswer) else find_user_frame(error)
        where = where or _find_definition(self._function)
        # The error is the user's own as well, and so is its text.
        try:
            said = str(error) if isinstance(error, UnclearAnswer) else describe_error(error)
        except Exception:
            said = type(error).__name__
        return clean_line(said) + (f" ({where})" if where else "")


@dataclass(frozen=True, kw_only=True)
class AskedSave(ExternalSave):
    """A rule of the user's own that says when to save, as it is asked in training."""

    rule: UserRule
    records: CopiedRecords

    def reason(self, info: StepInfo, history: History) -> str | None:
        """Return why to save now, or None."""
        info = replace(info, metrics=dict(info.metrics), losses=tuple(info.losses))
        history = replace(history, records=self.records.copy(history.records))
        return self.rule.ask(self._read, None, "it saves nothing", info, history)

    def _read(self, answer: Any) -> str | None:
        return read_reason(answer, self.rule.target)


@dataclass(frozen=True, kw_only=True)
class AskedRetention(ExternalRetention):
    """A rule of the user's own that says which checkpoints stay, as it is asked in training."""

    rule: UserRule
    is_asked: ClassVar[bool] = True

    def select(self, records: Sequence[Record]) -> dict[int, str]:
        """Return the steps to keep, each with the reason; all of them where the rule does not say."""
        steps = {record.step for record in records}
        everything = dict.fromkeys(steps, f"{self.rule.target} did not say which to keep")

        def read(answer: Any) -> dict[int, str]:
            found = read_steps(answer, self.rule.target)
            return {step: why for step, why in found.items() if step in steps}

        return self.rule.ask(read, everything, "every checkpoint stays", CopiedRecords().copy(records))


def ask_user_rules(
    save: Mapping[str, SaveRule], keep: Mapping[str, RetentionRule], tell: Say
) -> tuple[dict[str, SaveRule], dict[str, RetentionRule]]:
    """Return the rules of saving and of retention, those of the user's own as rules that ask him.

    `tell` takes a line for people; it may be called from any thread.
    """
    asked_save: dict[str, SaveRule] = dict(save)
    for name, when in save.items():
        if isinstance(when, ExternalSave):
            rule = UserRule(f"ckpt.save.{name}", when.target, when.options, tell)
            records = CopiedRecords()
            asked_save[name] = AskedSave(target=when.target, options=when.options, rule=rule, records=records)
    asked_keep: dict[str, RetentionRule] = dict(keep)
    for name, which in keep.items():
        if isinstance(which, ExternalRetention):
            rule = UserRule(f"retention.{name}", which.target, which.options, tell)
            asked_keep[name] = AskedRetention(target=which.target, options=which.options, rule=rule)
    return asked_save, asked_keep


def read_reason(answer: Any, name: str) -> str | None:
    """Return the reason that a rule gave, in one line; `name` where it said true, None where it said no.

    Raises UnclearAnswer where it said something else.
    """
    if answer is None:
        return None
    # A truth value of numpy or jax, as of a comparison.
    if not isinstance(answer, str) and getattr(answer, "shape", None) == ():
        answer = answer.item()
    if isinstance(answer, bool):
        return name if answer else None
    if isinstance(answer, str):
        return clean_line(answer) or None
    raise UnclearAnswer(f"gave {_describe(answer)}; expected a reason, true, or nothing")


def read_steps(answer: Any, name: str) -> dict[int, str]:
    """Return the steps that a rule keeps, each with its reason; `name` where it gave none.

    Raises UnclearAnswer where it returned anything but steps, records, or a mapping of reasons by step.
    """
    if isinstance(answer, str | bytes) or not hasattr(answer, "__iter__"):
        _refuse_steps(answer)
    pairs: Iterable[tuple[Any, Any]] = (
        answer.items() if isinstance(answer, Mapping) else ((each, "") for each in answer)
    )
    found: dict[int, str] = {}
    for number, (step, why) in enumerate(islice(pairs, MAX_ANSWERS)):
        found[_read_step(step)] = (clean_line(why) if isinstance(why, str) else "") or name
        if number == MAX_ANSWERS - 1:
            raise UnclearAnswer(f"gave {MAX_ANSWERS:,} steps or more; expected those to keep")
    return found


def _read_step(item: Any) -> int:
    step = item.step if isinstance(item, Record) else item
    # A list of truth values would be read as the steps 0 and 1.
    if isinstance(step, bool):
        _refuse_steps(step)
    try:
        return operator.index(step)
    except TypeError:
        _refuse_steps(step)


def _refuse_steps(answer: Any) -> NoReturn:
    raise UnclearAnswer(f"gave {_describe(answer)}; expected the steps to keep, as whole numbers")


def clean_line(text: str) -> str:
    """Return a text of somebody's own in one line, short, and such that every file and terminal takes it."""
    return shorten(mask_unprintable(" ".join(text.encode("utf-8", "replace").decode().split())), MAX_REASON)


def _describe(value: Any) -> str:
    """Return a value in a few words, whatever it is."""
    kind = type(value).__name__
    if not isinstance(value, int | float | str):
        return f"a {kind}"
    # Python refuses to write a number of 4,300 digits, and a class may be derived from these.
    try:
        return f"{shorten(repr(value), 60)} of type {kind}"
    except Exception:
        return f"a {kind}"


def _find_definition(function: Any) -> str | None:
    """Return where a function is defined: `rules.py, line 4`; None where that is not known."""
    try:
        code = getattr(inspect.unwrap(function), "__code__", None)
    # Of a decorator that leads back to itself.
    except ValueError:
        return None
    return f"{display_path(Path(code.co_filename))}, line {code.co_firstlineno}" if code else None


class ReadOnlyDict(dict[str, float]):
    """A mapping that raises where it is changed; a copy of it is a plain one."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a rule may not change what it is given; make a copy: dict(record.metrics)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class CopiedRecords:
    """Copy the records for a rule, once for as long as they are the same: rules are asked after every step."""

    def __init__(self) -> None:
        self._of: Sequence[Record] | None = None
        self._copies: tuple[Record, ...] = ()

    def copy(self, records: Sequence[Record]) -> tuple[Record, ...]:
        """Return copies of records, whose metrics cannot be changed."""
        if records is not self._of:
            self._of = records
            self._copies = tuple(replace(record, metrics=ReadOnlyDict(record.metrics)) for record in records)
        return self._copies
