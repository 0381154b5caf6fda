"""A document becomes a frozen, typed `Config`, or one plain line says what is wrong with it.

The only file that knows omegaconf. The dataclasses of options live with the parts they configure and check themselves;
here they are put together, validated strictly (no coercion, no unknown key) and checked against each other, before jax
starts and before anything is written.
"""

from __future__ import annotations

import copy
import errno
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from annotated_types import Ge, Gt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import Field, ValidationError

from data import CheckableData, Data
from models import TAUGHT, Model, NamedObjective, Objective
from runner.checkpoint.checkpointer import Verify
from runner.checkpoint.hf_folder import HF
from runner.checkpoint.record import Score
from runner.checkpoint.strategy import SaveRule
from runner.config.early_stop import EarlyStop
from runner.config.evaluations import Evaluation, MetricsEvaluation, check_evaluations
from runner.config.explain import explain_problems
from runner.config.metric_names import check_chosen_metrics
from runner.config.program import (
    NoProgram,
    Program,
    ProgramModel,
    ProgramObjective,
    ProgramOptim,
    ProgramSchedule,
    check_program,
    settle_program,
)
from runner.config.read_yaml import MAX_BYTES, decode_text, parse_yaml
from runner.config.remat_policies import RematPolicy, check_model_supports
from runner.config.run_length import DEFAULT_STEPS, drop_untyped_length, fill_in_length
from runner.config.tune import NoTune, Tune
from runner.config.validation import BY_KIND, Retention, adapter_of, validate_plain
from runner.errors import ConfigError, RefusedError, StorageError
from runner.files import NOT_A_FILE, read_file
from runner.hosts.options import AutoHosts, Hosts
from runner.log.options import LogOptions
from runner.mesh import Mesh
from runner.optim.optimizers import Optim
from runner.optim.schedules import Schedule
from runner.preempt.preempt_options import NoticeSource, Preempt
from runner.profiling.options import Profile
from runner.remote.options import Remote, check_url, is_remote_url
from runner.text import display_path, shorten
from runner.types import Document

# Linux takes names of 255 bytes and paths of 4,096; a run's own are below these.
MAX_NAME, MAX_PATH = 255, 3500
Count = Annotated[int, Ge(1)]
# What trains a model beside the objective that it is mostly made for: one that gives a number for each class gives as
# well the numbers that a regression asks for.
ALSO_TRAINED = {"classify": ("classify", "regress"), "next_token": ("next_token", "sft", "dpo")}
# It becomes part of the names of metrics and of files.
Split = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long to train, how often to look, which weights a finished run ends on, and when to give up.

    Attributes:
        steps: so many updates in all; null: 600, or as many as `epochs` says; 0 evaluates a run that is there (with
            dir=RUN, or as `python -m runner eval`).
        epochs: so many passes over the training data, in place of `steps`; a part of one is allowed.
        log_steps: measure the training loss every so many.
        eval_steps: evaluate every so many, where an evaluation does not say otherwise.
        eval_batches: so many batches in an evaluation, where it does not say otherwise.
        final: a finished run ends on the last weights, or on the best ones by the score.
        microbatches: a batch is computed in so many parts, whose gradients are averaged: memory for one part at a time.
        parts: the batch is computed in so many parts, a power of two, which are added in a fixed order: the bits are
            then the same on any number of devices that divides it. In place of `microbatches`.
        precision: bf16 computes in bfloat16; parameters, averages, statistics and the optimizer stay in float32.
        hang_seconds: without a sign of life for so long, the process ends (exit 1); null: never.
        max_crashes: a step that failed so often in a row is tried once more from an older checkpoint, then no more.
        max_rollbacks: so often a run goes back and skips a batch on which the loss was not finite.
        dollars_per_hour: what the machine costs, for the goodput report.
        peak_flops: FLOP/s that one device can do at most, for the share of it that is used (MFU); null: that of a known
            device in bfloat16.
    """

    steps: Annotated[int, Ge(0)] | None = DEFAULT_STEPS
    epochs: Annotated[float, Gt(0.0)] | None = None
    log_steps: Count = 10
    eval_steps: Count = 100
    eval_batches: Count = 40
    final: Literal["last", "best"] = "last"
    microbatches: Count = 1
    parts: Count | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    hang_seconds: Annotated[float, Gt(0.0)] | None = 1800.0
    max_crashes: Count = 3
    max_rollbacks: Annotated[int, Ge(0)] = 3
    dollars_per_hour: Annotated[float, Ge(0.0)] | None = None
    peak_flops: Annotated[float, Gt(0.0)] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"epochs={self.epochs:g} and train.steps={self.steps} both say how long to train; leave one of them "
                "out, or make it null"
            )
        if self.parts is not None and self.parts & (self.parts - 1):
            raise ValueError(f"parts={self.parts} must be a power of two: 1, 2, 4, 8, …")
        if self.parts is not None and self.microbatches > 1:
            raise ValueError(
                f"parts={self.parts} and train.microbatches={self.microbatches} both split a batch; leave one of them "
                "out"
            )
        if self.steps is None and self.epochs is None:
            raise ValueError("steps: nothing says how long to train; say train.steps=N, or train.epochs=N")

    @property
    def num_splits(self) -> int:
        """Return in how many parts a batch is computed, one after the other where there is one device."""
        return self.parts or self.microbatches

    @property
    def num_steps(self) -> int:
        """Return how many updates there are in all. Where `epochs` says it, only `Config.with_known_steps` has it."""
        assert self.steps is not None, "train.epochs: asked for the number of steps before the data was read"
        return self.steps

    def count_steps(self, num_examples: int, batch_size: int) -> int:
        """Return how many updates there are in all, with so many examples to train on."""
        if self.steps is not None:
            return self.steps
        # Exactly: 1.1 × 1,000 ÷ 100 is 11 steps, but 11.000000000000002 in floating point.
        return math.ceil(Fraction(repr(self.epochs)) * num_examples / batch_size)


@dataclass(frozen=True, kw_only=True)
class Ckpt:
    """The strategy: named rules, whether training waits for the disk, and whether the last state is saved as well.

    Attributes:
        save: rules that say when to save, each under a name of its own.
        write: whether training waits until a checkpoint is durable, or only for the copy that is written.
        last: save the last state, finished or stopped.
        verify: `bytes` takes a checksum of every file and compares it before a restore; `values` also reads each fresh
            checkpoint back and compares it with the live state; `off` compares names and sizes only.
    """

    save: Mapping[str, Annotated[SaveRule, BY_KIND]] = field(default_factory=dict)
    write: Literal["blocking", "background"] = "background"
    last: bool = True
    verify: Verify = "bytes"


@dataclass(frozen=True, kw_only=True)
class PreemptByKind(Preempt):
    """What asks the run to save and stop: signals, the file RUN/STOP, a time limit, and notices of the machine."""

    # The mark by which pydantic tells them apart is added here: what listens for a stop is imported without pydantic.
    notices: Mapping[str, Annotated[NoticeSource, BY_KIND]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RemoteByKind(Remote):
    """Keep the run in a bucket as well: an empty machine goes on from there. `remote=URL` is short for `remote.url`.

    Attributes:
        retention: which checkpoints stay there; null: as on this machine. `retention.remote=OPTION` chooses one.
    """

    retention: Retention | None = None


@dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Begin with the weights of another run.

    Attributes:
        run: the one whose weights they are: `RUN`, `RUN@STEP` or `RUN@best`; `init_from=RUN` is short for it. RUN is a
            directory, or the place of a run in a bucket, `s3://BUCKET/PREFIX/NAME/RUN`. `hf:DIR` is a folder of Hugging
            Face, with config.json and model.safetensors.
        partial: take the weights that fit, and leave the others as they are initialized.
    """

    run: str | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if self.partial and self.run is None:
            raise ValueError("partial=true says how to take weights, but not whose; add init_from=RUN")
        if self.run is not None:
            _check_path("run", self.run)
            if is_remote_url(self.run):
                # Only the last part may name a step.
                check_url(self.run.rpartition("/")[0] + "/run")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run depends on. Each part checks itself; here is checked what several of them have to agree on.

    Attributes:
        name: runs live in ROOT/NAME/RUN.
        root: the directory of all runs.
        seed: of everything random: initial weights, the order of the data, dropout.
        compile_cache: where compiled programs are kept: `auto` (yours alone), `off`, or a folder that machines share.
        dir: continue this run directory under a changed configuration.
        step: take the run back to this checkpoint, or to the best; what is newer is set aside.
        resume: `auto` begins or goes on, `never` refuses where there is a run, `must` where there is none.
        overwrite: with `resume=never`, set an existing run aside and start afresh.
    """

    model: Annotated[Model | ProgramModel, BY_KIND]
    data: Annotated[Data, BY_KIND]
    optim: Annotated[Optim | ProgramOptim, BY_KIND]
    schedule: Annotated[Schedule | ProgramSchedule, BY_KIND]
    train: Train
    ckpt: Ckpt
    retention: Retention
    remat: Annotated[RematPolicy, BY_KIND]
    mesh: Mesh
    preempt: PreemptByKind
    log: LogOptions
    score: Score
    stop: EarlyStop = field(default_factory=EarlyStop)
    hosts: Annotated[Hosts, BY_KIND] = field(default_factory=AutoHosts)
    objective: Annotated[Objective | ProgramObjective, BY_KIND] = field(default_factory=NamedObjective)
    program: Annotated[Program, BY_KIND] = field(default_factory=NoProgram)
    tune: Annotated[Tune, BY_KIND] = field(default_factory=NoTune)
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "default"
    root: str = "outputs"
    seed: Annotated[int, Ge(0)] = 0
    eval: Mapping[Split, Annotated[Evaluation, BY_KIND]] = field(default_factory=lambda: {"eval": MetricsEvaluation()})
    init_from: InitFrom = field(default_factory=InitFrom)
    remote: RemoteByKind = field(default_factory=RemoteByKind)
    profile: Profile = field(default_factory=Profile)
    compile_cache: str = "auto"
    dir: str | None = None
    step: Annotated[int, Ge(1)] | Literal["best"] | None = None
    resume: Literal["auto", "never", "must"] = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        # The order decides which line a person sees first: what fits together, and only then how it is trained.
        _check_path("root", self.root)
        check_program(self)
        if not isinstance(self.model, ProgramModel):
            self._check_model(self.model)
        if self.train.steps == 0 and self.dir is None:
            raise ValueError("train.steps=0 evaluates a run that is there; say which with dir=RUN, or train.steps=N")
        check_evaluations(self.eval, self.model, has_ema=self.optim.ema is not None)
        if self.data.batch_size % self.train.microbatches:
            raise ValueError(
                f"train.microbatches={self.train.microbatches} must divide data.batch_size={self.data.batch_size}; "
                "change one of them"
            )
        if self.train.parts is not None:
            self._check_parts(self.train.parts)
        if self.overwrite and self.resume != "never":
            raise ValueError("overwrite=true sets an existing run aside at every start; say resume=never with it")

    def _check_parts(self, parts: int) -> None:
        """Raise ValueError where a batch cannot be computed in so many parts that keep their bits."""
        if self.data.batch_size % parts:
            raise ValueError(
                f"train.parts={parts} must divide data.batch_size={self.data.batch_size}; change one of them"
            )
        if self.mesh.fsdp != 1 or self.mesh.tensor != 1:
            raise ValueError(
                f"train.parts={parts} keeps the bits where each device has the whole state; use mesh=data, or leave "
                "train.parts out"
            )

    def _check_model(self, model: Model) -> None:
        """Raise ValueError where the model does not go with the data, the objective, the remat policy or precision."""
        gives, objective = self.data.gives, self.objective.kind
        # A user's own model or data says what it takes or gives only when it is imported: checked then.
        if model.takes and gives and gives not in model.takes:
            other_data = "|".join(data.kind for data in get_args(Data) if data.gives in model.takes)
            other_models = (
                "|".join(other.kind for other in get_args(Model) if gives in other.takes) or "my_file:MyModel"
            )
            raise ValueError(
                f"model={model.kind} takes {' or '.join(model.takes)}, but data={self.data.kind} gives {gives}; "
                f"choose data={other_data} or model={other_models}"
            )
        trains = ALSO_TRAINED.get(model.objective, (model.objective or objective,))
        if objective not in ("default", "external", "distill", *trains):
            raise ValueError(
                f"objective={objective} does not train model={model.kind}, which is made for {' or '.join(trains)}; "
                "choose objective=default, or objective=external"
            )
        self._check_conversations()
        if objective == "distill":
            self._check_teacher()
        check_model_supports(self.remat, model)
        heads, tensor = getattr(model, "num_heads", None), self.mesh.tensor
        if heads and tensor > 1 and heads % tensor:
            raise ValueError(f"mesh.tensor={tensor} must divide model.num_heads={heads}, which it shares out")
        if getattr(model, "attention", "xla") == "cudnn" and self.train.precision == "fp32":
            raise ValueError("model.attention=cudnn computes in bfloat16; add train.precision=bf16, or choose xla")

    def _check_teacher(self) -> None:
        """Raise ValueError where a teacher does not go with how the loss is computed."""
        if getattr(self.model, "loss_chunks", 1) > 1:
            raise ValueError("objective=distill compares the logits of all positions at once; say model.loss_chunks=1")
        if self.train.parts is not None:
            raise ValueError("objective=distill does not train in parts; leave train.parts out, or use microbatches")
        if self.remat.kind == "auto":
            raise ValueError("remat=auto does not count what a teacher takes; choose a policy by its name")
        if self.model.kind == "external":
            raise ValueError("objective=distill trains a model that is built in; choose one, or objective=external")
        if is_remote_url(self.objective.teacher):  # type: ignore[union-attr]
            raise ValueError("objective.teacher is in a bucket; copy that run here first (rclone, aws s3 cp)")

    def _check_conversations(self) -> None:
        """Raise ValueError where data that is there for one objective meets another one, or the other way round."""
        meant, objective = getattr(self.data, "objective", ""), self.objective.kind
        may_be_taught = ("distill",) if meant in TAUGHT else ()
        if meant and objective not in ("default", "external", meant, *may_be_taught):
            raise ValueError(f"data={self.data.kind} is there for objective={meant}; leave objective={objective} out")
        makers = [kind.kind for kind in get_args(Data) if getattr(kind, "objective", None) == objective]
        if makers and self.data.kind not in ("external", *makers):
            what = "pairs of answers" if objective == "dpo" else "conversations"
            raise ValueError(f"objective={objective} learns from {what}; say data={' or '.join(makers)}")
        if getattr(self.data, "packing", False) and getattr(self.model, "attention", "xla") == "cudnn":
            raise ValueError(
                "model.attention=cudnn is not tried where several conversations share a row; choose xla, or say "
                "data.packing=false"
            )

    def with_known_steps(self, num_examples: int) -> Config:
        """Return the configuration with the number of steps that `train.epochs` means on so many training examples."""
        if self.train.epochs is None:
            return self
        steps = self.train.count_steps(num_examples, self.data.batch_size)
        return replace(self, train=replace(self.train, steps=steps, epochs=None))

    @property
    def document(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, defaults included, as it is written to config.yaml."""
        return adapter_of(Config).dump_python(self, mode="json")


def _check_path(key: str, path: str) -> None:
    """Raise ValueError where a path is none that a file system takes."""
    if not path or any(len(name.encode()) > MAX_NAME for name in Path(path).parts) or len(path.encode()) > MAX_PATH:
        got = json.dumps(shorten(path, 60), ensure_ascii=False)
        raise ValueError(
            f"{key}: got {got}; expected a path, of names of {MAX_NAME} bytes at most and {MAX_PATH:,} in all"
        )


def validate_config(document: Any) -> Config:
    """Return a composed document (a DictConfig or plain values) as a Config, after a look at whether its data is there.

    Raises ConfigError, with every way out it knows.
    """
    config: Config = validate_options(Config, document)
    # Not in Config itself: a run whose configuration names no such metric is still looked at, and gone on with.
    check_chosen_metrics(config)
    # Only now: a misspelt key is told before a file that is not there.
    if isinstance(config.data, CheckableData):
        try:
            config.data.check_readable()
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
        # A pattern that begins with `/`, as pathlib answers it.
        except NotImplementedError as error:
            raise ConfigError(f"data.pattern: {error}") from None
        except OSError as error:
            raise ConfigError(f"data.path: {error.filename}: {error.strerror}") from None
    return config


def validate_options(schema: Any, document: Any) -> Any:
    """Return a document as `schema`, a dataclass of options. Raises ConfigError, with every way out it knows."""
    plain = to_plain(document)
    if schema is Config:
        plain = fill_in_length(plain)
        # As it is typed, `remote=URL`, in a file of choices.
        if isinstance(plain.get("remote"), str):
            plain = {**plain, "remote": {"url": plain["remote"]}}
        plain = _fill_in_folder(plain)
    _check_numbers_and_text(plain, "")
    try:
        return validate_plain(schema, plain)
    except ValidationError as error:
        raise ConfigError(explain_problems(error.errors(include_url=False), plain, schema)) from None


def _fill_in_folder(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a document with the folder of `init_from=hf:DIR` as that of `model=hf`, and of its text's tokenizer.

    Both where none is named. Raises ConfigError where neither names a folder.
    """
    model, begins, data = plain.get("model"), plain.get("init_from"), plain.get("data")
    if not isinstance(model, dict) or model.get("kind") != "hf":
        return plain
    if model.get("path") is None:
        reference = begins.get("run") if isinstance(begins, dict) else None
        if not isinstance(reference, str) or not reference.startswith(HF):
            raise ConfigError("model.path: a folder is needed; say model.path=DIR, or init_from=hf:DIR")
        model = {**model, "path": reference.removeprefix(HF)}
    kinds = ("text", "hub", "chat", "preferences")
    if isinstance(data, dict) and data.get("kind") in kinds and data.get("tokenizer") is None:
        is_text = data["kind"] != "hub" or data.get("gives") == "tokens"
        data = {**data, "tokenizer": model["path"]} if is_text else data
    return {**plain, "model": model, "data": data}


def _check_numbers_and_text(node: Any, key: str) -> None:
    """Raise ConfigError where a value is nothing that a machine's number, or a file's name, can be."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list | tuple) else ()
    for name, value in children:
        where = f"{key}.{name}" if key else str(name)
        if isinstance(value, int) and abs(value) >= 1 << 63:
            # Not the number itself: Python refuses to write one of 4,300 digits.
            raise ConfigError(f"{where}: got a number of {value.bit_length():,} bits; expected less than 64")
        if isinstance(value, str) and not _can_be_written(value):
            raise ConfigError(f"{where}: got {json.dumps(shorten(value, 60))}; expected text without such characters")
        _check_numbers_and_text(value, where)


def _can_be_written(text: str) -> bool:
    """Return whether a text can be the name of a file, and be in one."""
    try:
        return b"\0" not in text.encode()
    # Half of a character of two: what is no UTF-8 on a command line comes as such.
    except UnicodeEncodeError:
        return False


def read_document(path: Path) -> dict[str, Any]:
    """Return the document of a run's config.yaml, with the defaults of keys that are newer than it.

    Only data is read: no code is run, and an interpolation is text. Raises RefusedError where it is no configuration,
    StorageError where it cannot be read now.
    """
    try:
        # Not through omegaconf, which would resolve `${oc.env:…}`.
        plain = parse_yaml(decode_text(read_file(path, MAX_BYTES)))
        if not isinstance(plain, dict):
            raise ConfigError("it is no mapping")
        document: dict[str, Any] = validate_options(Config, plain).document
    except (ValueError, ConfigError) as error:
        problem = str(error)
    except OSError as error:
        # What the machine fails to read is nothing that the document says.
        if error.errno not in (errno.ENOENT, *NOT_A_FILE):
            raise StorageError(f"{display_path(path)}: {error.strerror}; run the same command again") from None
        problem = str(error.strerror)
    else:
        return document
    raise RefusedError(f"{display_path(path)}: not a configuration of this version ({problem}); restore it")


def dump_yaml(document: Document) -> str:
    """Return a document as YAML, its keys in their order."""
    return yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True)


def merge_typed_keys(saved: Document, composed: DictConfig, keys: Sequence[str]) -> dict[str, Any]:
    """Return the saved document with `keys` (those that the command line touched) as they are composed now.

    A key that is not in the composed document was deleted by the command line (`~ckpt.save.best`), and goes.
    """
    document, now = copy.deepcopy(dict(saved)), to_plain(composed, throw=False)
    for key in keys:
        *path, leaf = key.split(".")
        source: Any = now
        target: Any = document
        # Down both documents at once; a part that only one of them has is empty in the other.
        for part in path:
            source = source.get(part, {}) if isinstance(source, dict) else {}
            target = target.setdefault(part, {})
        if isinstance(source, dict) and leaf in source:
            target[leaf] = source[leaf]
        else:
            target.pop(leaf, None)
    return settle_program(drop_untyped_length(document, keys), keys)


def to_plain(document: Any, *, throw: bool = True) -> dict[str, Any]:
    """Return a document as plain values. Raises ConfigError where omegaconf cannot resolve it.

    With `throw=False` a value that is missing (`???`) stays that text.
    """
    if not isinstance(document, DictConfig):
        return dict(document)
    try:
        return OmegaConf.to_container(document, resolve=True, throw_on_missing=throw)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: a value is needed; say {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
