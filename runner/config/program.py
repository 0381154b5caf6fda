"""A program of the user's own in place of model, objective, optimizer and schedule: options and what goes with it.

A program does its own update, so nothing of these four is asked. They are in its document all the same, as `kind:
program`, for every part of a configuration is there; and whoever types one of them is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from runner.checkpoint.strategy import EveryEpochs
from runner.config.evaluations import ReconstructionsEvaluation
from runner.errors import ConfigError
from runner.types import Document

if TYPE_CHECKING:
    from runner.config.schema import Config

# What a program does by itself, by the group of the configuration that does it elsewhere.
REPLACED = ("model", "objective", "optim", "schedule")
OWN = {"kind": "program"}


@dataclass(frozen=True, kw_only=True)
class NoProgram:
    """A model is trained by an optimizer, as the other parts of the configuration say."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class ExternalProgram:
    """Any JAX program, from a file of the current directory or an installed package.

    The target makes an object with the functions

        init(key, example) -> state
        step(state, batch, key) -> (state, metrics)
        evaluate(state, batch) -> metrics
        sample(state, key) -> pictures or text      # for eval=samples and eval=text alone

    The state is any pytree of arrays and random keys. `example` is a batch of one example. `metrics` are scalars by
    name in a step, and one value per example in an evaluation. All are traced and compiled, but `sample` may run as it
    is written. docs/programs.md says more.

    Attributes:
        target: `module:attribute` or `path/to/file.py:attribute`: a class, a function that makes the object, or it.
        options: what it is called with by name, as in `program.options.lr=1e-3`.
    """

    kind: Literal["external"] = "external"
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


Program = NoProgram | ExternalProgram


class ReplacedPart:
    """Stand in the configuration for a part that a program does by itself."""

    def build(self, *arguments: Any, **named: Any) -> Any:
        """Raise AssertionError: nobody builds what a program does by itself."""
        raise AssertionError("a program does this by itself")


@dataclass(frozen=True, kw_only=True)
class ProgramModel(ReplacedPart):
    """The program's own."""

    kind: Literal["program"] = "program"

    takes: ClassVar[tuple[str, ...]] = ()
    scopes: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, ...]] = ()
    objective: ClassVar[str] = ""
    shows: ClassVar[tuple[str, ...]] = ("text", "samples")


@dataclass(frozen=True, kw_only=True)
class ProgramObjective(ReplacedPart):
    """The program's own."""

    kind: Literal["program"] = "program"


@dataclass(frozen=True, kw_only=True)
class ProgramOptim(ReplacedPart):
    """The program's own."""

    kind: Literal["program"] = "program"

    lr: ClassVar[float] = 0.0
    ema: ClassVar[None] = None


@dataclass(frozen=True, kw_only=True)
class ProgramSchedule(ReplacedPart):
    """The program's own."""

    kind: Literal["program"] = "program"


def settle_program(document: Document, keys: Sequence[str]) -> dict[str, Any]:
    """Return a composed document in which what a program replaces is the program's own.

    `keys` are those that were typed. Raises ConfigError where one of them says how a model is trained, or by what.
    """
    program = document.get("program")
    if not isinstance(program, Mapping) or program.get("kind") != "external":
        return dict(document)
    for key in keys:
        if key.partition(".")[0] in REPLACED:
            raise ConfigError(
                f"{key}: a program does its own update, so this does nothing; leave it out, or let the program have it "
                "as an option of its own (program.options.NAME=…)"
            )
    return {**document, **dict.fromkeys(REPLACED, OWN)}


def check_program(config: Config) -> None:
    """Raise ValueError where the configuration asks a program for what it does by itself, or a model for a program."""
    if isinstance(config.program, NoProgram):
        if wanting := next((name for name in REPLACED if getattr(config, name).kind == "program"), None):
            raise ValueError(f"{wanting}.kind=program is for a program of your own; add program=my_file:Program")
        if config.data.kind == "none":
            raise ValueError("data=none is for a program that makes its own data; choose data, or add program=…")
        return
    for name in REPLACED:
        if getattr(config, name).kind != "program":
            raise ValueError(f"{name}: a program does its own update; leave {name} out")
    own = "is a program's own business; leave it out, and do it in its step"
    if config.train.microbatches > 1:
        raise ValueError(f"train.microbatches={config.train.microbatches}: how a batch is split {own}")
    if config.train.parts is not None:
        raise ValueError(f"train.parts={config.train.parts}: how a batch is split {own}")
    if config.train.precision != "fp32":
        raise ValueError(f"train.precision={config.train.precision}: in which precision it computes {own}")
    if config.remat.kind != "none":
        raise ValueError(f"remat={config.remat.kind}: what is recomputed {own} (jax.checkpoint)")
    if config.tune.kind != "none":
        raise ValueError(f"tune={config.tune.kind}: what trains {own}")
    _check_own_data(config)
    for name, option in config.eval.items():
        if isinstance(option, ReconstructionsEvaluation):
            raise ValueError(f"eval.{name}: a program makes no reconstructions; leave it out, or choose eval=samples")


def _check_own_data(config: Config) -> None:
    """Raise ValueError where something counts passes over data that is not there."""
    if config.data.kind != "none":
        return
    if config.train.epochs is not None:
        raise ValueError("train.epochs: with data=none there is nothing to pass over; say train.steps=N")
    for name, rule in config.ckpt.save.items():
        if isinstance(rule, EveryEpochs):
            raise ValueError(f"ckpt.save.{name}: with data=none there are no epochs; use kind=steps or kind=seconds")
