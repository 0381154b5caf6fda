"""Where the weights of a teacher come from: a checkpoint of a run, or a folder of Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from data.encodings import TOKENIZER
from data.sources import Sources
from data.text_tokenizer import BYTES, TextTokenizer, find_tokenizer
from models import HfModel, HfShape
from runner.checkpoint.hf_folder import find_hf_path
from runner.checkpoint.hf_shape import read_hf_shape
from runner.checkpoint.hf_weights import HfWeights, open_hf_weights
from runner.checkpoint.record import locate_checkpoint
from runner.checkpoint.seal import find_problem
from runner.checkpoint.transfer import CheckpointWeights, HeldWeights, WeightSource
from runner.config.schema import Config, read_document, validate_options
from runner.errors import ConfigError, RefusedError
from runner.rundir.layout import RunDir
from runner.text import display_path
from runner.train.dataset import sources_as_recorded
from runner.train.tuned_weights import read_whole_weights
from runner.types import JsonObject


@dataclass(frozen=True)
class RunTeacher:
    """A checkpoint of a run."""

    checkpoint: Path

    @property
    def name(self) -> str:
        """Return how it is called to a person."""
        return display_path(self.checkpoint)

    @property
    def facts(self) -> JsonObject:
        """Return what is written down of it."""
        return {"checkpoint": str(self.checkpoint), "step": int(self.checkpoint.name)}

    def prove(self) -> None:
        """Raise RefusedError where it is not what was written."""
        if problem := find_problem(self.checkpoint):
            raise RefusedError(f"objective.teacher: {self.name} is not good: {problem}")

    def open_weights(self) -> WeightSource:
        """Return its arrays; of a run that trained a part of a model those of the whole."""
        whole = read_whole_weights(self.checkpoint)
        return CheckpointWeights(self.checkpoint) if whole is None else HeldWeights(self.name, whole)

    def choose_model(self, config: Config, sources: Sources) -> Any:
        """Return the option of its model. Raises ConfigError where it is none for this data."""
        run = RunDir(self.checkpoint.parent.parent)
        where = f"objective.teacher={display_path(run.path)}"
        model: Any = validate_options(Config, read_document(run.config)).model
        if model.kind in ("external", "program"):
            raise ConfigError(f"{where}: its model is code of somebody's own; expected one that is built in")
        recorded = sources_as_recorded(run)
        if recorded is not None and recorded.num_outputs != sources.num_outputs:
            raise ConfigError(
                f"{where}: gives {recorded.num_outputs} classes or tokens, but data={config.data.kind} has "
                f"{sources.num_outputs}; choose a teacher of the same data"
            )
        return model


@dataclass(frozen=True)
class FolderTeacher:
    """A folder of Hugging Face."""

    path: Path

    @property
    def name(self) -> str:
        """Return how it is called to a person."""
        return f"hf:{display_path(self.path)}"

    @property
    def facts(self) -> JsonObject:
        """Return what is written down of it."""
        return {"folder": str(self.path.absolute())}

    @cached_property
    def _weights(self) -> HfWeights:
        if not self.path.is_dir():
            raise RefusedError(f"objective.teacher: {self.name} is not there; bring that folder back")
        try:
            return open_hf_weights(self.path)
        except ConfigError as error:
            raise ConfigError(f"objective.teacher: {error}") from None

    @cached_property
    def _shape(self) -> HfShape:
        return read_hf_shape(self.path)

    def prove(self) -> None:
        """Raise RefusedError where it is gone, ConfigError where it is none that can be read."""
        _ = self._weights

    def open_weights(self) -> WeightSource:
        """Return its arrays under our names."""
        return self._weights

    def choose_model(self, config: Config, sources: Sources) -> HfModel:
        """Return the option of its model. Raises ConfigError where it is none for this data."""
        where, shape = f"objective.teacher={self.name}", self._shape
        if shape.vocab:
            self._check_tokens(where, config, sources)
        else:
            classes = self._weights.specs["params.head.kernel"].shape[-1]
            if classes != sources.num_outputs:
                raise ConfigError(
                    f"{where}: gives {classes} classes, but data={config.data.kind} has {sources.num_outputs}; choose "
                    "a teacher of the same data"
                )
        return HfModel(path=str(self.path), shape=shape)

    def _check_tokens(self, where: str, config: Config, sources: Sources) -> None:
        """Raise ConfigError where a number means another token to the teacher than in the data, as far as is known."""
        vocab, file = self._shape.vocab, self.path / TOKENIZER
        theirs = TextTokenizer(file) if file.is_file() else None
        place: str | None = getattr(config.data, "tokenizer", None)
        try:
            # An embedding may have more rows than there are tokens, so that its size is a rounder one.
            known = {vocab, *([theirs.vocab_size] if theirs is not None and sources.num_outputs < vocab else [])}
            same = sources.num_outputs in known
            if same and theirs is not None and place not in (None, BYTES):
                same = TextTokenizer(find_tokenizer(str(place))).numbers_alike(theirs)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        if not same:
            raise ConfigError(
                f"{where}: has a vocabulary of {vocab:,} tokens, and data={config.data.kind} has "
                f"{sources.num_outputs:,}, or others; make tokens with that folder's tokenizer: data.tokenizer=FOLDER"
            )


TeacherSource: TypeAlias = RunTeacher | FolderTeacher


def locate_teacher(reference: str) -> TeacherSource:
    """Return what `RUN`, `RUN@STEP`, `RUN@best` or `hf:DIR` names.

    Raises:
        RefusedError: there is none.
        ConfigError: it is a folder that cannot be read, or of no family that is known.
    """
    if (folder := find_hf_path(reference)) is not None:
        found = FolderTeacher(folder)
        found.prove()
        return found
    try:
        return RunTeacher(locate_checkpoint(reference))
    except RefusedError as error:
        raise RefusedError(f"objective.teacher: {error}") from None
