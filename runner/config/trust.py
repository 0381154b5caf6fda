"""Judge what the document of a run may decide where somebody else may have written it, and what has to be typed.

Looking at a run, or going on with one, must run no code because of what its directory says, and ask or tell no host.
The tables below have every option that takes text (a test goes over all of them): one that says what is imported, asked
or told is taken from a run's document only with `--trust`, or where the command comes to the same value by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import RefusedError
from runner.text import display_path, shorten
from runner.types import Document

if TYPE_CHECKING:
    from runner.config.schema import Config

TRUST_FLAG = "--trust"

# What is done with a run: its code is imported, its data is read, it is trained. Each reaches further.
Use = Literal["code", "data", "training"]
ALL_USES: tuple[Use, ...] = ("code", "data", "training")

# The option and its field, and for what it is looked at.
NEEDS_TRUST: dict[str, Use] = {
    "ExternalModel.target": "code",
    "ExternalData.target": "code",
    "ExternalObjective.target": "code",
    "ExternalOptim.target": "code",
    "ExternalSchedule.target": "code",
    "ExternalEvaluation.target": "code",
    "ExternalProgram.target": "code",
    # These are imported by who trains alone: see TRAINING_PARTS in user_code.py.
    "ExternalSave.target": "training",
    "ExternalRetention.target": "training",
    "ExternalStop.target": "training",
    "ExternalSink.target": "training",
    "Hub.path": "data",  # downloaded, where no folder has that name
    "Gce.url": "training",  # asked all the time, and what it answers stops the run
    "Aws.url": "training",
    "Azure.url": "training",
    "AutoDetect.url": "training",
    "AutoDetect.dmi": "training",  # says which of them is asked
    "LogOptions.wandb": "training",  # sends what is measured to a project
}
# These say what one command is to do with a run, and not what the run is: they are never taken from its document. The
# programs in a compile cache are run without being read.
KEYS_OF_THE_COMMAND = ("dir", "root", "step", "resume", "overwrite", "compile_cache", "hosts", "remote")
# Text that reaches no code and no host: names that mean something within the run, and data that is on this machine.
# What is read of it stays in the run's directory, unless it is sent somewhere by what needs trust.
MAY_BE_NAMED = (
    *(
        "Config.name",
        "Score.metric",
        "NewBest.metric",
        "KeepBest.metric",
        "EarlyStop.metric",
        "MetricsEvaluation.split",
        "DiskBudget.bytes",
    ),
    # For a target, which needs trust.
    *("ExternalModel.options", "ExternalData.options", "ExternalObjective.options", "ExternalProgram.options"),
    "ExternalEvaluation.options",
    *("ExternalOptim.options", "ExternalSchedule.options"),
    *("ExternalSave.options", "ExternalRetention.options", "ExternalStop.options", "ExternalSink.options"),
    *("Text.path", "Text.pattern", "Tokens.path", "Arrays.path", "Images.path", "Parquet.path", "Arrayrecord.path"),
    # A template of these is rendered in a sandbox (data/chat_template.py).
    *("Chat.path", "Chat.eval_path", "Chat.pattern", "Chat.tokenizer", "Chat.template", "Chat.date"),
    *("Preferences.path", "Preferences.eval_path", "Preferences.pattern"),
    *("Preferences.tokenizer", "Preferences.template", "Preferences.date"),
    *("ParameterGroup.match", "FreezeTune.train", "LoraTune.targets", "LoraTune.train"),
    *("Text.eval_path", "Text.field", "Images.eval_path", "Csv.path", "Csv.inputs", "Csv.label", "Csv.delimiter"),
    *("ArrayNames.inputs", "ArrayNames.label", "ArrayNames.eval_inputs", "ArrayNames.eval_label"),
    *("ArrayNames.test_inputs", "ArrayNames.test_label", "ColumnNames.inputs", "ColumnNames.label"),
    *("Tokens.encoding", "Parquet.inputs", "Parquet.label"),
    *("Hub.subset", "Hub.revision", "Hub.split", "Hub.eval_split", "Hub.inputs", "Hub.label"),  # of a path that does
    *("Full.block", "NothingSaveable.block", "EverythingSaveable.block", "Dots.block", "DotsNoBatch.block"),
    *("EveryN.block", "Names.block", "Names.save", "Offload.block", "Offload.offload", "Offload.save"),
    *("AutoRemat.block", "AutoRemat.budget_bytes"),
    *("PreemptByKind.walltime", "Azure.machine"),
    *("InitFrom.run", "Distill.teacher", "HfModel.path", "HfShape.family", "Text.tokenizer", "Hub.tokenizer"),
    *("AutoHosts.address", "NamedHosts.address"),  # of hosts, which is the command's
    *("RemoteByKind.url", "RemoteByKind.endpoint"),  # of remote, which is the command's
    "WandbOptions.project",  # of LogOptions.wandb
)
MAX_NAMED, MAX_VALUE = 3, 60


def find_keys_that_need_trust(config: Config, uses: Collection[Use] = ALL_USES) -> dict[str, Any]:
    """Return what a configuration has of what has to be typed: `{"model.target": "my_file:MyModel"}`."""
    found = {}
    for key, option, field, value in _iter_fields(config, ""):
        use = NEEDS_TRUST.get(f"{type(option).__name__}.{field.name}")
        # What the option says where nobody says anything is no choice of the document's.
        if use in uses and (field.default is MISSING or value != field.default):
            found[key] = value
    return found


def require_trust(
    run: Path, config: Config, composed: Document, way_out: str, uses: Collection[Use] = ALL_USES
) -> None:
    """Raise RefusedError where the document of a run names code or hosts that the command does not come to by itself.

    Args:
        run: its directory.
        config: what its document says, with what was typed.
        composed: what the command says without the run.
        way_out: how to say that the run is trusted.
        uses: what is to be done with the run.
    """
    asked = {
        key: value
        for key, value in find_keys_that_need_trust(config, uses).items()
        if not _says_the_same(_get_dotted(composed, key), value)
    }
    if not asked:
        return
    code = {key: value for key, value in asked.items() if key.endswith(".target")}
    hosts = {key: value for key, value in asked.items() if key not in code}
    if not hosts:
        raise RefusedError(
            f"{display_path(run)} asks for code of its own: {_list_keys(code)}; if you trust it {way_out}"
        )
    also = f"asks for code of its own ({_list_keys(code)}) and " if code else ""
    raise RefusedError(
        f"{display_path(run)} {also}says where to connect to: {_list_keys(hosts)}; type that yourself, or, if you "
        f"trust the run, {way_out}"
    )


def trust_flag(config: Config) -> str:
    """Return ` --trust` where a command that goes on with a run of this configuration needs it, else nothing."""
    return f" {TRUST_FLAG}" if find_keys_that_need_trust(config) else ""


def _iter_fields(option: Any, prefix: str) -> Iterator[tuple[str, Any, Field[Any], Any]]:
    """Yield every field of an option and of those below it: its dotted key, the option, the field and its value."""
    if isinstance(option, Mapping):
        for name, below in option.items():
            if is_dataclass(below):
                yield from _iter_fields(below, f"{prefix}{name}.")
    elif is_dataclass(option):
        for field in fields(option):
            value = getattr(option, field.name)
            yield f"{prefix}{field.name}", option, field, value
            yield from _iter_fields(value, f"{prefix}{field.name}.")


def _says_the_same(composed: Any, value: Any) -> bool:
    """Return whether what was composed here is a value of the run's; an option may leave out what is its default."""
    if not is_dataclass(value):
        return composed == value
    return isinstance(composed, Mapping) and all(
        composed.get(field.name, field.default) == getattr(value, field.name) for field in fields(value)
    )


def _list_keys(values: Mapping[str, Any]) -> str:
    shown = [f"{key}={_show_value(value)}" for key, value in list(values.items())[:MAX_NAMED]]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _show_value(value: Any) -> str:
    if is_dataclass(value):
        value = "{" + ", ".join(f"{field.name}: {getattr(value, field.name)}" for field in fields(value)) + "}"
    return shorten(str(value), MAX_VALUE)


def _get_dotted(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
