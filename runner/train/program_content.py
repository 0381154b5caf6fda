"""What a user's own program makes for evaluations: pictures or text, by its function `sample`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.sources import Sources
from models import InvalidModelOrObjective
from models.objectives import describe_value
from models.user_program import UserProgram
from runner.config.evaluations import Evaluation, SamplesEvaluation, TextEvaluation
from runner.config.user_code import as_config_error
from runner.errors import ConfigError
from runner.train.evaluation_files import encode_mosaic, format_samples
from runner.train.program_layout import ProgramLayout
from runner.train.rehearse_program import check_pictures
from runner.train.split_model import READS_VALUES
from runner.train.step import make_key
from runner.types import State, Tree


class ProgramContent:
    """Asks a program for pictures and texts, with the same random key each time."""

    def __init__(self, program: UserProgram, layout: ProgramLayout, sources: Sources, seed: int):
        self._program, self._layout, self._sources, self._key = program, layout, sources, make_key(seed)
        # Compiled when it is first called; what reads values, as text does, runs as it is written.
        self._compiled: Any = jax.jit(program.sample) if program.sample else None

    def check_evaluation(self, name: str, option: Evaluation) -> None:
        """Raise ConfigError where an evaluation asks for what the program cannot make."""
        wanted = {"metrics": "evaluate(state, batch)", "samples": "sample(state, key)", "text": "sample(state, key)"}
        function = wanted.get(option.kind, "").partition("(")[0]
        if function and getattr(self._program, function) is None:
            way_out = f"leave eval.{name} out, or give it one"
            if function == "evaluate":
                way_out = "give it one: score.metric, the best checkpoint and stopping early look at what it measures"
            raise ConfigError(f"eval.{name}: {self._program.target} has no function {wanted[option.kind]}; {way_out}")

    def check_samples(self, state: State) -> None:
        """Raise InvalidModelOrObjective where pictures are asked for and `sample` makes none, as far as a trace tells.

        `state` is abstract.
        """
        try:
            made = jax.eval_shape(self._compiled, self._layout.unpack(state), self._key)
        # What makes text cannot be traced.
        except (*READS_VALUES, TypeError):
            return
        check_pictures(self._program, made)

    def make_content(self, option: Evaluation, state: State) -> str | bytes:
        """Return a text, or a picture as PNG. Raises ConfigError where `sample` gives something else."""
        with as_config_error("program", self._program.target):
            made = self._sample(self._layout.unpack(state))
            if isinstance(option, SamplesEvaluation):
                check_pictures(self._program, made)
                return _draw_pictures(np.asarray(made), option.count)
            assert isinstance(option, TextEvaluation)
            return self._format_text(made, option.count)

    def sample_text(self, state: State) -> str | None:
        """Return None: what a program makes is in the files of its evaluations."""
        return None

    def subject(self, state: State) -> Tree:
        """Return the program's own state, for an evaluation of the user's own; its arrays are its own as well."""
        return jax.tree.map(jnp.copy, self._layout.unpack(state))

    def _sample(self, tree: Tree) -> Any:
        assert self._program.sample is not None
        try:
            return self._compiled(tree, self._key)
        except (*READS_VALUES, TypeError):
            # Text is no value of jax's, and who makes it reads values.
            return self._program.sample(tree, self._key)

    def _format_text(self, made: Any, count: int) -> str:
        """Return texts as people read them; tokens are made text as the data says."""
        if isinstance(made, str):
            return made if made.endswith("\n") else made + "\n"
        texts = list(made) if isinstance(made, list | tuple) else None
        decode = self._sources.decode
        if texts is None and hasattr(made, "dtype") and np.issubdtype(np.asarray(made).dtype, np.integer) and decode:
            texts = [decode(row) for row in np.atleast_2d(np.asarray(made))]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InvalidModelOrObjective(
                f"{self._program.target}: sample gave {describe_value(made)}; expected a text, a list of them, or "
                "tokens of data that knows how to write them"
            )
        return format_samples([("", text) for text in texts[:count]])


def _draw_pictures(made: np.ndarray, count: int) -> bytes:
    images = made[:count, ..., None] if made.ndim == 3 else made[:count]
    scaled = images.astype(np.float32) / (255.0 if images.dtype == np.uint8 else 1.0)
    return encode_mosaic(scaled, round(len(images) ** 0.5))
