"""The evaluations, done: numbers for the log, and files for the run's directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from data.pipeline import iterate_in_order
from data.sources import Source, Sources
from runner import files
from runner.config.evaluations import (
    Evaluation,
    Evaluations,
    MetricsEvaluation,
    ReconstructionsEvaluation,
    SamplesEvaluation,
    TextEvaluation,
)
from runner.errors import ConfigError
from runner.train.media import in_pairs, mosaic, pages
from runner.train.step import with_weights
from runner.values import Values

State = dict[str, Any]
EvalStep = Callable[[State, Any, Any], Any]
MADE_BY = {"text": "sample", "samples": "generate", "reconstructions": "reconstruct"}  # the method a model has for it


@dataclass(frozen=True)
class Evaluator:
    """Does evaluations by name: with these models and data, in batches of one size, for one seed."""

    named: Evaluations
    sources: Sources
    model: Callable[[State], nnx.Module]
    put: Callable[[Any], Any]
    batch_size: int
    batches: int  # where an evaluation does not say how many
    seed: int

    def admit(self, model: nnx.Module) -> None:
        """Raises ConfigError where an evaluation asks for what the model cannot make."""
        for name, option in self.named.items():
            method = MADE_BY.get(option.kind)
            if method and not hasattr(model, method):
                raise ConfigError(
                    f"eval.{name}: {type(model).__name__} has no method `{method}`; leave eval.{name} out"
                )

    def __call__(
        self,
        names: Sequence[str],
        state: State,
        eval_step: EvalStep,
        run: Path,
        place: str,
        between: Callable[[], None],
    ) -> dict[str, Values]:
        """What each evaluation measured, or the name of the file it left in the run's directory: `place`, with its name
        for {} and a suffix.

        `between` is called before each batch: it may raise to end it all, and then nothing was measured.
        """
        return {name: self._done(name, state, eval_step, run, place.format(name), between) for name in names}

    def _done(
        self, name: str, state: State, eval_step: EvalStep, run: Path, place: str, between: Callable[[], None]
    ) -> Values:
        option = self.named[name]
        state = with_weights(state, option.weights)
        between()
        if isinstance(option, MetricsEvaluation):
            source = self.sources.train if option.split == "train" else self.sources.eval
            return self._means(source, option.batches or self.batches, state, eval_step, between)
        content = self._made(option, self.model(state))
        file = place + (".txt" if isinstance(content, str) else ".png")
        files.replace_file(run / file, content)
        return {"file": file}

    def _means(
        self, source: Source, num_batches: int, state: State, eval_step: EvalStep, between: Callable[[], None]
    ) -> Values:
        """The mean of every metric over batches of a source that lie evenly apart."""
        sums: dict[str, Any] = {}
        for batch, weights in iterate_in_order(source, batch_size=self.batch_size, num_batches=num_batches):
            between()
            new = eval_step(state, self.put(batch), self.put(weights))
            sums = {name: sums[name] + value for name, value in new.items()} if sums else dict(new)
        weight = float(sums.pop("weight"))
        means = {name: float(value) / weight for name, value in sums.items()}
        if (size := self.sources.bytes_per_token) and "bits_per_token" in means:
            means["bits_per_byte"] = means["bits_per_token"] / size  # comparable between encodings
        return means

    def _made(self, option: Evaluation, model: nnx.Module) -> str | bytes:
        """A text or a PNG."""
        if isinstance(option, TextEvaluation):
            return pages(self.written(option, model))
        if isinstance(option, SamplesEvaluation):
            images = _called(*nnx.split(model), "generate", option.count, jax.random.key(self.seed))
            return mosaic(np.asarray(images, np.float32), round(option.count**0.5))
        assert isinstance(option, ReconstructionsEvaluation)
        images = self.sources.eval.take(np.arange(min(option.count, len(self.sources.eval))))["inputs"]
        return in_pairs(images, np.asarray(_called(*nnx.split(model), "reconstruct", None, images), np.float32))

    def goes_on(self, model: nnx.Module) -> bool:
        """Whether a model can go on after a text, and what it makes can be read."""
        return self.sources.decode is not None and hasattr(model, MADE_BY["text"])

    def written(self, option: TextEvaluation, model: nnx.Module) -> list[tuple[str, str]]:
        """Beginnings of examples that lie apart in the held-out data, and how the model goes on after each."""
        source, decode = self.sources.eval, self.sources.decode or (lambda tokens: " ".join(map(str, tokens)))
        indices = np.linspace(0, len(source) - 1, option.count).astype(np.int64)
        prompts = source.take(indices)["tokens"][:, : option.prompt_tokens].astype(np.int32)
        room = (getattr(model, "context", None) or math.inf) - option.prompt_tokens
        num_tokens = int(max(0, min(option.new_tokens, room)))
        keys = jax.random.split(jax.random.key(self.seed), option.count)
        split = nnx.split(model)
        tokens = [
            np.asarray(_called(*split, "sample", num_tokens, prompt, key, option.temperature))
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        return [(decode(prompt), decode(all_[len(prompt) :])) for prompt, all_ in zip(prompts, tokens, strict=True)]


@partial(jax.jit, static_argnums=(0, 2, 3))
def _called(graphdef: nnx.GraphDef, variables: nnx.State, method: str, count: int | None, *arrays: Any) -> jax.Array:
    """What a method of a model makes of arrays (and of how many it is to make), compiled once."""
    counts = () if count is None else (count,)
    return getattr(nnx.merge(graphdef, variables), method)(*arrays, *counts)
